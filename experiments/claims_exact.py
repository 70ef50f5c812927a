"""Claims about what can be counted: policies so small that gradients, rewards and divergences are exact."""

from collections.abc import Sequence

from experiments.claims import Claim, Row, Rows, above, beyond, cell, column, falls, find, holds, mid, show

BASELINES = ("reinforce_moving_average", "reinforce_value", "rloo")
UNBIASED = ("reinforce", *BASELINES, "reinforce_to_go", "remax", "importance_token", "importance_sequence")


def of(rows: Rows, name: str, estimators: Sequence[str]) -> list[float]:
    """The numbers of a column for these estimators."""
    return [column(rows, name, estimator=each)[0] for each in estimators]


THEOREM = Claim(
    recipe="policy_gradient_theorem",
    claim="The score-function gradient is unbiased, with any baseline that does not see its completion",
    source="Williams 1992; Sutton 2000, theorem 1; Kool 2019",
    published="no bias; the error of the mean of N estimates falls as N^(-1/2); baselines take variance away",
    measured=lambda rows: (
        f"summed over every group, the largest bias of {len(UNBIASED)} estimators is "
        f"{max(map(abs, of(rows, 'bias along, %', UNBIASED) + of(rows, 'across, %', UNBIASED))):.3f} %; "
        f"slopes of the error from {min(of(rows, 'error slope', UNBIASED))} to "
        f"{max(of(rows, 'error slope', UNBIASED))}; variance {show(rows, 'variance', estimator='reinforce')} without "
        f"a baseline, {show(rows, 'variance', estimator='rloo')} leaving one out, "
        f"{show(rows, 'variance', estimator='reinforce_value')} with a critic"
    ),
    parts={
        "no bias": lambda rows: all(
            abs(x) < 0.002 for name in ("bias along, %", "across, %") for x in of(rows, name, UNBIASED)
        ),
        "the error's slope is -1/2": lambda rows: all(abs(x + 0.5) < 0.05 for x in of(rows, "error slope", UNBIASED)),
        "baselines lower the variance": lambda rows: (
            max(of(rows, "variance", BASELINES)) < of(rows, "variance", ("reinforce",))[0]
        ),
    },
    note=(
        "A tabular policy over 3 tokens and 15 completions, so that the mean of an estimator is a sum and not a sample."
    ),
    figure="error.png",
)


def counted(rows: Rows, name: str) -> list[float]:
    """A column in the rows of groups, of two and more, that are all counted."""
    return [mid(row[name]) for row in rows if row["G"] > 1 and row["groups"].startswith("every")]


def by_family(rows: Rows, name: str) -> list[list[float]]:
    """A column over the size of the group, from one completion, for each family of problems."""
    families = dict.fromkeys(row["completions there are"] for row in rows)
    return [column(rows, name, **{"completions there are": family}) for family in families]


LEAVE_ONE_OUT = Claim(
    recipe="leave_one_out",
    claim="Leaving one out of the group's mean is an unbiased baseline, and the better the larger the group",
    source="Kool 2019; Ahmadian 2024, section 2.3",
    published=(
        "A = G / (G - 1) (r - group mean), unbiased; less variance than without a baseline, the less the larger G"
    ),
    measured=lambda rows: (
        f"where every group is counted, {max(counted(rows, 'furthest off, %')):.3f} % off at most; variance of equally "
        "many completions, in multiples of that with the exact value as the baseline: "
        + "; ".join(
            f"{none:.3g} without a baseline, {two:.3g} in groups of 2 and {most:.3g} of {max(column(rows, 'G'))}, "
            f"where there are {there} completions"
            for there, (none, two, *_, most) in zip(
                dict.fromkeys(column(rows, "completions there are")), by_family(rows, "equal completions"), strict=True
            )
        )
    ),
    parts={
        "no bias": lambda rows: max(counted(rows, "furthest off, %")) < 0.01,
        "the group's mean takes 1/G": lambda rows: all(
            abs(x - y) < 1e-3 for x, y in zip(counted(rows, "group mean, along"), counted(rows, "(G-1)/G"), strict=True)
        ),
        "less variance than without a baseline": lambda rows: all(
            max(family[1:]) < family[0] for family in by_family(rows, "equal completions")
        ),
        "less variance in larger groups": lambda rows: all(
            falls(family[1:]) for family in by_family(rows, "equal completions")
        ),
    },
    note=(
        "At equal completions of one prompt; the table also tells of updates in which larger groups leave fewer "
        "prompts."
    ),
    figure="leave_one_out.png",
)

