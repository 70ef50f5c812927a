"""The expected gradient of every estimator: each group summed, 131,072 batches sampled, beside the exact gradient.

    python experiments/recipes/policy_gradient_theorem.py

Two cores of an Intel Xeon, JAX 0.10.2: 3.1 minutes of processor time.

A tabular policy over 3 tokens writes 15 different completions of at most 3 tokens, ended by a token or cut. The
reference policy differs, a nat of divergence costs 0.1, and each completion of each of two prompts has a random reward.
Every estimate is a whole `policy_gradient_update`: parameters after it, less those before. The columns:

- bias along and across: of the expected gradient of one prompt's group of 4, by summing over all 50,625 groups, as
  shares of the exact gradient's length: along it, signed (a scale, which an adaptive optimizer undoes), and across it
  (a direction, which nothing undoes). It is held against E[r] - beta KL, or E[r] where an estimator charges no KL.
- sampled along: the same from 131,072 batches of both prompts, with its 95 % interval.
- error slope: of the error's logarithm over that of the number of batches.
- cosine: of the expected gradient with that of E[r] - beta KL. 1 is the direction of steepest ascent.
- variance: trace of the covariance of one group's gradient, over the squared length of its mean.
- off policy: bias where a policy with logits off by 0.5 sampled the groups: clips and ratios away from the start.
- completions sampled for a prompt; passes of a model over them (reference, critic, forward and backward of each epoch)
  in the paper's version; microseconds of an update of the table, and that time as a multiple of the first row's.

Published: Williams 1992, Sutton 2000 and Kool 2019 prove that reinforce is unbiased with any baseline that does not see
the completion itself, the mean of the others in its group included; the group's own mean takes 1/G of the gradient's
length and leaves its direction, to which dr_grpo adds its division by C; a completion's whole ratio is unbiased off
policy. The error of the unbiased falls with a slope of -1/2 for ever, that of the others comes to rest.

Measured, seed 0: a bias of 0.000 % along and across for reinforce, reinforce_moving_average, reinforce_value,
reinforce_to_go, rloo, remax, importance_token and importance_sequence; for dr_grpo -75.000 % along, which is 3/4 of 1/3
less 1, and 0.000 % across. Across: raft 45.6 %, awr 12.1 %, grpo 10.6 %, gspo 8.9 %, reinforce_pp 6.5 %, ppo 4.0 %
(its critic errs by 0.3), dapo and cispo 2.1 %. Error slopes of -0.48 to -0.52 for the unbiased, -0.03 to 0 for the
others. Variance 3.66 without a baseline, 1.86 leaving one out, 1.38 with a moving average, 1.02 with a critic; 4.27 for
remax, whose greedy completion earns -0.13 where the policy earns 1.06. Off policy, across: rloo 29.7 %, ppo 21.1 %,
importance_token 8.4 %, importance_sequence 8.3 %, without a cap 5.0 %, and 0.000 % without the KL too: the divergence
in the reward is that of the policy that sampled.

In the sums one group of 4 is the whole batch, so what is worked out over a batch (whitening, a mean over tokens) is
further off there than in the samples, with two prompts. The overlong penalty and the replacement of groups without
signal (dapo) are left out: they change the rewards and the prompts.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.recipes.enumerable import (
    EOS,
    PROMPTS,
    Problem,
    completion_logprobs,
    completions_of,
    make_problem,
    objective,
    reward,
    score_fn,
)
from experiments.recipes.policy_gradient_figures import draw_errors, draw_group_sizes
from rl_jax.errors import InputError
from rl_jax.evaluation import Estimate, mean_interval
from rl_jax.keys import Purpose, check_seed, step_key
from rl_jax.learner import init_state, policy_gradient_update
from rl_jax.models.tabular import tabular_logits
from rl_jax.reinforce import exact
from rl_jax.reinforce.composition import Estimator
from rl_jax.reinforce.distributions import token_logprobs
from rl_jax.reinforce.estimators import ESTIMATORS, make_estimator
from rl_jax.run.folder import write_json
from rl_jax.run.loop import run_main
from rl_jax.run.progress import show_progress
from rl_jax.run.spmd import make_mesh, pmapped
from rl_jax.run.tables import open_results, write_table
from rl_jax.types import Array, Rollout

CHUNKS = 64  # parts that sampled batches go through in
CRITIC = "reinforce_value"
SHOWN = ("grpo", "raft", "ppo", "reinforce", "rloo", CRITIC)  # in the figure of errors
GROUP_SIZE_SHARE = 8  # the group sizes get one in so many samples
ADVANTAGES = {"no baseline": "reinforce", "leave one out": "rloo", "group mean": "dr_grpo", "standardised": "grpo"}


Sampler = Callable[[Problem, Array], Array]
"""Problem and a key for each batch [n] -> gradients [n, P]."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Bias, variance and cost of every estimator, on a problem in which everything can be counted."""

    estimators: tuple[str, ...] = tuple(ESTIMATORS)
    """Rows of the table."""
    vocab_size: int = 3
    """Tokens, one of them the end of the sequence."""
    length: int = 3
    """Most tokens of a completion."""
    group_size: int = 4
    """Completions of each prompt."""
    group_sizes: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Group sizes that the variance of four advantages is measured for."""
    samples: int = 131_072
    """Batches sampled for each estimator."""
    kl_coefficient: float = 0.1
    """Reward that a nat of divergence from the reference policy costs."""
    baseline: float = 0.8
    """Where the moving average of the rewards stands."""
    critic_error: float = 0.3
    """Standard deviation of what the critic is wrong by, reward units."""
    off_policy: float = 0.5
    """Standard deviation of what the logits of the sampling policy differ by, off policy."""
    seed: int = 0
    """Seed of the problem and of the samples."""
    results: Path = Path("results/policy_gradient_theorem")
    """Folder that the table and the figures are written to."""


class Measured(NamedTuple):
    """What was found out about an estimator; P parameters.

    Attributes:
        mean: exact expected gradient of one prompt's group. [P].
        variance: trace of the covariance of that gradient.
        off_policy: exact expected gradient where another policy sampled the group. [P].
        samples: gradients of batches sampled for both prompts. [M, P].
    """

    mean: np.ndarray
    variance: float
    off_policy: np.ndarray
    samples: np.ndarray


def estimate(problem: Problem, rollout: Rollout, estimator: Estimator, config: Config) -> Array:
    """What an update at a learning rate of 1 adds to the policy's logits: the estimate of the gradient. [P]."""
    optimizer = optax.sgd(1.0)
    state = init_state(problem.params, optimizer, config.kl_coefficient)
    ref_logits = tabular_logits(problem.ref_table, rollout)
    updated, _ = policy_gradient_update(
        dataclasses.replace(state, baseline=jnp.float32(config.baseline)),
        rollout,
        reward(problem, rollout),
        estimator=estimator,
        score_fn=score_fn,
        optimizer=optimizer,
        group_size=config.group_size,
        ref_logprobs=token_logprobs(ref_logits, rollout.completions),
        context=ref_logits,
        greedy_rewards=problem.greedy_rewards[rollout.prompts[:, -1]],
    )
    return (updated.params["policy"] - problem.params["policy"]).reshape(-1)


