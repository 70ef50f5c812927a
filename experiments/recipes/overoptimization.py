"""Over-optimisation of learned rewards: gold and proxy reward over d = sqrt(KL), by best of n and by RL.

    python experiments/recipes/overoptimization.py

Two cores of an Intel Xeon, JAX 0.10.2: 27 minutes of processor time.

A policy of two blocks is pretrained on the corpus and completes prompts with 16 tokens. A fixed gold reward judges
pairs of completions, each once, with Bradley-Terry noise. It is a formula with random numbers, not a larger model as in
Gao 2022: what tokens and pairs of tokens are worth, up to a limit, less what broken language and loops cost
(`overoptimization_models.gold_reward`). Proxies, pretrained on the same corpus, learn the judgements and are optimised:
by the best of n = 1 to 256 samples, and by RLOO without a KL penalty. Rewards are in standard deviations on the
reference policy; the KL, nats, is log n - (n - 1) / n of the best of n, and exact of RL. R = d (a - b d) is
fitted to gold by best of n, R = d (a - b log d) to gold by RL. Each of four seeds has judgements, proxies, RL of its
own, with the same policy and gold reward; ± is half of a 95 % interval.

Published (Gao 2022, from secondary notes): the proxy climbs, gold rises and then falls; both forms hold, also where
they have not been fitted; b falls with the size and the data of the proxy; KL penalties move along one curve.

Measured, seed 0, with 4,000 pairs and width 32 where nothing else is said. Accuracy is in % of held-out pairs; highest
is the highest mean of gold in RL, at d = 2.6 to 3.3.

| proxy        | accuracy   | a, best of n | b             | gold, n = 256 | a, RL       | b           | highest     |
|--------------|------------|--------------|---------------|---------------|-------------|-------------|-------------|
| width 8      | 59.6 ± 2.4 | 0.50 ± 0.08  | 0.115 ± 0.084 | 0.54 ± 0.34   | 0.59 ± 0.20 | 0.34 ± 0.11 | 0.83 ± 0.53 |
| width 16     | 62.8 ± 2.6 | 0.61 ± 0.13  | 0.07 ± 0.11   | 0.96 ± 0.50   | 0.66 ± 0.18 | 0.34 ± 0.12 | 0.90 ± 0.56 |
| width 32     | 65.2 ± 3.0 | 0.71 ± 0.07  | 0.128 ± 0.051 | 0.91 ± 0.24   | 0.65 ± 0.15 | 0.37 ± 0.08 | 0.87 ± 0.36 |
| width 64     | 65.4 ± 1.6 | 0.72 ± 0.13  | 0.084 ± 0.097 | 1.14 ± 0.22   | 0.90 ± 0.13 | 0.47 ± 0.09 | 1.24 ± 0.24 |
| 1,000 pairs  | 56.3 ± 2.3 | 0.31 ± 0.12  | 0.061 ± 0.098 | 0.38 ± 0.30   | 0.57 ± 0.24 | 0.29 ± 0.18 | 0.95 ± 0.51 |
| 16,000 pairs | 70.6 ± 2.2 | 0.85 ± 0.09  | 0.064 ± 0.061 | 1.51 ± 0.17   | 0.76 ± 0.13 | 0.42 ± 0.06 | 0.94 ± 0.11 |

What agrees. In RL the proxy climbs to the end, to between 1.4 and 4.2, while gold rises to about 1 near d = 3 and
then falls, at d = 5.8 to 9.5 to between 0.0 and -1.7, where it began or below: every mean does, and in two of these
six rows the fall's interval is above 0. Held out in RL, with d up to 0.6 of its largest fitted, the form errs by 0.24
to 1.37 and a line by 1.54 to 2.45; on a seed that was not fitted, by 0.20 to 0.50 and 0.45 to 0.89. By best of n,
beyond what was fitted, it errs by 0.11 to 0.22 and a line by 0.12 to 0.22, more than the form in all six rows, as on
other seeds. a grows with data.

What does not. b does not fall with size or data: in RL it grows with both, if anything; by best of n it goes up and
down. Up to n = 256, d = 2.1, best of n bends and hardly turns. RL's form is steep at 0, where gold begins as a line
and lies below it. KL penalties do not move along one curve: at the same d gold is 0.23 ± 0.16 higher with a
coefficient of 0.2, and 0.34 ± 0.22 with 0.05, whose runs reach d = 3.4 with gold 1.55 ± 0.21. Ensembles of three,
from bootstrap samples of the same pairs and one pretrained model, bring nothing at the same d: by best of n the mean
-0.02 ± 0.15, the minimum -0.04 ± 0.15, the mean less the spread -0.04 ± 0.15; in RL 0.04 ± 0.09, 0.06 ± 0.24, 0.07 ±
0.11. On an AMD EPYC, whose rounding gives other runs, the same agreed and the same did not.

The gold reward, the amounts of data and RL's rate were settled in trials before this run. A Transformer taught to rate
sentiment was tried as gold first: proxies could hardly order its pairs, and RL lowered it from the first point. The
formula then had no limit on what broken language costs, and gold fell much further. With another gold reward b may well
behave otherwise.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.judgements import judge_pairs
from experiments.pretrain import load_text
from experiments.recipes import overoptimization_models as models
from experiments.recipes.overoptimization_config import GROUP_SIZE, Config, check, shape_of, sweeps
from experiments.recipes.overoptimization_curves import (
    BEST_OF_N,
    FORMS,
    RL,
    Curve,
    Line,
    best_of_n_curve,
    draw_coefficients,
    draw_curves,
    table_row,
)
from experiments.recipes.overoptimization_models import Gold, Prompts, take
from experiments.recipes.overoptimization_rl import EVALUATED, Problem, Shapes, combinations, tune
from rl_jax.data.prompts import decode_completions
from rl_jax.keys import Purpose, step_key
from rl_jax.models.config import TransformerConfig
from rl_jax.models.reward_model import normalize
from rl_jax.preferences.losses import bradley_terry_loss
from rl_jax.run.folder import write_json
from rl_jax.run.loop import run_main
from rl_jax.run.progress import show_progress
from rl_jax.run.tables import open_results, write_table
from rl_jax.sampling import Sampling
from rl_jax.types import Array, PreferenceBatch, PyTree, Rollout

EXAMPLES = 4  # completions of a tuned policy that are written down


class World(NamedTuple):
    """What all proxies have in common. S seeds, N prompts to evaluate on.

    Attributes:
        tokens: the corpus that everything is pretrained on. int32 [n].
        tokenizer: of it.
        policy: parameters of the reference policy.
        policy_config: its configuration.
        gold: the gold reward.
        evaluated: prompts to evaluate on.
        trained: prompts of preferences and RL.
        pool: completions of the first by the reference policy. B = N * samples.
        gold_pool: their gold reward, of mean 0 and variance 1. [B].
        judged: pairs to learn from, of each seed. [S, M, ...].
        held_out: pairs to measure accuracy on. B = 2 * held_out_pairs.
        held_out_gold: their gold reward. [B].
    """

    tokens: np.ndarray
    tokenizer: Any
    policy: PyTree
    policy_config: TransformerConfig
    gold: Gold
    evaluated: Prompts
    trained: Prompts
    pool: Rollout
    gold_pool: np.ndarray
    judged: PreferenceBatch
    held_out: Rollout
    held_out_gold: np.ndarray


def make_world(config: Config) -> World:
    """Pretrain the policy, and let the gold reward judge what it writes."""
    text = load_text(config.corpus, config.vocab_size)
    tokens = text.train_tokens
    policy_config = shape_of(config, config.policy_width)
    policy = models.pretrain_model(policy_config, tokens, config.pretraining, config.seed)
    evaluated, trained = models.make_prompts(text, config.prompt_length, config.prompts, config.seed)
    sampling = Sampling(length=config.completion_length, group_size=GROUP_SIZE)

    def sample(number: int, prompts: Prompts, completions: int) -> Rollout:
        key = step_key(config.seed, Purpose.REFERENCE, number)
        return models.sample(policy, policy_config, sampling, key, prompts, completions)

    def sample_pairs(number: int, pairs: int) -> Rollout:
        """Pairs of completions of random prompts of RL's, B = 2 * pairs."""
        rng = np.random.default_rng([config.seed, number])
        groups = -(-2 * pairs // GROUP_SIZE)
        rollout = sample(number, take(trained, rng.integers(len(trained.tokens), size=groups)), GROUP_SIZE)
        order = rng.permutation(groups * GROUP_SIZE // 2)[:pairs]
        return take(rollout, (2 * order[:, None] + np.arange(2)).reshape(-1))

    pool = sample(0, evaluated, config.samples)
    gold = models.measure_gold(models.make_gold(tokens, config.vocab_size, config.seed), pool)

    def gold_of(rollout: Rollout) -> np.ndarray:
        return np.asarray(models.gold_reward(gold, rollout))

    judged = []
    for seed in range(config.seeds):
        rollout = sample_pairs(2 + seed, max(config.pairs))
        pairs, _ = judge_pairs(rollout, gold_of(rollout).reshape(-1, 2), config.noise, config.seed + seed)
        judged.append(pairs)
    held_out = sample_pairs(1, config.held_out_pairs)
    return World(
        tokens=tokens,
        tokenizer=text.tokenizer,
        policy=policy,
        policy_config=policy_config,
        gold=gold,
        evaluated=evaluated,
        trained=trained,
        pool=pool,
        gold_pool=gold_of(pool),
        judged=jax.tree.map(lambda *rows: np.stack(rows), *judged),
        held_out=held_out,
        held_out_gold=gold_of(held_out),
    )


def preference_loss(rewards: Array, batch: PreferenceBatch) -> Array:
    """What a proxy learns by: Bradley and Terry's."""
    return bradley_terry_loss(rewards, batch.labels, batch.margins)


class Proxies(NamedTuple):
    """What the lines of one width optimise. S seeds, K members, B completions of the pool.

    Attributes:
        params: of each line and seed: "single" ensembles of one, and others of several. [S, K, ...] each.
        rewards: of the pool. [S, K, B] each.
        accuracy: share of held-out pairs that the mean of the members orders as the gold reward does. [S] each.
    """

    params: list[PyTree]
    rewards: list[np.ndarray]
    accuracy: list[np.ndarray]


def train_proxies(config: Config, world: World, width: int, lines: list[Line]) -> Proxies:
    """The proxies of some lines that have a width in common, all in one program."""
    shape = shape_of(config, width)
    backbone = world.policy
    if shape != world.policy_config:
        backbone = models.pretrain_model(shape, world.tokens, config.pretraining, config.seed)
    members = [[0] if line.combination == "single" else range(1, config.members + 1) for line in lines]
    wanted = [(line.pairs, member) for line, each in zip(lines, members, strict=True) for member in each]
    kinds = list(dict.fromkeys(wanted))  # lines that differ in the KL coefficient alone share their proxies
    table = [(seed, pairs, member) for pairs, member in kinds for seed in range(config.seeds)]
    source, pairs, member = np.array(table, np.int32).T
    rows = {"seed": config.seed + source, "source": source, "pairs": pairs, "member": member}

    params = models.train_rewards(backbone, shape, rows, world.judged, preference_loss, config.learning)
    score = models.make_scorer(shape)
    raw = score(params, world.pool)
    params = [normalize(take(params, row), raw[row]) for row in range(len(table))]
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *params)
    mean, std = (stacked["normalizer"][name][..., None] for name in ("mean", "std"))
    pool, held_out = ((raw - mean) / std)[:, 0], score(stacked, world.held_out)[:, 0]
    found = Proxies([], [], [])
    for line, each in zip(lines, members, strict=True):
        numbers = [kinds.index((line.pairs, member)) * config.seeds for member in each]
        rows = np.array(numbers)[None] + np.arange(config.seeds)[:, None]  # [S, K]
        found.params.append(take(jax.tree.map(lambda x: x[:, 0], stacked), rows))
        found.rewards.append(pool[rows])
        right = np.diff(held_out[rows].mean(axis=1).reshape(config.seeds, -1, 2))[..., 0]
        found.accuracy.append(np.mean(np.sign(right) == np.sign(np.diff(world.held_out_gold.reshape(-1, 2))[:, 0]), 1))
    return found


def optimise(config: Config, world: World, width: int, lines: list[Line]) -> dict[tuple[str, Line], Curve]:
    """The curves of lines that have a width in common, by method and line."""
    proxies = train_proxies(config, world, width, lines)
    combine = combinations(config.spread_weight)
    curves = {
        (BEST_OF_N, line): best_of_n_curve(
            line, accuracy, rewards, world.gold_pool, combine[line.combination], config.samples
        )
        for line, accuracy, rewards in zip(lines, proxies.accuracy, proxies.rewards, strict=True)
    }
    shapes = Shapes(world.policy_config, shape_of(config, width))
    problem = Problem(world.policy, world.gold, world.trained, world.evaluated)
    for alone in (True, False):  # ensembles have other shapes, and so are another program
        chosen = [place for place, line in enumerate(lines) if (line.combination == "single") == alone]
        if not chosen:
            continue
        repeated = [lines[place] for place in chosen for _ in range(config.seeds)]
        rows = {
            "seed": np.tile(config.seed + np.arange(config.seeds, dtype=np.int32), len(chosen)),
            "kl_coefficient": np.array([line.kl_coefficient for line in repeated], np.float32),
            "combination": np.array([list(combine).index(line.combination) for line in repeated], np.int32),
            "proxy": jax.tree.map(lambda *x: np.concatenate(x), *(proxies.params[place] for place in chosen)),
        }
        means, completions = tune(shapes, problem, config.tuning, config.completion_length, config.spread_weight, rows)
        found = {name: x.reshape(len(chosen), config.seeds, -1) for name, x in means.items()}
        for number, place in enumerate(chosen):
            d, gold, proxy = np.sqrt(found["kl"][number]), found["gold"][number], found["proxy"][number]
            some = completions[number * config.seeds, ::EVALUATED][:EXAMPLES]
            examples = decode_completions(world.tokenizer, some, np.ones(some.shape, bool))
            curves[RL, lines[place]] = Curve(RL, lines[place], proxies.accuracy[place], d, gold, proxy, tuple(examples))
    return curves


def main(config: Config) -> None:
    check(config)
    began = time.perf_counter()
    folder = open_results(config.results)
    tried = sweeps(config)
    lines = list(dict.fromkeys(line for each in tried.values() for line in each))
    world = make_world(config)
    curves: dict[tuple[str, Line], Curve] = {}
    widths = list(dict.fromkeys(line.width for line in lines))
    with show_progress("widths", 0, len(widths)) as progress:
        for number, width in enumerate(widths, 1):
            curves |= optimise(config, world, width, [line for line in lines if line.width == width])
            progress.show(number, {"seconds": time.perf_counter() - began})
    write(config, folder, tried, curves, time.perf_counter() - began)


def write(
    config: Config, folder: Path, tried: dict[str, list[Line]], curves: dict[tuple[str, Line], Curve], seconds: float
) -> None:
    """Table, figures, and every curve of every seed."""
    write_json(folder / "curves.json", [curve._asdict() | {"line": curve.line._asdict()} for curve in curves.values()])
    usual = Line(config.width, config.default_pairs)
    rows = []
    for sweep, lines in tried.items():
        methods = (RL,) if sweep == "KL coefficient" else (BEST_OF_N, RL)
        of_method = {method: [curves[method, line] for line in lines] for method in methods}
        rows += [
            table_row(sweep, curve, curves[method, usual], config.fitted_share)
            for method, every in of_method.items()
            for curve in every
        ]
        draw_curves(folder / f"{sweep.lower().replace(' ', '_')}.png", of_method, partial(line_name, sweep))
    names = {"width of the proxy": ("size", "width"), "judged pairs": ("data", "pairs")}
    draw_coefficients(
        folder / "coefficients.png",
        {
            axis: tuple({getattr(line, field): curves[method, line] for line in tried[sweep]} for method in FORMS)
            for axis, (sweep, field) in names.items()
        },
    )
    write_table(folder, rows, dataclasses.asdict(config) | {"seconds": seconds})


def line_name(sweep: str, line: Line) -> str:
    """What a line is called in the figure of a sweep."""
    match sweep:
        case "size":
            return f"width {line.width}"
        case "data":
            return f"{line.pairs:,} pairs"
        case "KL coefficient":
            return f"coefficient {line.kl_coefficient:g}"
        case _:
            return line.combination


if __name__ == "__main__":
    run_main(main, Config)
