"""RL of the recipe `overoptimization`: RLOO against learned rewards, many runs as the rows of one program.

Letters: R runs, K members of a proxy, N prompts to evaluate on, C completion length.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.recipes.overoptimization_models import Gold, Prompts, gold_reward, take
from rl_jax.keys import Purpose, step_key
from rl_jax.learner import init_state, policy_gradient_update
from rl_jax.models.config import TransformerConfig
from rl_jax.reinforce.estimators import make_estimator
from rl_jax.rewards.learned import Combination, learned_reward, mean_minus_spread_reward, mean_reward, minimum_reward
from rl_jax.rollout import generate
from rl_jax.run.spmd import make_mesh
from rl_jax.sampling import Sampling
from rl_jax.scoring import Reference, completion_states, make_score_fn, reference_scores, score_completions
from rl_jax.sweep import make_sweep
from rl_jax.types import Array, Metrics, PyTree, Rollout, TrainState

GROUP_SIZE = 4  # completions of a prompt in an update
EVALUATED = 2  # completions of a prompt at a point


class Tuning(NamedTuple):
    """How a policy is tuned.

    Attributes:
        points: of its curve.
        updates: between points.
        batch_size: prompts in an update, with four completions each.
        rate: Adam's learning rate.
    """

    points: int
    updates: int
    batch_size: int
    rate: float


class Problem(NamedTuple):
    """What all runs share.

    Attributes:
        policy: parameters of the reference policy.
        gold: the gold reward.
        trained: prompts of RL.
        evaluated: prompts of the curve. [N, ...].
    """

    policy: PyTree
    gold: Gold
    trained: Prompts
    evaluated: Prompts


class Shapes(NamedTuple):
    """Configurations of the policy and the proxies."""

    policy: TransformerConfig
    proxy: TransformerConfig


def combinations(spread_weight: float) -> dict[str, Combination]:
    """How the rewards of a proxy's members become one, by name; [K, B] -> [B] each."""
    return {
        "single": mean_reward,
        "mean": mean_reward,
        "minimum": minimum_reward,
        "mean less spread": partial(mean_minus_spread_reward, spread_weight=spread_weight),
    }


def tune(
    shapes: Shapes,
    problem: Problem,
    tuning: Tuning,
    completion_length: int,
    spread_weight: float,
    rows: dict[str, PyTree],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Policies tuned by RLOO, each against a proxy of its own; keys, prompts and all else are a function of its seed.

    Args:
        shapes: of the models.
        problem: what the runs share.
        tuning: how.
        completion_length: C.
        spread_weight: see `combinations`.
        rows: of each run "seed"; "kl_coefficient"; "combination", its place in `combinations`; and "proxy", the
            parameters [R, K, ...].

    Returns:
        At each point "gold", "proxy" and "kl" (exact, nats a completion), means over 2 N completions, [R, points]; and
        the last of these completions, int32 [R, 2 N, C].
    """
    sampling = Sampling(length=completion_length, group_size=GROUP_SIZE)
    few = dataclasses.replace(sampling, group_size=EVALUATED)
    estimator = make_estimator("rloo")
    every = tuple(combinations(spread_weight).values())
    optimizer = optax.flatten(optax.adam(tuning.rate))

    def run(row: dict[str, PyTree], problem: Problem) -> tuple[Metrics, Array]:
        score_fn = make_score_fn(problem.policy, shapes.policy, sampling)

        def proxy(rollout: Rollout) -> Array:
            def combine(rewards: Array) -> Array:
                return jnp.stack([combination(rewards) for combination in every])[row["combination"]]

            return learned_reward(row["proxy"], rollout, shapes.proxy, combine)

        def update(state: TrainState, step: Array) -> tuple[TrainState, None]:
            shuffle, key = (step_key(row["seed"], purpose, step) for purpose in (Purpose.SHUFFLE, Purpose.SAMPLE))
            chosen = jax.random.randint(shuffle, (tuning.batch_size,), 0, len(problem.trained.tokens))
            prompts = take(problem.trained, chosen)
            rollout = generate(state.params, key, prompts.tokens, prompts.mask, shapes.policy, sampling)
            ref_logprobs, ref_states = reference_scores(problem.policy, rollout, shapes.policy, sampling)
            state, _ = policy_gradient_update(
                state,
                rollout,
                proxy(rollout),
                estimator=estimator,
                score_fn=score_fn,
                optimizer=optimizer,
                group_size=GROUP_SIZE,
                ref_logprobs=ref_logprobs,
                context=ref_states,
            )
            return state, None

        def measure(params: PyTree, point: Array) -> tuple[Metrics, Array]:
            key = step_key(row["seed"], Purpose.EVALUATE, point)
            tokens, mask = problem.evaluated
            rollout = generate(params, key, tokens, mask, shapes.policy, few)
            reference = Reference(problem.policy, completion_states(problem.policy, rollout, shapes.policy))
            scores = score_completions(params, rollout, shapes.policy, few, reference)
            gold = gold_reward(problem.gold, rollout)
            means = {"gold": gold, "proxy": proxy(rollout), "kl": jnp.sum(scores.kl, axis=1)}
            return {name: jnp.mean(values) for name, values in means.items()}, rollout.completions

        def point(carry: tuple[TrainState, Array], number: Array) -> tuple[tuple[TrainState, Array], Metrics]:
            steps = number * tuning.updates + jnp.arange(tuning.updates)
            state, _ = jax.lax.scan(update, carry[0], steps)
            means, completions = measure(state.params, number)
            return (state, completions), means

        shape = (EVALUATED * len(problem.evaluated.tokens), completion_length)
        state = init_state(problem.policy, optimizer, row["kl_coefficient"])
        (_, completions), means = jax.lax.scan(point, (state, jnp.zeros(shape, jnp.int32)), jnp.arange(tuning.points))
        return means, completions

    return jax.device_get(make_sweep(run, make_mesh())(rows, problem))
