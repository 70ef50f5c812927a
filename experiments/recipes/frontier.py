"""Reward against KL: where policies trained by RLOO come to lie, beside the most reward that there is at each KL.

    python experiments/recipes/frontier.py

Two cores of an Intel Xeon, JAX 0.10.2: 1.6 minutes of processor time.

Mock sentiment: tokens are positive, negative, neutral or the end, and the reward of a completion is its positive tokens
less its negative ones, over the most tokens it may have. A tabular policy over 4 tokens writes up to 5 of them to each
of 4 prompts, 364 completions a prompt, so that reward and KL are exact. It starts as its reference, a random one, and
is trained by RLOO with the KL in the reward: at 9 coefficients beta and at none, with 10 seeds, each with a reference
of its own, all rows of one program. The frontier is that of pi* ~ pi_ref exp(r / beta). The gap is how far a policy
lies below the frontier at its own KL, as a share of what the frontier gains there over the reference.

Published (Ziegler 2019, figure 3): reward rises with KL along a concave curve, the optimum, which for their mock
sentiment is estimated by sampling; policies tuned by PPO at several betas come to lie near it.

Measured, means and 95 % intervals over seeds: reproduced.

| beta | KL, nats        | optimum's KL | reward        | gap, %        |
|------|-----------------|--------------|---------------|---------------|
| 1    | 0.0284 ± 0.0037 | 0.02744      | 0.040 ± 0.026 | 1.80 ± 0.33   |
| 0.5  | 0.114 ± 0.014   | 0.1135       | 0.098 ± 0.029 | 0.455 ± 0.088 |
| 0.3  | 0.341 ± 0.037   | 0.3394       | 0.182 ± 0.036 | 0.190 ± 0.035 |
| 0.2  | 0.854 ± 0.073   | 0.8526       | 0.304 ± 0.042 | 0.118 ± 0.021 |
| 0.14 | 1.93 ± 0.14     | 1.924        | 0.481 ± 0.047 | 0.108 ± 0.016 |
| 0.1  | 3.66 ± 0.26     | 3.639        | 0.684 ± 0.048 | 0.112 ± 0.023 |
| 0.07 | 5.59 ± 0.32     | 5.539        | 0.845 ± 0.041 | 0.172 ± 0.049 |
| 0.05 | 6.97 ± 0.38     | 7.038        | 0.920 ± 0.035 | 0.97 ± 0.89   |
| 0.03 | 7.68 ± 0.37     | 8.503        | 0.947 ± 0.038 | 1.5 ± 1.1     |

The trained policies' curve is concave, the slope from each to the next between their two betas, which it would equal at
the optimum; and in 100 runs no policy, after any update, is above the frontier. At the lowest betas 2,000 updates are
too few for completions that the reference hardly ever writes. Without a penalty a run does not follow the frontier:
after 50 updates, at 2.2 nats, it lies 14.5 ± 1.9 % below, after 200, at 6.5 nats, 9.3 ± 3.5 %. Stopping early is no
substitute for the penalty; nor, quite, is the best of n, 12.8 ± 1.4 % below at n = 2 and 5.90 ± 0.73 % at 128.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.recipes.enumerable import completion_logprobs
from rl_jax.errors import InputError
from rl_jax.evaluation import Estimate, mean_interval
from rl_jax.keys import Purpose, step_key
from rl_jax.learner import init_state, policy_gradient_update
from rl_jax.models.tabular import init_table, tabular_logits
from rl_jax.reinforce import exact
from rl_jax.reinforce.distributions import entropy, exact_kl, token_logprobs
from rl_jax.reinforce.estimators import make_estimator
from rl_jax.reinforce.gradient import Scores
from rl_jax.run.figures import PALETTE, band_of, draw_band, open_figure
from rl_jax.run.loop import run_main
from rl_jax.run.spmd import make_mesh
from rl_jax.run.tables import open_results, write_table
from rl_jax.sweep import make_sweep, product_grid
from rl_jax.types import Array, Metrics, Rollout, TrainState

EOS, POSITIVE, NEGATIVE = 0, 1, 2
COEFFICIENTS = np.geomspace(1e-3, 30.0, 600, dtype=np.float32)  # of the policies that make up the frontier


@dataclasses.dataclass(frozen=True)
class Config:
    """Reward and exact KL of policies trained at many KL coefficients, beside the frontier."""

    kl_coefficients: tuple[float, ...] = (1.0, 0.5, 0.3, 0.2, 0.14, 0.1, 0.07, 0.05, 0.03)
    """Reward units a nat, from the highest; a run without any is added."""
    best_of: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    """The n of the best of n that are drawn beside."""
    path: tuple[int, ...] = (50, 100, 200, 400, 800)
    """Updates at which the run without a KL coefficient has rows in the table."""
    seeds: int = 10
    """Runs of each coefficient, each with a reference policy of its own."""
    prompts: int = 4
    """Prompts, all of them in every batch."""
    vocab_size: int = 4
    """Tokens: the end, a positive one, a negative one, and neutral ones."""
    length: int = 5
    """Most tokens of a completion."""
    group_size: int = 16
    """Completions of each prompt in a batch."""
    updates: int = 2000
    """Updates of a run."""
    learning_rate: float = 0.05
    """Adam's, falling to 0 along a line."""
    results: Path = Path("results/frontier")
    """Folder that the table and the figure are written to."""


