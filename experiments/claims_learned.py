"""Claims about what is learned from text, from judgements and from samples."""

from experiments.claims import Claim, Row, Rows, above, beyond, cell, column, falls, find, holds, mid, show

HUMAN = Claim(
    recipe="human_preferences",
    claim="A policy tuned for a reward that was learned from people is preferred",
    source="Ziegler 2019",
    published="with 5,000 labels people prefer the tuned policy in 86 %†",
    measured=lambda rows: (
        f"it wins {show(rows, 'wins by VADER', 100, seed='all')} % of pairs by VADER and "
        f"{show(rows, 'wins by ridge, other ratings', 100, seed='all')} % by a regression on ratings that the reward "
        f"model never saw, at {', '.join(show(rows, 'KL, nats', seed=row['seed']) for row in rows[:-1])} nats"
    ),
    parts={
        "preferred by VADER": lambda rows: above(rows, "wins by VADER", 0.5, seed="all"),
        "preferred by a judge of other ratings": lambda rows: above(
            rows, "wins by ridge, other ratings", 0.5, seed="all"
        ),
    },
    note=(
        "Nobody was asked about these completions: formulas judge them, and no more of the texts than their sentiment."
    ),
    figure="policy.png",
)

DATA, SIZE = {"width": "all"}, {"width": "points per doubling"}
DOUBLING, BEND = "points per doubling", "and the next one's, less that"

SCALING = Claim(
    recipe="reward_scaling",
    claim="Reward models grow more accurate with data and with size, by as much at each doubling",
    source="Stiennon 2020",
    published="twice the data adds 1.1 % of accuracy†, twice the model 1.8 %†",
    measured=lambda rows: (
        f"twice the data adds {show(rows, DOUBLING, **DATA)} points, and the next doubling "
        f"{show(rows, BEND, **DATA)} more than that; twice the parameters {show(rows, 'all', **SIZE)}, and "
        f"{show(rows, 'all', width=BEND)} more"
    ),
    parts={
        "more with data": lambda rows: above(rows, DOUBLING, 0, **DATA),
        "more with size": lambda rows: above(rows, "all", 0, **SIZE),
        "as much at each doubling of the data": lambda rows: holds(rows, BEND, 0, **DATA),
        "as much at each doubling of the size": lambda rows: holds(rows, "all", 0, width=BEND),
    },
    note="Models of a few thousand parameters, and a formula in the place of people, judged with noise.",
    figure="reward_scaling.png",
)


def swept(rows: Rows, name: str) -> list[Row]:
    """The proxies of one sweep that RL has optimised."""
    return find(rows, by="RL", varied=name)


OVEROPTIMIZATION = Claim(
    recipe="overoptimization",
    claim="Optimised further, a learned reward goes on rising while the true one falls",
    source="Gao 2022",
    published=(
        "gold is d (a - b d) by best of n and d (a - b log d) by RL, with d the root of the KL†; b falls with the "
        "proxy's size and data†; KL penalties move along one curve†"
    ),
    measured=lambda rows: (
        f"in RL gold rises to {min(column(swept(rows, 'size'), 'highest gold')):.2f} to "
        f"{max(column(swept(rows, 'size'), 'highest gold')):.2f} standard deviations and falls to "
        f"{min(column(swept(rows, 'size'), 'last gold')):.2f} to {max(column(swept(rows, 'size'), 'last gold')):.2f}, "
        f"where the proxy is at {min(column(swept(rows, 'size'), 'last proxy')):.2f} or more; b by width "
        + ", ".join(f"{x:.2f}" for x in column(swept(rows, "size"), "b"))
        + ", by data "
        + ", ".join(f"{x:.2f}" for x in column(swept(rows, "data"), "b"))
    ),
    parts={
        "gold falls while the proxy rises": lambda rows: all(
            mid(row["last gold"]) < mid(row["highest gold"]) < mid(row["last proxy"]) for row in swept(rows, "size")
        ),
        "RL's form predicts better than a line": lambda rows: all(
            row["error beyond, form"] < row["error beyond, line"] for row in swept(rows, "size") + swept(rows, "data")
        ),
        "b falls with size": lambda rows: falls(column(swept(rows, "size"), "b")),
        "b falls with data": lambda rows: falls(column(swept(rows, "data"), "b")),
        "KL penalties move along one curve": lambda rows: all(
            each["low"] <= 0 <= each["high"]
            for row in swept(rows, "KL coefficient")
            if (each := row["gold at the same d, less the usual"])
        ),
    },
    note="The gold reward is a formula, not a larger model; proxies have up to 64 numbers a token.",
    figure="size.png",
)