LIKELY, COIN = "10,000 outcomes, as likely", "a fair coin"

BEST_OF_N = Claim(
    recipe="best_of_n",
    claim="The KL of the best of n is at most log n - (n - 1)/n",
    source="Beirami 2024, arXiv 2401.01879",
    published=(
        "at most 0.636, 1.835, 3.175, 4.549 nats at n = 4, 16, 64, 256: near where no outcome is likely, far where "
        "the best one is; win rate at most n/(n + 1)"
    ),
    measured=lambda rows: (
        ", ".join(f"{x:.3f}" for x in column(rows, "KL, nats", task=LIKELY)[1:])
        + " nats with 10,000 outcomes; of completions of a random policy "
        f"{100 * min(column(rows, 'KL / bound', task='sequences')):.0f} % of the bound or more; of a fair coin "
        f"{100 * column(rows, 'KL / bound', task=COIN)[-1]:.0f} % at the largest n"
    ),
    parts={
        "the bound holds": lambda rows: max(column(rows, "KL / bound")) <= 1 + 1e-9,
        "near where no outcome is likely": lambda rows: min(column(rows, "KL / bound", task=LIKELY)) > 0.999,
        "far where the best one is": lambda rows: column(rows, "KL / bound", task=COIN)[-1] < 0.5,
        "the win rate's bound holds": lambda rows: all(row["win rate"] <= row["n / (n+1)"] + 1e-9 for row in rows),
    },
    note="In closed form, in float64, of outcomes that are all counted.",
    figure="best_of_n.png",
)


def at_a_price(rows: Rows) -> list[Row]:
    """The policies trained at each KL coefficient, from the highest."""
    return [row for row in find(rows, policy="RLOO") if row["beta"]]


FRONTIER = Claim(
    recipe="frontier",
    claim="Policies tuned at several prices of the KL lie along a concave frontier",
    source="Ziegler 2019, figure 3",
    published=(
        "reward over KL is concave, and tuned policies come near the optimum, pi_ref exp(r / beta) up to a factor"
    ),
    measured=lambda rows: (
        f"over KLs from {min(column(at_a_price(rows), 'KL, nats')):.2g} to "
        f"{max(column(at_a_price(rows), 'KL, nats')):.2g} nats RLOO lacks at most "
        f"{max(column(at_a_price(rows), 'gap, %')):.2g} % of what the frontier gains at the same KL"
    ),
    parts={
        "none above the frontier": lambda rows: all(
            mid(row["reward"]) <= row["most at that KL"] + 1e-6 for row in rows
        ),
        "within 5 % of it": lambda rows: max(column(at_a_price(rows), "gap, %")) < 5,
        "concave": lambda rows: falls([row["slope from the last"] for row in at_a_price(rows)[1:]]),
    },
    note=(
        "A tabular policy whose reward and KL are exact, and the count of positive and negative tokens as mock "
        "sentiment."
    ),
    figure="frontier.png",
)


def steered(rows: Rows) -> list[Row]:
    """The runs whose coefficient was steered."""
    return [row for row in rows if row["coefficient"] != "fixed"]