def make_summation(estimator: Estimator, config: Config) -> Callable[[Problem, Array], tuple[Array, Array]]:
    """Compiled: the expected gradient [P] and its squared norm, over every group that a table samples for a prompt."""

    def expected(problem: Problem, table: Array) -> tuple[Array, Array]:
        def moments(rollout: Rollout) -> tuple[Array, Array]:
            gradient = estimate(problem, rollout, estimator, config)
            return gradient, jnp.sum(jnp.square(gradient))

        completions = completions_of(problem, 1)
        return exact.expected_gradient(moments, completions, completion_logprobs(table, completions), config.group_size)

    return pmapped(expected, make_mesh(), (None, None), None)


def make_sampler(estimator: Estimator, config: Config) -> Sampler:
    """Compiled: the gradient of a batch for each key, sampled from the policy itself. [n] -> [n, P]."""

    def sample(problem: Problem, keys: Array) -> Array:
        tokens = completion_logprobs(problem.params["policy"], problem.completions)

        def one(key: Array) -> Array:
            rollout = exact.draw_groups(key, problem.completions, tokens, len(PROMPTS), config.group_size)
            return estimate(problem, rollout, estimator, config)

        return jax.vmap(one)(keys)

    return pmapped(sample, make_mesh(), (None, 0), 0)