WAY, BASELINE = "way to the optimum, %", "REINFORCE, moving average"
COMPARED = ("RLOO k=4", "RLOO k=2", "RAFT k=4", "RAFT k=2", BASELINE, "REINFORCE", "PPO")


def beats(rows: Rows, better: str, worse: str) -> bool:
    """Whether one estimator has come further than the other on every task, by the means."""
    tasks = {row["task"] for row in rows}
    return all(
        column(rows, WAY, task=task, estimator=better) > column(rows, WAY, task=task, estimator=worse) for task in tasks
    )


def keeps_more(rows: Rows, better: str, worse: str, without: str, under: str) -> bool:
    """Whether on every task one estimator keeps more than the other of what it reaches without something, under it."""

    def share(task: str, estimator: str) -> float:
        return mid(cell(rows, under, task=task, estimator=estimator)) / mid(
            cell(rows, without, task=task, estimator=estimator)
        )

    return all(share(task, better) > share(task, worse) for task in {row["task"] for row in rows})


COMPARISON = Claim(
    recipe="compare_estimators",
    claim="At equal samples RLOO does better than RAFT, that than REINFORCE with a baseline, and that than without one",
    source="Ahmadian 2024, table 1",
    published=(
        "win rates on TL;DR: RLOO k=4 77.9 %†, k=2 74.2†, RAFT k=4 73.2†, k=2 72.1†, REINFORCE with a baseline 70.7†, "
        "without 70.4†, PPO 67.6†; RLOO withstands noise and a high price of the KL better than RAFT†"
    ),
    measured=lambda rows: "; ".join(
        f"{task}: "
        + ", ".join(
            f"{'REINFORCE with a moving average' if name == BASELINE else name} "
            f"{show(rows, WAY, task=task, estimator=name)}"
            for name in COMPARED
        )
        + " % of the way to the optimum"
        for task in dict.fromkeys(row["task"] for row in rows)
    ),
    parts={
        "RLOO over RAFT": lambda rows: beats(rows, "RLOO k=4", "RAFT k=4"),
        "RAFT over REINFORCE with a baseline": lambda rows: beats(rows, "RAFT k=4", BASELINE),
        "a baseline over none": lambda rows: beats(rows, BASELINE, "REINFORCE"),
        "RLOO k=4 over k=2": lambda rows: beats(rows, "RLOO k=4", "RLOO k=2"),
        "RAFT k=4 over k=2": lambda rows: beats(rows, "RAFT k=4", "RAFT k=2"),
        "RAFT keeps a smaller share under noise": lambda rows: keeps_more(
            rows, "RLOO k=4", "RAFT k=4", "noise 0", "noise 3"
        ),
        "RAFT keeps a smaller share at a higher price": lambda rows: keeps_more(
            rows, "RLOO k=4", "RAFT k=4", "kl coefficient 0.1", "kl coefficient 1"
        ),
    },
    note=(
        "Walks through a graph, and a bandit, whose optimum is known, with a reward that is off by noise and, as a "
        "learned one may be, by a large number of each prompt, without which REINFORCE is level with RLOO. The parts "
        "go by means alone, and by k=4 where none is named: RAFT k=2 is not always ahead of REINFORCE with a baseline. "
        "PPO, which was last in what was published and is not here, is in none of them."
    ),
    figure="walks.png",
)

VERIFIABLE = Claim(
    recipe="verifiable",
    claim="RL from right answers alone raises accuracy",
    source="DeepSeek-AI 2025, R1-Zero; TinyZero",
    published="R1-Zero's accuracy on AIME 2024 rises from 15.6 to 71.0 %†",
    measured=lambda rows: (
        f"right answers rise from {show(rows, 'accuracy', 100, policy='before RL')} % to "
        f"{show(rows, 'accuracy', 100, policy='rloo', seed='all')} % by RLOO and "
        f"{show(rows, 'accuracy', 100, policy='grpo', seed='all')} % by GRPO; of the likeliest tokens from "
        f"{show(rows, 'greedy accuracy', 100, policy='before RL')} % to "
        f"{show(rows, 'greedy accuracy', 100, policy='rloo', seed='all')} %"
    ),
    parts={
        "sampled answers are right more often": lambda rows: beyond(
            cell(rows, "accuracy", policy="rloo", seed="all"), cell(rows, "accuracy", policy="before RL")
        ),
    },
    note=(
        "Sums of two numbers and a policy of 110 thousand parameters, pretrained on an unreliable teacher's answers. "
        "Its likeliest tokens were right before: RL takes the noise out of the samples. Nothing in it shows reasoning."
    ),
    figure="verifiable.png",
)

WRONG = "length of wrong"