def sentiment(rollout: Rollout) -> Array:
    """Positive tokens less negative ones, over C. [B]."""
    signs = jnp.where(rollout.completions == POSITIVE, 1.0, jnp.where(rollout.completions == NEGATIVE, -1.0, 0.0))
    return jnp.mean(jnp.where(rollout.completion_mask, signs, 0.0), axis=1)


def every_completion(config: Config) -> Rollout:
    """Of every prompt. B = N * K."""
    prompts = np.arange(config.prompts, dtype=np.int32)[:, None]
    return exact.enumerated_rollout(prompts, prompts >= 0, config.vocab_size, config.length, (EOS,))


def reference(config: Config, seed: Array) -> Array:
    """The logits of a seed's reference policy. [N, S, V]."""
    return init_table(step_key(seed, Purpose.INIT), config.prompts, config.vocab_size, config.length)


def score_fn(table: Array, rollout: Rollout, ref_logits: Array) -> Scores:
    """A tabular policy as the library asks for one."""
    logits = tabular_logits(table, rollout)
    return Scores(token_logprobs(logits, rollout.completions), entropy(logits), exact_kl(logits, ref_logits))


def place(logprobs: Array, ref_logprobs: Array, rewards: Array) -> Metrics:
    """Where a policy lies, the mean over the prompts, exact. [N, K] each -> "kl", nats a completion, and "reward"."""
    kl = jnp.mean(exact.sequence_kl(logprobs, ref_logprobs))
    return {"kl": kl, "reward": exact.objective(logprobs, ref_logprobs, rewards, 0.0)}


def make_run(config: Config) -> Callable[[dict[str, Array]], Metrics]:
    """A run: "seed" and "kl_coefficient" [] -> where the policy lies before each update, and after all. [U + 1]."""
    completions = every_completion(config)
    rewards = sentiment(completions).reshape(config.prompts, -1)
    optimizer = optax.adam(optax.linear_schedule(config.learning_rate, 0.0, config.updates))
    estimator = make_estimator("rloo")

    def run(setting: dict[str, Array]) -> Metrics:
        ref_table = reference(config, setting["seed"])

        def sequences(tokens: Array) -> Array:
            return exact.sequence_logprobs(tokens, completions.completion_mask, config.prompts)

        def placed(tokens: Array) -> Metrics:
            return place(sequences(tokens), sequences(completion_logprobs(ref_table, completions)), rewards)

        def update(state: TrainState, step: Array) -> tuple[TrainState, Metrics]:
            tokens = completion_logprobs(state.params, completions)
            key = step_key(setting["seed"], Purpose.SAMPLE, step)
            rollout = exact.draw_groups(key, completions, tokens, config.prompts, config.group_size)
            ref_logits = tabular_logits(ref_table, rollout)
            updated, _ = policy_gradient_update(
                state,
                rollout,
                sentiment(rollout),
                estimator=estimator,
                score_fn=score_fn,
                optimizer=optimizer,
                group_size=config.group_size,
                ref_logprobs=token_logprobs(ref_logits, rollout.completions),
                context=ref_logits,
            )
            return updated, placed(tokens)

        state = init_state(ref_table, optimizer, setting["kl_coefficient"])
        state, path = jax.lax.scan(update, state, jnp.arange(config.updates))
        end = placed(completion_logprobs(state.params, completions))
        return {name: jnp.append(path[name], end[name]) for name in path}

    return run


