"""How far the best of n samples is from the policy that is sampled: the exact KL beside log n - (n - 1) / n.

    python experiments/recipes/best_of_n.py

Two cores of an Intel Xeon, JAX 0.10.2: 10 seconds of processor time.

In every task each outcome of a prompt has a probability and a reward, so that the best of n is known in closed form,
in float64. The tasks: outcomes as likely as one another, with rewards that differ; every completion of up to 6 tokens
that tabular policies over 4 tokens can write to 8 prompts, 1,093 each, with a random reward for each or, tied, the
number of times that one token occurs; and a reward that is right or wrong. A KL and a win rate are means over the
prompts. The last columns are estimates from 512 samples of each prompt, with the 95 % interval of the mean of 200
repeats: the mean over every subset of n, and over the 512 / n blocks of n that follow one another.

Published (Beirami 2024, arXiv 2401.01879): log n - (n - 1) / n is not the KL but the most that it can be: 0.636,
1.835, 3.175 and 4.549 nats at n = 4, 16, 64 and 256. It is near where no outcome is likely, and far where the best
outcome is: a KL never passes minus the logarithm of the best reward's probability. The win rate is at most n / (n + 1).

Measured, seed 0, at those n: with 10,000 outcomes 0.6363, 1.835, 3.175 and 4.549, which is the bound; with 100 a share
of 0.9999, 0.9994, 0.995 and 0.948 of it; sequences 0.986, 0.976, 0.944 and 0.950, of a sharp policy 0.877, 0.933,
0.886 and 0.901, with tied rewards 0.896, 0.945, 0.943 and 0.935; one right in ten 0.34, 0.77, 0.72 and 0.51; a fair
coin 0.72, 0.38, 0.22 and 0.15, at log 2 = 0.693 nats. No KL is above its bound, and no win rate above n / (n + 1).
The exact reward is within the estimate's interval in 32 of 35 rows; in one of the others the failures that remain, 2
in 10^12, are too few to be met. An estimate from every subset has 0.33 to 0.92 times the variance of one from blocks,
0.71 in the median row. Where no block is without a right one it still tells how many would be: 0.999985 against 1.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rl_jax.best_of_n import best_of_n_kl_bound, best_of_n_weights
from rl_jax.errors import InputError
from rl_jax.evaluation import Estimate, mean_interval
from rl_jax.keys import Purpose, check_seed, step_key
from rl_jax.models.tabular import init_table, tabular_logits
from rl_jax.reinforce import exact
from rl_jax.reinforce.distributions import token_logprobs
from rl_jax.run.figures import GUIDE, PALETTE, open_figure
from rl_jax.run.loop import run_main
from rl_jax.run.tables import open_results, write_table

EOS, SHARP = 0, 3.0  # the token that ends a completion; standard deviation of the sharp policy's logits


@dataclasses.dataclass(frozen=True)
class Config:
    """The exact KL, win rate and reward of the best of n, where every outcome can be counted."""

    numbers: tuple[int, ...] = (2, 4, 16, 64, 256)
    """The n of the best of n, at most samples."""
    samples: int = 512
    """Completions of each prompt that the estimator has, G."""
    repeats: int = 200
    """Times that it is repeated, for the interval of its mean."""
    outcomes: int = 10_000
    """Outcomes of the task with many."""
    prompts: int = 8
    """Prompts of the tabular policies."""
    vocab_size: int = 4
    """Tokens of the tabular policies, one of them the end of the sequence."""
    length: int = 6
    """Most tokens of a completion of theirs."""
    seed: int = 0
    """Seed of the tasks and of the samples."""
    results: Path = Path("results/best_of_n")
    """Folder that the table and the figure are written to."""


class Task(NamedTuple):
    """N prompts with K outcomes each, in float64.

    Attributes:
        probabilities: of each outcome. [N, K].
        rewards: of each. [N, K].
    """

    probabilities: np.ndarray
    rewards: np.ndarray


class Exact(NamedTuple):
    """What the best of n is, the mean over the prompts.

    Attributes:
        kl: from the policy that is sampled, nats.
        win_rate: against one sample of that policy; ties count half.
        reward: the expected reward.
    """

    kl: float
    win_rate: float
    reward: float


def best_of_n(task: Task, n: int) -> Exact:
    """In closed form: with F the share of samples of no higher reward and q that of this one, the best has it with
    probability F^n - (F - q)^n.

    Outcomes of the same reward keep their proportions, so that the KL is that of the rewards' distributions.
    """
    parts = [_of_prompt(*prompt, n) for prompt in zip(*task, strict=True)]
    return Exact(*np.mean(parts, axis=0).tolist())


def _of_prompt(probabilities: np.ndarray, rewards: np.ndarray, n: int) -> tuple[float, float, float]:
    levels, places = np.unique(rewards, return_inverse=True)
    masses = np.bincount(places, probabilities)
    levels, masses = levels[masses > 0], masses[masses > 0]
    # What is above: the n-th power magnifies what a sum from below would round off near 1.
    above = np.append(np.cumsum(masses[::-1])[::-1], 0.0)
    with np.errstate(divide="ignore"):  # the lowest reward has nothing below it
        log_no_higher, log_lower = np.log1p(-above[1:]), np.log1p(-np.minimum(above[:-1], 1.0))
    best = np.exp(n * log_no_higher) * -np.expm1(n * (log_lower - log_no_higher))
    kl = np.sum(np.where(best > 0, best * np.log(np.where(best > 0, best, 1.0) / masses), 0.0))
    return max(float(kl), 0.0), float(best @ (1 - above[1:] - masses / 2)), float(best @ levels)


def tabular_task(config: Config, scale: float, ties: bool) -> Task:
    """Every completion of every prompt by a random tabular policy.

    Args:
        config: its size.
        scale: standard deviation of its logits.
        ties: reward how often the token 1 occurs, rather than a random number for each completion.
    """
    keys = jax.random.split(step_key(config.seed, Purpose.INIT), 2)
    prompts = np.arange(config.prompts, dtype=np.int32)[:, None]
    enumerated = exact.enumerated_rollout(prompts, prompts >= 0, config.vocab_size, config.length, (EOS,))
    table = init_table(keys[0], config.prompts, config.vocab_size, config.length, scale)
    tokens = token_logprobs(tabular_logits(table, enumerated), enumerated.completions)
    logprobs = np.asarray(exact.sequence_logprobs(tokens, enumerated.completion_mask, config.prompts), np.float64)
    if ties:
        rewards = np.sum(np.asarray((enumerated.completions == 1) & enumerated.completion_mask), axis=1)
    else:
        rewards = np.asarray(jax.random.normal(keys[1], (logprobs.size,)))
    probabilities = np.exp(logprobs)
    return Task(probabilities / probabilities.sum(axis=1, keepdims=True), rewards.reshape(logprobs.shape).astype(float))


def make_tasks(config: Config) -> dict[str, Task]:
    """From the case in which the bound is the KL to those in which it is far above."""
    many = np.ones((1, config.outcomes)) / config.outcomes
    return {
        f"{config.outcomes:,} outcomes, as likely": Task(many, np.arange(many.size)[None, :] / many.size),
        "100 outcomes, as likely": Task(np.ones((1, 100)) / 100, np.arange(100)[None, :] / 100),
        "sequences": tabular_task(config, 1.0, ties=False),
        "sequences, sharp policy": tabular_task(config, SHARP, ties=False),
        "sequences, tied rewards": tabular_task(config, 1.0, ties=True),
        "one in ten is right": Task(np.array([[0.9, 0.1]]), np.array([[0.0, 1.0]])),
        "a fair coin": Task(np.array([[0.5, 0.5]]), np.array([[0.0, 1.0]])),
    }


def sample_rewards(task: Task, config: Config, number: int, n: int) -> np.ndarray:
    """Rewards of samples of each prompt, in repeats, for row n of the task of that number. [repeats, N, G]."""
    rng = np.random.default_rng([config.seed, number, n])  # every row has its own, so that each is a trial of its own
    shape = (config.repeats, config.samples)
    drawn = [rng.choice(rewards, shape, p=p) for p, rewards in zip(*task, strict=True)]
    return np.stack(drawn, axis=1)


def estimates(sampled: np.ndarray, n: int) -> tuple[Estimate, Estimate]:
    """The reward of the best of n, from every subset of the samples, and from blocks of n of them. [repeats, N, G]."""
    every = np.reshape(sampled, (-1, sampled.shape[2]))
    means = np.sum(best_of_n_weights(every, n) * every, axis=1).reshape(sampled.shape[:2])
    blocks = sampled.shape[2] // n
    best = sampled[:, :, : blocks * n].reshape(*sampled.shape[:2], blocks, n).max(axis=3)
    return mean_interval(means), mean_interval(best.mean(axis=2))


def check(config: Config) -> None:
    """Raise InputError for settings that cannot work, before anything is worked out or written."""
    check_seed(config.seed)
    if not config.numbers or not all(1 <= n <= config.samples for n in config.numbers):
        raise InputError(f"numbers are {config.numbers}: give at least one, each from 1 to samples, {config.samples}.")
    if min(config.outcomes, config.prompts) < 1 or config.vocab_size < 2 or config.repeats < 2:
        raise InputError("One outcome, one prompt, two tokens and two repeats are the least.")
    exact.enumerate_completions(config.vocab_size, config.length, (EOS,))


def main(config: Config) -> None:
    check(config)
    start, folder, rows = time.perf_counter(), open_results(config.results), list[dict[str, Any]]()
    for number, (name, task) in enumerate(make_tasks(config).items()):
        for n in config.numbers:
            every, blocks = estimates(sample_rewards(task, config, number, n), n)
            found = best_of_n(task, n)
            bound = float(best_of_n_kl_bound(n))
            rows.append(
                {
                    "task": name,
                    "n": n,
                    "KL, nats": found.kl,
                    "log n - (n-1)/n": bound,
                    "KL / bound": found.kl / bound if bound else None,
                    "win rate": found.win_rate,
                    "n / (n+1)": n / (n + 1),
                    "reward": found.reward,
                    "sampled, every subset": every,
                    "sampled, blocks of n": blocks,
                }
            )
    draw(folder / "best_of_n.png", rows)
    write_table(folder, rows, dataclasses.asdict(config) | {"seconds": time.perf_counter() - start})


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Three panels over n, a line for each task, best of 1 left out; the bounds are dashed."""
    titles = ["KL from the policy, nats", "KL as a share of its bound", "Win rate against the policy"]
    columns = (("KL, nats", "log n - (n-1)/n"), ("KL / bound", None), ("win rate", "n / (n+1)"))
    with open_figure(path, titles, 4.4, 3.8) as every:
        numbers = sorted({row["n"] for row in rows})
        for axes, (column, bound) in zip(every, columns, strict=True):
            for task, colour in zip(dict.fromkeys(row["task"] for row in rows), PALETTE, strict=False):
                lines = sorted((row for row in rows if row["task"] == task and row["n"] > 1), key=lambda row: row["n"])
                x, y = [row["n"] for row in lines], [row[column] for row in lines]
                axes.plot(x, y, color=colour, linewidth=1.4, marker="o", markersize=3, label=task)
            if bound is not None:
                heights = [next(row[bound] for row in rows if row["n"] == n) for n in numbers]
                axes.plot(numbers, heights, **(GUIDE | {"linewidth": 1.2}), label=bound)
            axes.set(xscale="log", xlabel="n", xticks=numbers, xticklabels=numbers)
            axes.minorticks_off()
        every[0].legend(fontsize=7)
        every[2].legend(*(part[-1:] for part in every[2].get_legend_handles_labels()), fontsize=7)


if __name__ == "__main__":
    run_main(main, Config)
