"""What people said of movie reviews, a reward model that learns it, and a policy that continues reviews to please.

    python experiments/recipes/human_preferences.py
    python experiments/recipes/human_preferences.py --sdist vaderSentiment-3.3.2.tar.gz

Two cores of an Intel Xeon, JAX 0.10.2: 32 minutes of processor time.

Of 10,603 snippets of movie reviews, each with the ratings of 15 to 29 people, 1,060 are held out. Neither pretraining,
which has the others and 13,000 rated product reviews, tweets and sentences of news, all without ratings, nor a reward
model sees them. One policy of 1.13 million parameters is pretrained (held-out perplexity 113). Each of three seeds
learns a reward model from the mean ratings of the other 9,543 snippets, tokens dropped at random; the policy continues
the first words of held-out snippets, and RLOO with a KL penalty optimises that reward. It is compared with the
pretrained policy on 256 held-out snippets whose openings RL did not have, four completions each. A further reward
model of each seed learns from 14,400 pairs of snippets with one vote each: one rating of either, ties included.

Rewards: how many of the pairs of held-out snippets whose mean ratings are more than 0.5 apart are in the raters' order,
in %, with 95 % intervals over snippets. On another split 68.7 was found for VADER and 80.6 for ridge regression.

| reward                             | in order   | by seed          | lead over ridge | correlation |
|------------------------------------|------------|------------------|-----------------|-------------|
| VADER's lexicon                    | 67.4 ± 2.1 |                  | -12.1 ± 2.5     | 0.42        |
| ridge on TF-IDF, mean ratings      | 79.5 ± 1.6 |                  |                 | 0.69        |
| Transformer, mean ratings          | 77.0 ± 1.6 | 77.5, 76.4, 77.3 | -2.5 ± 1.2      | 0.65        |
| sum of these three                 | 77.9 ± 1.6 |                  | -1.6 ± 1.2      | 0.67        |
| Transformer, single votes          |            | 74.2, 74.4, 74.0 | -5.3, -5.1, -5.5 | 0.59       |
| sum of the three and ridge         | 80.1 ± 1.5 |                  | 0.6 ± 0.7       | 0.71        |
| one rater, for the others' mean    | 88.9       |                  |                 |             |

The Transformer does not reach ridge regression: it stays 2.5 points below, 1.6 as the sum of three, and adds to it no
more than chance could. Single votes, whose noise is the raters' own, cost another 2.8 at equal updates; the odds that
come of them are calibrated (ECE 0.033, 0.022 and 0.024). With a single rater the rewards agree in 73.2 % (mean ratings)
of pairs, ridge in 75.8 %. Equal ratings of one rater count half; without them a rater is right more often.

The policy: win rates over the pretrained one in %, 95 % intervals over prompts. Published (Ziegler 2019, from secondary
notes): with 5,000 labels people prefer the tuned policy in 86 %. VADER has learned from none of these ratings. The
first ridge regression has learned from those alone that no reward model has seen: of held-out snippets and of the other
texts (it has 73.7 ± 1.4 % of the pairs of training snippets in order). The second shares the reward model's data.

| judge                | seed 0     | seed 1     | seed 2     | all        |
|----------------------|------------|------------|------------|------------|
| the reward model     | 97.3 ± 0.8 | 95.2 ± 1.1 | 95.8 ± 1.0 | 96.1 ± 0.6 |
| VADER                | 89.5 ± 1.5 | 89.5 ± 1.6 | 90.0 ± 1.5 | 89.7 ± 0.9 |
| ridge, other ratings | 92.0 ± 1.3 | 92.1 ± 1.4 | 91.1 ± 1.5 | 91.8 ± 0.8 |
| ridge, same ratings  | 96.8 ± 0.8 | 95.1 ± 1.2 | 95.7 ± 1.0 | 95.9 ± 0.6 |

The price is 11.3, 10.5 and 11.1 nats a completion, and variety: distinct-2 falls from 0.62 to 0.27, 0.31 and 0.26,
with "touching, funny and funny and touching." No judge here minds that; people would.

Chosen on 1,050 of the training snippets, where ridge has 81.2 %, in single trials of 600 updates: mean ratings (79.0 %)
over pairs with the share of all raters as labels (77.9 %), and dropping a quarter of the tokens (without it and after
450 updates, 78.6 %). Ratings of the other collections as well brought ridge regression nothing.
"""