def make_limits(config: Config) -> Callable[[dict[str, Array]], Metrics]:
    """What a reference policy, from its "seed" [], allows.

    Returns:
        "kl" and "reward" of the optimal policy at each of `COEFFICIENTS`, and the "objective" that it has [M];
        "optimal_kl", at each of the config's; and "best_kl" and "best_reward" of the best of each n.
    """
    completions = every_completion(config)
    rewards = sentiment(completions).reshape(config.prompts, -1)

    def limits(setting: dict[str, Array]) -> Metrics:
        tokens = completion_logprobs(reference(config, setting["seed"]), completions)
        ref_logprobs = exact.sequence_logprobs(tokens, completions.completion_mask, config.prompts)
        kl, reward = exact.frontier(ref_logprobs, rewards, jnp.asarray(COEFFICIENTS))
        objective = jax.vmap(lambda beta: exact.optimal_policy(ref_logprobs, rewards, beta)[1])(COEFFICIENTS)
        optimal_kl, _ = exact.frontier(ref_logprobs, rewards, jnp.asarray(config.kl_coefficients))
        best = [
            place(exact.best_of_n_logprobs(ref_logprobs, rewards, n), ref_logprobs, rewards) for n in config.best_of
        ]
        return {
            "kl": kl,
            "reward": reward,
            "objective": objective,
            "optimal_kl": optimal_kl,
            "best_kl": jnp.stack([found["kl"] for found in best]),
            "best_reward": jnp.stack([found["reward"] for found in best]),
        }

    return limits


def frontier_reward(objective: np.ndarray, kl: np.ndarray) -> np.ndarray:
    """The most reward that there is at a KL: no policy has E[r] - beta KL above the optimum, whatever beta.

    Args:
        objective: the optimum at each of `COEFFICIENTS`, of each seed. [seeds, M].
        kl: nats a completion. [..., seeds].

    Returns:
        The least of optimum + beta KL over the coefficients, which is no less than the frontier. [..., seeds].
    """
    return np.min(objective + COEFFICIENTS * kl[..., None], axis=-1)


class Places(NamedTuple):
    """Where policies lie, and what their seeds allow. Each [..., seeds].

    Attributes:
        kl: nats a completion.
        reward: of the policy.
        most: the most reward there is at that KL.
        gap: what it lacks of that, as a share of what that has over the reference; not a number at no KL.
    """

    kl: np.ndarray
    reward: np.ndarray
    most: np.ndarray
    gap: np.ndarray


def compare(kl: np.ndarray, reward: np.ndarray, objective: np.ndarray, start: np.ndarray) -> Places:
    """Policies [..., seeds] beside the frontier of their seeds.

    `objective` is as in `frontier_reward`, [seeds, M], and `start` the reward of each seed's reference, [seeds].
    """
    most = frontier_reward(objective, kl)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Places(kl, reward, most, np.where(kl > 0, (most - reward) / (most - start), np.nan))


def row(
    policy: str, places: Places, coefficient: float | None = None, optimum: np.ndarray | None = None
) -> dict[str, Any]:
    """A line of the table, of one policy a seed; intervals are 95 % over seeds."""
    kl, reward, most, gap = map(mean_interval, places)
    return {
        "policy": policy,
        "beta": coefficient,
        "KL, nats": kl,
        "optimum's KL": None if optimum is None else float(optimum.mean()),
        "reward": reward,
        "most at that KL": most.value,
        "gap, %": Estimate(*(100 * x for x in gap)),
    }


