"""Leave one out, over the size of the group: bias and variance of RLOO's gradient, counted and in closed form.

    python experiments/recipes/leave_one_out.py

Two cores of an Intel Xeon, JAX 0.10.2: 1.9 minutes of processor time.

Each of 20 problems is one prompt, a random tabular policy, and a random reward of mean 1 and variance 1 for each of its
4 completions, or 15. The estimate of a group of G (the papers' K) completions is `reinforce_gradient` of its
advantages. Its mean and variance are sums over every group there is, up to 100,000, and means over sampled ones beyond.

The mean of (r - mean of the others) grad log p over a group is the sample covariance, with G - 1, of the reward and the
score s = grad log p. So its variance, the trace over parameters, is known: with V = E[r] and g the exact gradient,

    G variance(G) = E[(r - V)^2 |s|^2] - |g|^2 + (Var(r) E|s|^2 + |g|^2) / (G - 1)

whose first two terms are the variance of one completion's gradient with the exact value V as the baseline. Columns:

- a group: the variance of one group's gradient. Equal completions: G times that, as where the same number of
  completions of a prompt is cut into groups. A prompt each: the same where every group has a prompt of its own, so that
  larger groups leave fewer prompts, each with parameters of its own: G |g|^2 more. All three are shares of the variance
  of one completion with the exact value as the baseline, as ratios of sums over the problems.
- below no baseline: the share of problems in which equal completions have less variance than without a baseline.

Published (Kool 2019; Ahmadian 2024, section 2.3): A = G / (G - 1) (r - group mean) is unbiased, and has less variance
than no baseline, the less the larger the group.

Measured, with 95 % intervals over problems, and a table of those with 15 completions: reproduced. Where every group is
counted, the mean of no problem is as far as 0.002 % from the exact gradient, and that of the group-mean advantage
(r - group mean) is (G - 1) / G of it, to five digits. Where they are sampled, 6 of 7 intervals of the bias hold zero,
the seventh is -0.06 ± 0.05 %. The variance is that of the closed form, to 0.5 % where it is sampled, and falls to that
of the exact value as the baseline.

| G              | a group           | equal completions | closed form     | a prompt each | below no baseline |
|----------------|-------------------|-------------------|-----------------|---------------|-------------------|
| 1, no baseline | 2.25 ± 0.67       | 2.25 ± 0.67       | 2.25 ± 0.67     | 2.41 ± 0.65   |                   |
| 2              | 0.99 ± 0.10       | 1.98 ± 0.21       | 1.98 ± 0.21     | 2.30 ± 0.29   | 60 %              |
| 4              | 0.331 ± 0.017     | 1.325 ± 0.070     | 1.325 ± 0.070   | 1.97 ± 0.26   | 95 %              |
| 8              | 0.1425 ± 0.0037   | 1.140 ± 0.030     | 1.139 ± 0.030   | 2.43 ± 0.44   | 95 %              |
| 16             | 0.06654 ± 0.00088 | 1.065 ± 0.014     | 1.065 ± 0.014   | 3.64 ± 0.86   | 95 %              |
| 32             | 0.03218 ± 0.00024 | 1.0296 ± 0.0075   | 1.0315 ± 0.0067 | 6.2 ± 1.7     | 95 %              |
| 64             | 0.01580 ± 0.00012 | 1.0111 ± 0.0076   | 1.0155 ± 0.0033 | 11.3 ± 3.4    | 95 %              |

What the claim leaves out: a pair has about twice the variance of the exact value, so that less than no baseline needs a
mean reward that is not small beside its spread, or a larger group; and larger groups of fewer prompts are noisier again
beyond 4, here. `compare_estimators` finds a gain from groups where rewards differ far more between prompts than within.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.recipes.enumerable import (
    EOS,
    Problem,
    completion_logprobs,
    completions_of,
    make_problem,
    reward,
    score_fn,
)
from rl_jax.errors import InputError
from rl_jax.evaluation import Estimate, mean_interval
from rl_jax.keys import Purpose, step_key
from rl_jax.models.tabular import tabular_logits
from rl_jax.reinforce import exact
from rl_jax.reinforce.advantages import group_mean_advantages, leave_one_out_advantages
from rl_jax.reinforce.gradient import reinforce_gradient
from rl_jax.run.figures import GREY, PALETTE, draw_band, draw_limit, open_figure
from rl_jax.run.loop import run_main
from rl_jax.run.progress import show_progress
from rl_jax.run.spmd import make_mesh
from rl_jax.run.tables import open_results, write_table
from rl_jax.sweep import make_sweep
from rl_jax.types import Array, Metrics, Rollout

CHUNK = 2_048  # sampled groups that are worked through at once


@dataclasses.dataclass(frozen=True)
class Config:
    """Bias and variance of RLOO's gradient over the size of the group, at equal completions and at one group."""

    shapes: tuple[tuple[int, int], ...] = ((2, 3), (3, 3))
    """Tokens, one of them the end of the sequence, and most tokens of a completion, of each family of problems."""
    group_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Completions in a group; of 1, there is no baseline."""
    completions: int = 524_288
    """Completions sampled for each problem and group size, where the groups are too many to count."""
    problems: int = 20
    """Problems of each family, with seeds from 0."""
    results: Path = Path("results/leave_one_out")
    """Folder that the table and the figure are written to."""


def moments(problem: Problem) -> Metrics:
    """What the closed forms are made of, from the score of every completion of the first prompt.

    Returns:
        gradient, exact, [P]; value and none, the trace of the covariance of one completion's gradient with the exact
        value as the baseline and with none; and excess, what leaving one out in pairs adds to `value`. [] each.
    """
    completions = completions_of(problem, 1)

    def logprobs(table: Array) -> Array:
        return exact.sequence_logprobs(completion_logprobs(table, completions), completions.completion_mask, 1)[0]

    table, rewards = problem.params["policy"], reward(problem, completions)
    p, scores = jnp.exp(logprobs(table)), jax.jacobian(logprobs)(table).reshape(len(rewards), -1)
    squares, value = jnp.sum(jnp.square(scores), axis=1), p @ rewards
    gradient = (p * rewards) @ scores
    signal = gradient @ gradient

    def variance(baseline: Array | float) -> Array:
        return (p * jnp.square(rewards - baseline)) @ squares - signal

    return {
        "gradient": gradient,
        "value": variance(value),
        "none": variance(0.0),
        "excess": (p @ jnp.square(rewards - value)) * (p @ squares) + signal,
    }


def completion_variance(found: dict[str, np.ndarray], group_size: int) -> np.ndarray:
    """G times the variance of RLOO's gradient of G completions, in closed form; of 1, without a baseline. [R]."""
    return found["none"] if group_size == 1 else found["value"] + found["excess"] / (group_size - 1)