import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.compare import Comparing
from experiments.complete import Sampled, complete, in_blocks
from experiments.human_ratings import GAP
from experiments.judge import make_judge
from experiments.judgements import Judgements, votes_of
from experiments.options import EstimatorOptions
from experiments.pretrain import Pretraining, Text, check_counts, model_config, pretrain
from experiments.pretrain import check as check_pretraining
from experiments.recipes.human_preferences_data import (
    Data,
    Seen,
    held_out_pairs,
    load_data,
    make_prompts,
    make_ratings,
    make_text,
    make_votes,
    rated_snippets,
)
from experiments.recipes.human_preferences_figures import draw_policy, draw_reward_model
from experiments.recipes.ridge import fit_ridge, order_lead, order_share, rate_whole, ridge_ratings
from experiments.reinforce import reinforce
from experiments.reinforcing import Prompts, Reinforcing, make_sampling
from experiments.reinforcing import check as check_reinforcing
from experiments.train_reward import Learning, train_reward
from experiments.train_reward import check as check_learning
from experiments.vader_ratings import Rated, mean_ratings
from rl_jax.data.prompts import decode_completions
from rl_jax.errors import InputError
from rl_jax.evaluation import Estimate, distinct_n, mean_interval, share_interval, win_shares
from rl_jax.keys import Purpose, step_key
from rl_jax.models.huggingface import Policy, save_policy
from rl_jax.models.reward_model import RewardModel, candidates_rollout, save_reward_model
from rl_jax.preferences.diagnostics import pair_diagnostics
from rl_jax.rewards.compose import Reward, RewardConfig, make_reward
from rl_jax.rewards.text import sentiment
from rl_jax.run.folder import write_json
from rl_jax.run.loop import run_main
from rl_jax.run.metrics import MetricsWriter, open_metrics
from rl_jax.run.run_files import read_metrics
from rl_jax.run.tables import open_results, write_table

RIVAL, LEARNED = "ridge on TF-IDF", "reward model"
RATER, POOLED, SUMMED = "one rater, beside the others", "mean over seeds", "sum over seeds"
# Judges: of ratings that the reward model never saw, or saw.
OTHER, SAME = "ridge, other ratings", "ridge, same ratings"
Judges = Mapping[str, Reward]
RATINGS, VOTES = "mean ratings", "single votes"  # what a reward model learns from
NORMALIZING = 256  # prompts that the reference policy completes to normalise the reward, twice each
BLOCK = 128  # snippets that are scored at once
GAPS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)  # of mean ratings, the ends of ranges
EXAMPLES = 12  # prompts whose completions are written to examples.md


@dataclasses.dataclass(frozen=True)
class Config:
    """A reward from what people said of snippets of movie reviews, and a policy that continues them to please."""

    sdist: Path | None = None
    """A copy of the source distribution of vaderSentiment 3.3.2; without one, pip downloads it."""
    seeds: int = 3
    """Runs, each with a reward model and a tuned policy of its own, with the seeds from 0, after one pretraining."""
    vote_seeds: int = 3
    """So many of them also learn a reward model from pairs of snippets, each judged by a single rating of either."""
    held_out_pairs: int = 2_000
    """Pairs of held-out snippets behind calibration and agreement with raters; orders are measured on all there are."""
    seen: Seen = Seen()
    penalty: float = 0.5
    """Of the ridge regression that the reward model is compared with."""
    pretrain: Pretraining = Pretraining(
        vocab_size=4096, context=96, layers=3, steps=1000, batch_size=24, evaluate_every=250, checkpoint_every=1000
    )
    learn: Learning = Learning(steps=450, batch_size=64, learning_rate=1e-3, evaluate_every=225, checkpoint_every=450)
    reinforce: Reinforcing = Reinforcing(
        prompt_length=8,
        completion_length=40,
        steps=60,
        learning_rate=5e-4,
        options=EstimatorOptions(kl_coefficient=0.1),
        checkpoint_every=60,
        compare=Comparing(prompts=256, completions=4),
    )
    results: Path = Path("results/human_preferences")
    """Folder that tables, figures, examples, policies and reward models are written to."""


class Run(NamedTuple):
    """What came of one seed.

    Attributes:
        rewards: of the held-out snippets by the reward model. [M'].
        metrics: of RL, a row for each step.
        before: completions of the pretrained policy.
        after: of the tuned one.
    """

    rewards: np.ndarray
    metrics: Sequence[dict[str, Any]]
    before: Sampled
    after: Sampled