def check(config: Config) -> None:
    """Raise InputError for settings that cannot work, before the long work."""
    if not config.kl_coefficients or not all(
        COEFFICIENTS[0] <= beta <= COEFFICIENTS[-1] for beta in config.kl_coefficients
    ):
        raise InputError(f"kl_coefficients are {config.kl_coefficients}; give some, from 0.001 to 30.")
    if config.vocab_size < 3 or config.group_size < 2 or config.seeds < 2:
        raise InputError("Three tokens, groups of 2 and two seeds are the least.")
    if not config.best_of or min((config.prompts, config.updates, *config.best_of)) < 1:
        raise InputError("One prompt, one update and the best of 1 are the least.")
    if not all(0 < update <= config.updates for update in config.path):
        raise InputError(f"path is {config.path}; its updates must be from 1 to {config.updates}.")
    exact.enumerate_completions(config.vocab_size, config.length, (EOS,))


def main(config: Config) -> None:
    check(config)
    began, folder = time.perf_counter(), open_results(config.results)
    grid = product_grid(kl_coefficient=(*config.kl_coefficients, 0.0), seed=range(config.seeds))
    limits = jax.device_get(make_sweep(make_limits(config), make_mesh())({"seed": grid["seed"][: config.seeds]}))
    runs = jax.device_get(make_sweep(make_run(config), make_mesh())(grid))
    # From [coefficients * seeds, U + 1] to [coefficients, U + 1, seeds].
    runs = {name: x.reshape(-1, config.seeds, config.updates + 1).swapaxes(1, 2) for name, x in runs.items()}
    start, objective = runs["reward"][0, 0], limits["objective"]
    trained = compare(runs["kl"], runs["reward"], objective, start)
    best = compare(limits["best_kl"].T, limits["best_reward"].T, objective, start)
    rows = [
        row("RLOO", take(trained, (number, -1)), beta, limits["optimal_kl"][:, number])
        for number, beta in enumerate(config.kl_coefficients)
    ]
    for above, line in itertools.pairwise(rows):
        rise, run = (line[name].value - above[name].value for name in ("reward", "KL, nats"))
        line["slope from the last"] = rise / run if run else None
    rows += [row(f"RLOO, {update} updates", take(trained, (-1, update)), 0.0) for update in config.path]
    rows.append(row("RLOO", take(trained, (-1, -1)), 0.0))
    rows += [row(f"best of {n}", take(best, number)) for number, n in enumerate(config.best_of)]
    draw(folder / "frontier.png", config, limits, trained, best)
    about = {"seconds": time.perf_counter() - began, "least_gap": float(np.min(trained.most - trained.reward))}
    write_table(folder, rows, dataclasses.asdict(config) | about)


def take(places: Places, index: Any) -> Places:
    """Some of many policies, by an index of what stands before the seeds."""
    return Places(*(values[index] for values in places))


def draw(path: Path, config: Config, limits: dict[str, np.ndarray], trained: Places, best: Places) -> None:
    """Reward over KL, means over seeds, and the gap to the frontier over KL, with bands of 95 % over seeds."""
    blue, orange, black, green, *_ = PALETTE
    ends, course = take(trained, (slice(-1), -1)), take(trained, (-1, slice(1, None)))
    thinned = take(course, np.unique(np.geomspace(1, config.updates, 120).astype(int)) - 1)
    with open_figure(path, ["Reward over KL", "Gap to the frontier at the same KL"], 4.8, 3.8) as (rewards, gaps):
        # At the same coefficient the means over seeds are the frontier of all seeds' problems together.
        rewards.plot(limits["kl"].mean(axis=0), limits["reward"].mean(axis=0), color=black, label="frontier")
        for places, colour, marker, label in (
            (ends, blue, "o", "RLOO, trained at each beta"),
            (best, green, "x", "best of n"),
            (thinned, orange, "", "RLOO without a penalty, over updates"),
        ):
            kl, reward = places.kl.mean(axis=1), places.reward.mean(axis=1)
            line = "" if marker else "-"
            rewards.plot(kl, reward, color=colour, linestyle=line, marker=marker, markersize=5, label=label)
            draw_band(gaps, kl, band_of(map(mean_interval, 100 * places.gap)), label, colour)
        rewards.set(xlabel="KL, nats a completion", ylabel="positive less negative tokens, share", xlim=(0, None))
        gaps.set(xlabel="KL, nats a completion", ylabel="% of the frontier's gain", xlim=(0, None), ylim=(0, None))
        rewards.legend(loc="lower right")


if __name__ == "__main__":
    run_main(main, Config)