def batch_keys(config: Config, number: int, samples: int) -> Array:
    """A key for each batch, in parts; each number has keys of its own. [CHUNKS, samples / CHUNKS]."""
    return jax.random.split(step_key(config.seed, Purpose.SAMPLE, number), (CHUNKS, samples // CHUNKS))


def sample_gradients(sampler: Sampler, problem: Problem, keys: Array) -> np.ndarray:
    """Gradients of sampled batches, part by part. [CHUNKS, n] -> [CHUNKS * n, P]."""
    return np.concatenate([np.asarray(sampler(problem, part)) for part in keys])


def measure(problem: Problem, estimator: Estimator, sampler: Sampler, number: int, config: Config) -> Measured:
    """Everything about an estimator but its time; its number says which random numbers it gets."""
    expected = make_summation(estimator, config)
    mean, square = (np.asarray(x, np.float64) for x in expected(problem, problem.params["policy"]))
    off_policy = np.asarray(expected(problem, problem.sampler_table)[0], np.float64)
    samples = sample_gradients(sampler, problem, batch_keys(config, number, config.samples))
    return Measured(mean, float(square - mean @ mean), off_policy, samples)


def update_times(samplers: dict[str, Sampler], problem: Problem, config: Config) -> dict[str, float]:
    """Seconds that sampling a batch, by look-up, and updating from it take: the least of rounds that take turns."""
    keys = batch_keys(config, 0, config.samples)
    least = dict.fromkeys(samplers, math.inf)
    for part in keys:
        for name, sampler in samplers.items():
            start = time.perf_counter()
            jax.block_until_ready(sampler(problem, part))
            least[name] = min(least[name], (time.perf_counter() - start) / len(part))
    return least


def bias(mean: np.ndarray, gradient: np.ndarray) -> tuple[float, float]:
    """Of an expected gradient: along the exact one, signed, and across it, both as shares of its length. [P], [P]."""
    along = mean @ gradient / (gradient @ gradient)
    return float(along) - 1, float(np.linalg.norm(mean - along * gradient) / np.linalg.norm(gradient))


def sampled_bias(samples: np.ndarray, gradient: np.ndarray) -> Estimate:
    """The bias along the exact gradient, from samples of the estimate. [M, P], [P]."""
    return mean_interval(samples @ (gradient / (gradient @ gradient)) - 1)


def errors(samples: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the mean of m batches is from the exact gradient, as a share of its length.

    Args:
        samples: [M, P].
        gradient: [P].

    Returns:
        m, the powers of two up to M / 8 [n], and the root mean square of the error over the M / m disjoint runs of m
        batches [n].
    """
    counts, found, means = [], [], samples.astype(np.float64)
    while len(means) >= 8:
        counts.append(2 ** len(counts))
        found.append(math.sqrt(np.mean(np.sum(np.square(means - gradient[None]), axis=1)) / (gradient @ gradient)))
        pairs = means[: len(means) // 2 * 2]
        means = (pairs[::2] + pairs[1::2]) / 2
    return np.array(counts), np.array(found)


def error_slope(counts: np.ndarray, found: np.ndarray) -> float:
    """How steeply the error falls, both logarithmic, over the last hundredfold of batches. [n], [n]."""
    late = counts >= counts[-1] / 100
    return float(np.polyfit(np.log(counts[late]), np.log(found[late]), 1)[0])


def exact_gradient(problem: Problem, prompts: int, kl_coefficient: float) -> np.ndarray:
    """Of E[reward] - kl_coefficient * KL, the mean over the first prompts. [P]."""
    return np.asarray(_gradient(problem.params["policy"], problem, prompts, kl_coefficient), np.float64).reshape(-1)


_gradient = jax.jit(jax.grad(objective), static_argnums=2)


def charge(estimator: Estimator, config: Config) -> float:
    """The KL coefficient of the objective that an estimator is held against: none where it charges none."""
    return 0.0 if estimator.kl == "none" else config.kl_coefficient


def row(name: str, estimator: Estimator, measured: Measured, problem: Problem, config: Config) -> dict[str, Any]:
    """A line of the table."""
    coefficient = charge(estimator, config)
    one, both = (exact_gradient(problem, prompts, coefficient) for prompts in (1, len(PROMPTS)))
    penalised = exact_gradient(problem, 1, config.kl_coefficient)
    along, across = bias(measured.mean, one)
    off_along, off_across = bias(measured.off_policy, one)
    length = np.linalg.norm(measured.mean)
    return {
        "estimator": name,
        "held against": "E[r] - beta KL" if coefficient else "E[r]",
        "bias along, %": percent(along),
        "across, %": percent(across),
        "sampled along, %": Estimate(*(100 * x for x in sampled_bias(measured.samples, both))),
        "error slope": round(error_slope(*errors(measured.samples, both)), 2) + 0.0,
        "cosine": round(float(measured.mean @ penalised / (length * np.linalg.norm(penalised))), 4),
        "variance": measured.variance / length**2,
        "off policy along, %": percent(off_along),
        "off policy across, %": percent(off_across),
        "completions": config.group_size + estimator.greedy,
        "passes": (estimator.kl != "none") + estimator.critic + 2 * ESTIMATORS[name.split(",")[0]].epochs,
    }


def percent(share: float) -> float:
    """To a thousandth, and zero without a minus."""
    return round(100 * share, 3) + 0.0


def group_size_rows(problem: Problem, config: Config) -> list[dict[str, Any]]:
    """Variance and bias of four advantages over the group size, all else equal."""
    gradient = exact_gradient(problem, len(PROMPTS), config.kl_coefficient)
    count = config.samples // GROUP_SIZE_SHARE
    rows = []
    for number, (label, name) in enumerate(ADVANTAGES.items()):
        estimator = make_estimator(name, normalize="completion", kl="k1_reward")
        keys = batch_keys(config, len(chosen(config)) + number, count)
        for group_size in config.group_sizes:
            sampler = make_sampler(estimator, dataclasses.replace(config, group_size=group_size))
            samples = sample_gradients(sampler, problem, keys)
            variance = float(np.sum(np.var(samples, axis=0, ddof=1, dtype=np.float64)) / (gradient @ gradient))
            along = sampled_bias(samples, gradient)
            rows.append({"advantage": label, "group size": group_size, "variance": variance, "bias along": along})
    return rows


def chosen(config: Config) -> dict[str, Estimator]:
    """The rows of the table: as their papers have them, but with one update a batch and the same reward for all."""
    plain: dict[str, Any] = {"epochs": 1, "minibatches": 1, "overlong_share": 0.0}
    rows = {name: make_estimator(name, **plain) for name in config.estimators}
    if "importance_sequence" in rows:
        plain["ratio_cap"] = math.inf
        rows["importance_sequence, no cap"] = make_estimator("importance_sequence", **plain)
        rows["importance_sequence, no cap, no KL"] = make_estimator("importance_sequence", **plain, kl="none")
    return rows


def check(config: Config) -> None:
    """Raise InputError for settings that cannot work, before anything is measured or written."""
    check_seed(config.seed)
    if not chosen(config) or not config.group_sizes:
        raise InputError("Name at least one estimator, and one group size.")
    if config.vocab_size < 2 or config.length < 1 or min(config.group_size, *config.group_sizes) < 2:
        raise InputError("Two tokens, a length of 1 and a group of 2 completions are the least that can be measured.")
    parts = CHUNKS * GROUP_SIZE_SHARE * jax.device_count()
    if config.samples < parts or config.samples % parts:
        raise InputError(f"samples is {config.samples}; it must be a multiple of {parts}.")
    if min(config.kl_coefficient, config.critic_error, config.off_policy) < 0:
        raise InputError("kl_coefficient, critic_error and off_policy must be at least 0.")
    tokens, _ = exact.enumerate_completions(config.vocab_size, config.length, (EOS,))
    exact.check_groups(len(tokens), config.group_size)


def main(config: Config) -> None:
    check(config)
    start, folder = time.perf_counter(), open_results(config.results)
    settings = (config.vocab_size, config.length, config.kl_coefficient, config.off_policy, config.critic_error)
    problem = jax.jit(make_problem, static_argnums=(1, 2))(step_key(config.seed, Purpose.INIT), *settings)
    rows, curves, estimators = [], {}, chosen(config)
    samplers = {name: make_sampler(estimator, config) for name, estimator in estimators.items()}
    with show_progress("estimators", 0, len(estimators)) as progress:
        for number, (name, estimator) in enumerate(estimators.items()):
            measured = measure(problem, estimator, samplers[name], number, config)
            rows.append(row(name, estimator, measured, problem, config))
            gradient = exact_gradient(problem, len(PROMPTS), charge(estimator, config))
            curves[name] = errors(measured.samples, gradient)
            progress.show(number + 1, {"bias": rows[-1]["bias along, %"]})
    seconds = update_times(samplers, problem, config)
    for name, line in zip(seconds, rows, strict=True):
        line["microseconds"] = round(1e6 * seconds[name], 2)
        line["time"] = round(seconds[name] / next(iter(seconds.values())), 2)
    group_sizes = group_size_rows(problem, config)
    write_json(folder / "group_sizes.json", group_sizes)
    draw_errors(folder / "error.png", {name: curves[name] for name in SHOWN if name in curves} or curves)
    draw_group_sizes(folder / "group_sizes.png", group_sizes)
    write_table(folder, rows, dataclasses.asdict(config) | {"seconds": time.perf_counter() - start})


if __name__ == "__main__":
    run_main(main, Config)