ADAPTIVE = Claim(
    recipe="adaptive_kl",
    claim="An adaptive coefficient brings the KL to its target",
    source="Ziegler 2019, section 2.2, and OpenAI's code",
    published="the KL settles at the target of 6 nats, with a horizon of 10,000 completions",
    measured=lambda rows: (
        f"the KL at the end, from coefficients of {min(column(rows, 'start')):g} to {max(column(rows, 'start')):g}: "
        + ", ".join(
            f"{name} {min(found):.2f} to {max(found):.2f} nats"
            for name in dict.fromkeys(row["coefficient"] for row in rows)
            if (found := column(rows, "KL at the end, nats", coefficient=name))
        )
    ),
    parts={
        "within 10 % of the target from every start": lambda rows: (
            max(column(steered(rows), "furthest seed off target, %")) < 10
        ),
        "the coefficient forgets its start": lambda rows: all(
            max(found) < 1.2 * min(found)
            for name in {row["coefficient"] for row in steered(rows)}
            if (found := column(rows, "coefficient at the end", coefficient=name))
        ),
        "a fixed coefficient's KL depends on it": lambda rows: (
            max(found := column(rows, "KL at the end, nats", coefficient="fixed")) > 2 * min(found)
        ),
    },
    note="A chain of 16 tokens whose KL is exact, in place of a language model.",
    figure="adaptive_kl.png",
)

LENGTH_BIAS = Claim(
    recipe="length_bias",
    claim="Division by a completion's length makes GRPO's wrong completions longer, and no better",
    source="Liu 2025",
    published="GRPO lengthens wrong completions, Dr. GRPO does not; both are as accurate†",
    measured=lambda rows: "; ".join(
        f"where the {row['settled']} token settles it, GRPO's wrong completions end "
        f"{show([row], 'length of wrong, less dr_grpo')} tokens longer than Dr. GRPO's, by dividing by the length "
        f"alone {show(rows, 'length of wrong, less dr_grpo', settled=row['settled'], algorithm='only / length')}; its "
        f"share of right ones less Dr. GRPO's is {show([row], 'accuracy, less dr_grpo', 100)} points"
        for row in find(rows, algorithm="grpo")
    ),
    parts={
        "GRPO's wrong ones are longer than Dr. GRPO's": lambda rows: above(
            rows, "length of wrong, less dr_grpo", 0, algorithm="grpo"
        ),
        "so they are by dividing by the length alone": lambda rows: above(
            rows, "length of wrong, less dr_grpo", 0, algorithm="only / length"
        ),
        "Dr. GRPO's grow no longer": lambda rows: all(
            mid(row["length of wrong"]) <= mid(row["length of wrong, before"])
            for row in find(rows, algorithm="dr_grpo")
        ),
        "equal accuracy": lambda rows: holds(rows, "accuracy, less dr_grpo", 0, algorithm="grpo"),
    },
    note="Tabular policies of which every completion is counted, a right or a wrong token first, or last.",
    figure="settled_first.png",
)

SCORE, PATHWISE = "score function", "pathwise"

LINEAR = Claim(
    recipe="linear_policy",
    claim="REINFORCE trains a linear policy of a continuous number, and the pathwise gradient does with less noise",
    source="Williams 1992; Kingma 2014 and Heess 2015 for the pathwise gradient",
    published="",
    measured=lambda rows: (
        f"E[reward] ends at {show(rows, 'E[reward] at the end', gradient=SCORE)} by the score function and "
        f"{show(rows, 'E[reward] at the end', gradient=PATHWISE)} pathwise, of -0.25 at most, from "
        f"{show(rows, 'E[reward] at the start', gradient=SCORE)}; variance at the end "
        + " and ".join(show(rows, "variance at the end", gradient=each) for each in (SCORE, PATHWISE))
    ),
    parts={
        "both come near the optimum": lambda rows: above(rows, "E[reward] at the end", -0.35),
        "the pathwise gradient has less noise": lambda rows: beyond(
            *(cell(rows, "variance at the end", gradient=each) for each in (SCORE, PATHWISE))
        ),
    },
    note="1,000 episodes of a state of 10 numbers; the reward is -(a - 1)^2.",
    figure="learning.png",
)