def estimate(problem: Problem, rollout: Rollout, advantages: Array) -> Array:
    """The gradient of a group, uphill. [P]."""
    context = tabular_logits(problem.ref_table, rollout)  # for a divergence that is not charged
    grads, _ = reinforce_gradient(
        problem.params, rollout, advantages, score_fn, normalize="completion", context=context
    )
    return -grads["policy"].reshape(-1)


def make_run(shape: tuple[int, int], group_size: int, groups: int | None) -> Callable[[dict[str, Array]], Metrics]:
    """Everything about a problem, from its seed: `moments`, and what was found of the estimates.

    Args:
        shape: tokens and most tokens of a completion.
        group_size: G.
        groups: how many to sample; None takes the mean over every one there is.

    Returns:
        A function of {"seed": []} -> the moments; leave_one_out and group_mean, the means of the two estimates [P];
        and variance, the trace of the covariance of the first [].
    """

    def run(setting: dict[str, Array]) -> Metrics:
        problem = make_problem(step_key(setting["seed"], Purpose.INIT), *shape, 0.0, 0.0, 0.0)
        completions = completions_of(problem, 1)
        tokens, known = completion_logprobs(problem.params["policy"], completions), moments(problem)

        def of_group(rollout: Rollout) -> Metrics:
            rewards = reward(problem, rollout)
            advantages = rewards if group_size == 1 else leave_one_out_advantages(rewards, group_size)
            estimated = estimate(problem, rollout, advantages)
            return {
                "leave_one_out": estimated,
                "group_mean": estimate(problem, rollout, group_mean_advantages(rewards, group_size)),
                "variance": jnp.sum(jnp.square(estimated - known["gradient"])),
            }

        def sampled(keys: Array) -> Metrics:
            draws = jax.vmap(lambda key: of_group(exact.draw_groups(key, completions, tokens, 1, group_size)))(keys)
            return jax.tree.map(lambda x: jnp.mean(x, axis=0), draws)

        if groups is None:
            return known | exact.expected_gradient(of_group, completions, tokens, group_size)
        keys = jax.random.split(step_key(setting["seed"], Purpose.SAMPLE, group_size), (groups // CHUNK, CHUNK))
        return known | jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.lax.map(sampled, keys))

    return run


def ratios(found: dict[str, np.ndarray], group_size: int) -> dict[str, Estimate]:
    """What is reported: lengths along the exact gradient as shares of its own, and variances of `moments`' value."""
    gradient, value = found["gradient"], found["value"]
    signal = np.sum(np.square(gradient), axis=1)
    along, mean_along = (np.sum(found[name] * gradient, axis=1) for name in ("leave_one_out", "group_mean"))
    return {
        "bias": ratio(along - signal, signal),
        "group mean": ratio(mean_along, signal),
        "group": ratio(found["variance"], value),
        "equal": ratio(group_size * found["variance"], value),
        "closed form": ratio(completion_variance(found, group_size), value),
        "prompts": ratio(group_size * (found["variance"] + signal), value),
        "none": ratio(found["none"], value),
    }


def ratio(values: np.ndarray, of: np.ndarray) -> Estimate:
    """The sum of the values over that of the others, and the interval of the linearised ratio. [R], [R]."""
    found = values.sum() / of.sum()
    return mean_interval(found + (values - found * of) / of.mean())


def row(shape: tuple[int, int], group_size: int, groups: int | None, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """A line of the table; intervals are 95 % over problems."""
    completions, shares = len(exact.enumerate_completions(*shape, (EOS,))[0]), ratios(found, group_size)
    errors = np.linalg.norm(found["leave_one_out"] - found["gradient"], axis=1)
    furthest = 100 * float(np.max(errors / np.linalg.norm(found["gradient"], axis=1)))
    return {
        "completions there are": completions,
        "G": group_size,
        "groups": f"every, {completions**group_size:,}" if groups is None else f"{groups:,} sampled",
        "bias along, %": Estimate(*(round(100 * x, 3) + 0.0 for x in shares["bias"])),
        "furthest off, %": round(furthest, 3) if groups is None else None,
        "group mean, along": Estimate(*(round(x, 5) for x in shares["group mean"])),
        "(G-1)/G": (group_size - 1) / group_size,
        "variance, a group": shares["group"],
        "equal completions": shares["equal"],
        "its closed form": shares["closed form"],
        "a prompt each": shares["prompts"],
        "below no baseline, %": 100 * float(np.mean(completion_variance(found, group_size) < found["none"])),
    }


def check(config: Config) -> None:
    """Raise InputError for settings that cannot work, before anything is measured or written."""
    if not config.shapes or not config.group_sizes or min(config.group_sizes) < 1 or config.problems < 2:
        raise InputError("Name one shape, one group size of at least 1, and two problems.")
    for vocab_size, length in config.shapes:
        if vocab_size < 2:
            raise InputError(f"A shape has {vocab_size} tokens; two are the least.")
        exact.enumerate_completions(vocab_size, length, (EOS,))
    least = CHUNK * max(config.group_sizes)
    if config.completions < least:
        raise InputError(
            f"completions is {config.completions}; it must be at least {least}, {CHUNK} of the largest groups."
        )


def groups_to_sample(config: Config, shape: tuple[int, int], group_size: int) -> int | None:
    """How many, a multiple of `CHUNK`; None where every group can be counted."""
    completions = len(exact.enumerate_completions(*shape, (EOS,))[0])
    if completions**group_size <= exact.MOST_GROUPS:
        return None
    return config.completions // group_size // CHUNK * CHUNK


def main(config: Config) -> None:
    check(config)
    start, folder = time.perf_counter(), open_results(config.results)
    rows, curves = [], {}
    with show_progress("group sizes", 0, len(config.shapes) * len(config.group_sizes)) as progress:
        for shape in config.shapes:
            curves[shape] = {}
            for group_size in sorted(config.group_sizes):
                groups = groups_to_sample(config, shape, group_size)
                sweep = make_sweep(make_run(shape, group_size, groups), make_mesh())
                found = jax.device_get(sweep({"seed": np.arange(config.problems)}))
                found = {name: x.astype(np.float64) for name, x in found.items()}
                curves[shape][group_size] = ratios(found, group_size)
                rows.append(row(shape, group_size, groups, found))
                progress.show(len(rows), {"variance": rows[-1]["equal completions"].value})
    draw(folder / "leave_one_out.png", curves[config.shapes[-1]])
    write_table(folder, rows, dataclasses.asdict(config) | {"seconds": time.perf_counter() - start})


def draw(path: Path, curves: dict[int, dict[str, Estimate]]) -> None:
    """Variance and bias over the size of the group, of one family of problems; bands are 95 % over problems."""
    sizes = np.array(list(curves))
    blue, orange, *_ = PALETTE

    def band(name: str) -> np.ndarray:
        return np.array([(low, value, high) for value, low, high in (curves[size][name] for size in curves)]).T

    with open_figure(path, ["Variance of RLOO's gradient", "Mean along the exact gradient"], 4.8, 3.6) as axes:
        variances, means = axes
        grouped = sizes > 1
        for name, label, colour in (
            ("equal", "equal completions of a prompt", blue),
            ("prompts", "a prompt for each group", orange),
        ):
            draw_band(variances, sizes[grouped], band(name)[:, grouped], label, colour)
        variances.plot(sizes[grouped], band("closed form")[1][grouped], "k.", markersize=5, label="closed form")
        draw_limit(variances, float(band("none")[1][0]), "no baseline")
        variances.set(ylabel="variance / that with the exact value as baseline", yscale="log")
        variances.set(yticks=[1, 2, 4, 8, 16], yticklabels=[1, 2, 4, 8, 16])
        draw_band(means, sizes[grouped], 1 + band("bias")[:, grouped], "leave one out", blue)
        draw_band(means, sizes, band("group mean"), "group mean", orange)
        means.plot(sizes, (sizes - 1) / sizes, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), label="(G − 1) / G")
        means.set(ylabel="share of its length", ylim=(0, 1.1))
        for each in axes:
            each.set(xscale="log", xlabel="G, completions in a group", xticks=sizes, xticklabels=sizes)
            each.minorticks_off()
            each.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    run_main(main, Config)
