"""Rollout and update as the experiments map them: each device works through its own sequences, at its own pace."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.tree_util import Partial

from rl_jax.learner import policy_gradient_update
from rl_jax.microbatch import SumParts, sum_over_microbatches
from rl_jax.models.config import TransformerConfig
from rl_jax.packing import choose_packing, sum_over_rows
from rl_jax.reinforce.composition import Estimator
from rl_jax.reinforce.gradient import ScoreFn, Scores
from rl_jax.run.spmd import SUM, batch_parts, each_device, has_whole_models
from rl_jax.sampling import Sampling
from rl_jax.scoring import make_score_fn, reference_scores
from rl_jax.slots import generate_in_slots
from rl_jax.types import Array, Metrics, PyTree, Rollout, TrainState

GenerateFn = Callable[[PyTree, Array, Array, Array, Array], Rollout]
"""Params, key, prompts [N, P], mask, index [N] -> completions."""

UpdateFn = Callable[..., tuple[TrainState, Metrics]]
"""State, reference's params, key, rollout, rewards [B], and the greedy completions' [B] where the estimator has them ->
state and metrics of `policy_gradient_update`."""

TOKENS_AT_ONCE = {"cpu": 512}  # in the update; there the caches count, and elsewhere that there is enough to do
MANY_TOKENS = 16384


class Learning(NamedTuple):
    """An update without padding.

    Attributes:
        reference_scores: the reference's params, rollout -> as `scoring.reference_scores`.
        make_score_fn: the reference's params -> the score function that `sum_parts` is for.
        sum_parts: for `policy_gradient_update`.
    """

    reference_scores: Callable[[PyTree, Rollout], tuple[Array, Array]]
    make_score_fn: Callable[[PyTree], ScoreFn]
    sum_parts: SumParts


def make_generate(config: TransformerConfig, sampling: Sampling, mesh: Mesh, slots: int = 0) -> GenerateFn:
    """Sampling in slots that refill, so many in all, shared by the devices; 0 for as many as there are sequences."""

    def generate(params: PyTree, key: Array, prompts: Array, mask: Array, index: Array) -> Rollout:
        return generate_in_slots(params, key, prompts, mask, config, sampling, index, -(-slots // batch_parts(mesh)))

    return each_device(generate, mesh, (None, None, 0, 0, 0), 0)


def make_learning(
    config: TransformerConfig, sampling: Sampling, mesh: Mesh, prompt_length: int, tokens_at_once: int = 0
) -> Learning:
    """An update that works through about so many tokens at once on each device; 0 for what suits the device."""
    tokens = tokens_at_once or TOKENS_AT_ONCE.get(jax.default_backend(), MANY_TOKENS)
    packing = choose_packing(prompt_length, sampling.length, sampling.group_size, config.width, tokens)
    if not has_whole_models(mesh):  # the devices need each other's parts of the parameters, at the same time
        packing = packing._replace(groups=batch_parts(mesh))

    def at_own_pace(fn: Callable[..., Any], out_axes: PyTree) -> Callable[..., Any]:
        return each_device(fn, mesh, (None, 0), out_axes) if packing.groups == 1 else fn

    score_reference = functools.partial(reference_scores, config=config, sampling=sampling, packing=packing)
    return Learning(
        reference_scores=at_own_pace(score_reference, 0),
        make_score_fn=lambda ref_params: make_score_fn(ref_params, config, sampling, packing),
        sum_parts=at_own_pace(functools.partial(sum_over_rows, packing=packing), (SUM, 0)),
    )


def make_sum_microbatches(mesh: Mesh, microbatches: int) -> SumParts:
    """Microbatches, of which each device adds up its own, so that the devices add up what they have once.

    Where they do not have whole models they need each other in every microbatch, and keep in step.
    """
    sum_own = functools.partial(sum_over_microbatches, microbatches=microbatches)
    return each_device(sum_own, mesh, (None, 0), (SUM, 0)) if has_whole_models(mesh) else sum_own


def make_update(
    learning: Learning,
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    group_size: int,
    noise_at_once: int = 0,
    whole: Callable[[PyTree, PyTree], PyTree] = lambda _, params: params,
) -> UpdateFn:
    """One step of an estimator, from the reference's scores to the new state; the numbers are those of its parts.

    Where only a part of the policy is trained, the reference is the rest of it too: `whole` puts both together.
    """

    def update(
        state: TrainState,
        ref_params: PyTree,
        key: Array,
        rollout: Rollout,
        rewards: Array,
        greedy_rewards: Array | None = None,
    ) -> tuple[TrainState, Metrics]:
        def score(ref_params: PyTree, params: PyTree, rollout: Rollout, ref_states: Array) -> Scores:
            return learning.make_score_fn(ref_params)(whole(ref_params, params), rollout, ref_states)

        ref_logprobs, ref_states = learning.reference_scores(ref_params, rollout)
        return policy_gradient_update(
            state,
            rollout,
            rewards,
            estimator=estimator,
            score_fn=Partial(score, ref_params),
            sum_parts=learning.sum_parts,
            optimizer=optimizer,
            group_size=group_size,
            ref_logprobs=ref_logprobs,
            context=ref_states,
            greedy_rewards=greedy_rewards,
            key=key,
            noise_at_once=noise_at_once,
        )

    return update


def prompt_indices(prompts: Array) -> Array:
    """Of a batch that is no part of another. [N, P] -> int32 [N]."""
    return jnp.arange(len(prompts), dtype=jnp.int32)