VERIFIABLE_LENGTH = Claim(
    recipe="verifiable",
    claim="In training on samples, too, GRPO's wrong completions are longer than Dr. GRPO's",
    source="Liu 2025",
    published="GRPO lengthens wrong completions, Dr. GRPO does not; both are as accurate†",
    measured=lambda rows: (
        f"wrong completions have {show(rows, WRONG, policy='before RL')} tokens before, "
        f"{show(rows, WRONG, policy='grpo', seed='all')} after GRPO and "
        f"{show(rows, WRONG, policy='dr_grpo', seed='all')} after Dr. GRPO; right answers "
        f"{show(rows, 'accuracy', 100, policy='grpo', seed='all')} and "
        f"{show(rows, 'accuracy', 100, policy='dr_grpo', seed='all')} %"
    ),
    parts={
        "GRPO's wrong ones are longer than Dr. GRPO's": lambda rows: (
            column(rows, WRONG, policy="grpo", seed="all") > column(rows, WRONG, policy="dr_grpo", seed="all")
        ),
        "Dr. GRPO's grow no longer": lambda rows: (
            column(rows, WRONG, policy="dr_grpo", seed="all") <= column(rows, WRONG, policy="before RL")
        ),
        "equal accuracy": lambda rows: overlap(
            *(cell(rows, "accuracy", policy=name, seed="all") for name in ("grpo", "dr_grpo"))
        ),
    },
    note="Means over three seeds. GRPO is without its KL.",
    figure="verifiable.png",
)


def overlap(one: Row, other: Row) -> bool:
    """Whether two intervals do."""
    return not beyond(one, other) and not beyond(other, one)


FIT, NEAR_PERSON, NEAR_PASSAGE = "fit, nats", "nearness to the person's", "nearness to the passage's"


def wins(rows: Rows, judge: str) -> bool:
    """Whether the tuned policy wins most pairs with the one before RL, by a judge."""
    return above(rows, "after", 0.5, measure=f"wins by {judge}")


def won(rows: Rows, judge: str) -> str:
    """How many, in per cent."""
    return show(rows, "after", 100, measure=f"wins by {judge}")


def moved(rows: Rows, measure: str) -> str:
    """A measure before and after, as text."""
    return f"{measure} from {show(rows, 'before', measure=measure)} to {show(rows, 'after', measure=measure)}"


def rises(rows: Rows, measure: str) -> bool:
    """Whether a measure is higher after than before, beyond both intervals."""
    return beyond(cell(rows, "after", measure=measure), cell(rows, "before", measure=measure))


DIALOGUE = Claim(
    recipe="dialogue",
    claim="RL makes a chat model's replies more relevant and more interesting, and hacks a reward that lacks a part",
    source="an application, whose reward has the parts that See 2019 varies",
    published="",
    measured=lambda rows: (
        f"{moved(rows, 'relevance')}, {moved(rows, 'specificity')}; "
        f"of pairs it wins {won(rows, 'the reward')} % by the reward, {won(rows, FIT)} % by how much likelier the "
        f"message makes the reply, {won(rows, NEAR_PERSON)} % by nearness to what the person replied; "
        f"KL {show(rows, 'after', measure='KL, nats')} nats"
    ),
    parts={
        "more relevant": lambda rows: rises(rows, "relevance"),
        "more specific": lambda rows: rises(rows, "specificity"),
        "fitting their message better": lambda rows: wins(rows, FIT),
        "nearer to a person's": lambda rows: wins(rows, NEAR_PERSON),
        "copied where originality is not rewarded": lambda rows: beyond(
            *(cell(rows, name, measure="originality") for name in ("before", "without originality"))
        ),
    },
    note="SmolLM2-135M-Instruct with adapters, messages that people sent one another, one run.",
    figure="policies.png",
)

STORY = Claim(
    recipe="story",
    claim="RL makes a model's continuations more coherent, and gives them a tone",
    source="an application",
    published="",
    measured=lambda rows: (
        f"{moved(rows, 'coherence')}, {moved(rows, 'tone')}; "
        f"of pairs it wins {won(rows, 'the reward')} % by the reward, {won(rows, FIT)} % by how much likelier the "
        f"opening makes the continuation, {won(rows, NEAR_PASSAGE)} % by nearness to the passage's own; "
        f"KL {show(rows, 'after', measure='KL, nats')} nats"
    ),
    parts={
        "more coherent": lambda rows: rises(rows, "coherence"),
        "nearer to the tone": lambda rows: rises(rows, "tone"),
        "fitting their opening better": lambda rows: wins(rows, FIT),
        "nearer to the passage's own": lambda rows: wins(rows, NEAR_PASSAGE),
    },
    note="A policy pretrained on the corpus whose passages it continues, one run.",
    figure="policies.png",
)