def score_snippets(reward: Reward, tokenizer: Any, rated: Sequence[Rated]) -> np.ndarray:
    """A reward of each snippet as a whole. [M]."""
    rows, judge = rated_snippets(tokenizer, rated), make_judge(reward, tokenizer)
    return in_blocks(lambda _, part: judge(candidates_rollout(part)), rows, BLOCK, "held-out snippets")


def votes_at_once(learn: Learning) -> int:
    """Pairs in an update: as many snippets as it has of them."""
    return learn.batch_size // 2


def learned_reward(
    config: Config, policy: Policy, judged: Judgements, prompts: Prompts, seed: int, run: Path, writer: MetricsWriter
) -> tuple[RewardModel, dict[str, Any]]:
    """A reward model, normalised on completions of the pretrained policy; and what is measured of it."""
    sampling = dataclasses.replace(make_sampling(config.reinforce, policy.ends), group_size=2)
    some, mask = (part[:NORMALIZING] for part in prompts.train)
    reference = complete(
        policy, None, (some, mask), {}, sampling, step_key(seed, Purpose.REFERENCE), "reference"
    ).rollout
    pairs = judged.train.labels.shape[1] == 2
    learn = dataclasses.replace(config.learn, batch_size=votes_at_once(config.learn)) if pairs else config.learn
    return train_reward(learn, policy, judged, reference, seed, run, writer, "votes" if pairs else "ratings")


def learn_and_tune(config: Config, data: Data, policy: Policy, prompts: Prompts, judges: Judges, seed: int) -> Run:
    """Learn a reward from ratings, optimise it, and let the judges compare."""
    tokenizer, rl, folder = policy.tokenizer, config.reinforce, config.results / f"seed_{seed}"
    with tempfile.TemporaryDirectory() as name:
        run, judged = Path(name), make_ratings(data, tokenizer, config.seen, seed)
        with closing(open_metrics(run)) as writer:
            model, _ = learned_reward(config, policy, judged, prompts, seed, run, writer)
            reward = make_reward(RewardConfig(("learned",)), tokenizer, model)
            tuned = reinforce(rl, policy, reward, prompts, seed, run, writer, judges["VADER"])
        stages, _ = read_metrics(run / "metrics.jsonl")
    save_policy(folder / "policy", tuned)
    save_reward_model(folder / "reward", model)
    asked = {name: make_judge(judge, tokenizer) for name, judge in ({LEARNED: reward} | dict(judges)).items()}
    sampling = make_sampling(rl, policy.ends)
    sampling = dataclasses.replace(sampling, group_size=rl.compare.completions)
    before, after = (
        complete(each, policy, prompts.held_out, asked, sampling, step_key(seed, Purpose.EVALUATE, number), stage)
        for number, (stage, each) in enumerate({"complete before": policy, "complete after": tuned}.items())
    )
    return Run(score_snippets(reward, tokenizer, data.held_out), stages["rl"], before, after)


def learn_votes(
    config: Config, data: Data, policy: Policy, prompts: Prompts, seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Learn a reward from single votes: its rewards of the held-out snippets [M'], and what is measured of it."""
    count, kept = config.learn.steps * votes_at_once(config.learn), held_out_pairs(data, config.held_out_pairs)
    judged = make_votes(data, policy.tokenizer, config.seen, count, kept, seed)
    with tempfile.TemporaryDirectory() as name, closing(open_metrics(name)) as writer:
        model, found = learned_reward(config, policy, judged, prompts, seed, Path(name), writer)
    reward = make_reward(RewardConfig(("learned",)), policy.tokenizer, model)
    return score_snippets(reward, policy.tokenizer, data.held_out), found


def reward_rows(config: Config, data: Data, rewards: Mapping[tuple[str, str], np.ndarray]) -> list[dict[str, Any]]:
    """The table of rewards: how each orders the held-out snippets, beside people's ratings.

    Rewards are by name and seed, the rival's among them: [M'], or [R, M'] for the mean of models.
    """
    ratings, rival = mean_ratings(data.held_out), rewards[RIVAL, ""]
    judged = held_out_pairs(data, config.held_out_pairs)
    place = {each.text: number for number, each in enumerate(data.held_out)}
    pairs = np.array([[place[text] for text in pair.completions] for pair in judged])
    labels, votes = np.array([pair.labels for pair in judged]), votes_of(judged)
    rows: list[dict[str, Any]] = []
    for (name, seed), each in rewards.items():
        every = np.atleast_2d(each)
        found = [pair_diagnostics(one[pairs], labels, raters=votes) for one in every]
        rows.append(
            {
                "reward": name,
                "seed": seed,
                f"pairs over {GAP} apart": order_share(each, ratings, GAP),
                "all pairs": order_share(each, ratings, 0.0),
                f"lead over {RIVAL}": None if each is rival else order_lead(each, rival, ratings, GAP),
                "correlation": float(np.mean([np.corrcoef(one, ratings)[0, 1] for one in every])),
                "agreement with a rater": float(np.mean([one["agreement_with_raters"] for one in found])),
            }
        )
    human = {f"pairs over {GAP} apart": one_rater(data, GAP), "all pairs": one_rater(data, 0.0)}
    rows.append({"reward": RATER, "seed": ""} | human)
    return rows


def by_gap(rewards: np.ndarray, ratings: np.ndarray) -> list[tuple[float, Estimate]]:
    """The share of pairs in order, of ranges of the gap between their ratings, each with its middle."""
    ranges = itertools.pairwise(GAPS)
    return [((low + high) / 2, order_share(rewards, ratings, low, high)) for low, high in ranges]


def one_rater(data: Data, gap: float) -> float:
    """How often one rating of each text orders pairs as the means of their other ratings do; equal ones count half."""
    fewest = min(len(each.ratings) for each in data.held_out)
    shares = []
    for column in range(fewest):
        own = np.array([each.ratings[column] for each in data.held_out], float)
        rest = np.array([np.mean(np.delete(each.ratings, column)) for each in data.held_out])
        shares.append(order_share(own, rest, gap).value)
    return float(np.mean(shares))


def policy_rows(runs: Sequence[Run], judges: Sequence[str]) -> list[dict[str, Any]]:
    """The table of policies: what each judge says of the tuned one's completions, beside the pretrained one's."""
    rows = []
    for seed, run in enumerate(runs):
        sides = {"before": run.before, "after": run.after}
        line: dict[str, Any] = {"seed": str(seed), "KL, nats": mean_interval(np.asarray(run.after.kl))}
        for name in judges:
            before, after = run.before.rewards[name], run.after.rewards[name]
            line[f"wins by {name}"] = share_interval(win_shares(after, before))
        line |= {f"VADER {side}": mean_interval(sampled.rewards["VADER"]) for side, sampled in sides.items()}
        for side, sampled in sides.items():
            lengths = sampled.rollout.completion_mask.sum(axis=1)
            tokens = [ids[:n].tolist() for ids, n in zip(sampled.rollout.completions, lengths, strict=True)]
            line |= {f"length {side}": float(lengths.mean()), f"distinct-2 {side}": distinct_n(tokens, 2)}
            line[f"truncated {side}"] = float(sampled.rollout.truncated.mean())
        rows.append(line)
    pooled: dict[str, Any] = {"seed": "all"}
    for name in judges:
        wins = [win_shares(run.after.rewards[name], run.before.rewards[name]) for run in runs]
        pooled[f"wins by {name}"] = share_interval(np.concatenate(wins, axis=1))
    return [*rows, pooled]


def write_examples(folder: Path, runs: Sequence[Run], prompts: list[str], judges: Sequence[str]) -> None:
    """The first completion of each of the first prompts, before and after, and what the judges say of it."""
    lines = ["# The first completions of the first prompts of the comparison\n"]
    for number, prompt in enumerate(prompts[:EXAMPLES]):
        lines.append(f"## {prompt.strip()} …\n")
        for seed, run in enumerate(runs):
            for side, sampled in {"before": run.before, "after": run.after}.items():
                said = ", ".join(f"{name} {sampled.rewards[name][number, 0]:.2f}" for name in judges)
                group = sampled.rewards[judges[0]].shape[1]
                lines.append(f"- seed {seed}, {side}: …{sampled.texts[number * group]} ({said})")
        lines.append("")
    (folder / "examples.md").write_text("\n".join(lines), "utf-8")


def check(config: Config, data: Data, text: Text) -> None:
    """Raise InputError for settings that cannot work, before anything is trained."""
    check_counts({"seeds": config.seeds, "held_out_pairs": config.held_out_pairs, "copies": config.seen.copies})
    if config.learn.curve_shares:
        raise InputError("A learning curve is more than this recipe has room for: leave learn.curve_shares out.")
    if not 0 < config.penalty < math.inf:
        raise InputError(f"penalty is {config.penalty}; it must be a number above 0.")
    if not 2 <= config.seen.longest <= config.pretrain.context:
        raise InputError(
            f"longest is {config.seen.longest}; it must be from 2 to the context of {config.pretrain.context} tokens."
        )
    if not 0 <= config.seen.dropped <= 0.5:
        raise InputError(f"dropped is {config.seen.dropped}; it must be from 0 to 0.5.")
    if not 0 <= config.vote_seeds <= config.seeds:
        raise InputError(f"vote_seeds is {config.vote_seeds}; it must be from 0 to seeds, {config.seeds}.")
    check_pretraining(config.pretrain, text, seed=0)
    model, tokenizer = model_config(config.pretrain), text.tokenizer
    check_learning(config.learn, model, "ratings", len(data.train) * config.seen.copies, seed=0)
    prompts = make_prompts(config.reinforce, tokenizer, text.held_out)
    check_reinforcing(config.reinforce, model, make_reward(RewardConfig(), tokenizer), prompts, tokenizer, seed=0)


def main(config: Config) -> None:
    start, data = time.perf_counter(), load_data(config.sdist)
    text = make_text(data, config.pretrain.vocab_size)
    check(config, data, text)
    folder, ratings = open_results(config.results), {name: mean_ratings(part) for name, part in data._asdict().items()}
    texts = {name: [each.text for each in part] for name, part in data._asdict().items()}
    rival = fit_ridge(texts["train"], ratings["train"], config.penalty)
    unseen = texts["held_out"] + texts["others"], np.concatenate([ratings["held_out"], ratings["others"]])
    other = fit_ridge(*unseen, config.penalty)
    judges = {
        "VADER": Reward("VADER", None, sentiment),
        OTHER: Reward(OTHER, None, rate_whole(other)),
        SAME: Reward(SAME, None, rate_whole(rival)),
    }
    with tempfile.TemporaryDirectory() as name, closing(open_metrics(name)) as writer:
        policy, pretrained = pretrain(config.pretrain, text, 0, Path(name), writer)
    save_policy(folder / "pretrained", policy)
    prompts = make_prompts(config.reinforce, text.tokenizer, text.held_out)
    runs = [learn_and_tune(config, data, policy, prompts, judges, seed) for seed in range(config.seeds)]
    votes = [learn_votes(config, data, policy, prompts, seed) for seed in range(config.vote_seeds)]

    rewards = {
        ("VADER", ""): np.array([sentiment("", text) for text in texts["held_out"]]),
        (RIVAL, ""): ridge_ratings(rival, texts["held_out"]),
    }
    plain, models = dict(rewards), np.stack([run.rewards for run in runs])
    rewards |= {(f"Transformer, {RATINGS}", str(seed)): each for seed, each in enumerate(models)}
    rewards[f"Transformer, {RATINGS}", POOLED] = models
    rewards[f"Transformer, {RATINGS}", SUMMED] = models.mean(axis=0)
    rewards |= {(f"Transformer, {VOTES}", str(seed)): each for seed, (each, _) in enumerate(votes)}
    both = [x / x.std() for x in (models.mean(axis=0), rewards[RIVAL, ""])]
    rewards[f"Transformer + {RIVAL}", SUMMED] = both[0] + both[1]
    rewarded, tuned = reward_rows(config, data, rewards), policy_rows(runs, [LEARNED, *judges])
    some = slice(None, None, 5)  # all pairs of all would not fit the memory
    judged = order_share(ridge_ratings(other, texts["train"][some]), ratings["train"][some], GAP)
    rewarded.append({"reward": f"{OTHER}, of snippets to learn from", "seed": "", f"pairs over {GAP} apart": judged})
    best = {f"Transformer, {RATINGS}": models} | {name: each for (name, _), each in plain.items()}
    gaps = {name: by_gap(each, ratings["held_out"]) for name, each in best.items()}
    draw_reward_model(folder / "reward_model.png", rewarded, gaps, [found["reliability"] for _, found in votes])
    rl = [run.metrics for run in runs]
    draw_policy(folder / "policy.png", rl, tuned)
    write_examples(folder, runs, decode_completions(text.tokenizer, *prompts.held_out), [LEARNED, *judges])
    summary = {"pretrained": pretrained, "single votes": [found for _, found in votes], "by gap": gaps, "rl": rl}
    write_json(folder / "found.json", summary)
    settings = dataclasses.asdict(config) | {"seconds": time.perf_counter() - start}
    write_table(folder / "reward_model", rewarded, settings)
    write_table(folder, tuned, settings)


if __name__ == "__main__":
    run_main(main, Config)
