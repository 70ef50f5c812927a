"""Rollout and update as the experiments map them: each device works through its own sequences, at its own pace."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rl_jax.microbatch import Part, SumParts
from rl_jax.models.transformer import TransformerConfig
from rl_jax.packing import choose_packing, sum_over_rows
from rl_jax.reinforce.gradient import ScoreFn
from rl_jax.run.spmd import SUM, batch_parts, each_device, has_whole_models
from rl_jax.sampling import Sampling
from rl_jax.scoring import make_packed_score_fn, packed_reference_scores
from rl_jax.slots import generate_in_slots
from rl_jax.types import Array, PyTree, Rollout

GenerateFn = Callable[[PyTree, Array, Array, Array, Array], Rollout]
"""Params, key, prompts [N, P], mask, index [N] -> completions."""

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

    def reference_scores(ref_params: PyTree, rollout: Rollout) -> tuple[Array, Array]:
        return packed_reference_scores(ref_params, rollout, config, sampling, packing)

    def sum_parts(fn: Part, batch: PyTree) -> tuple[PyTree, PyTree]:
        return at_own_pace(functools.partial(sum_over_rows, packing=packing), (None, 0), (SUM, 0))(fn, batch)

    def at_own_pace(fn: Callable[..., Any], in_axes: tuple[PyTree, ...], out_axes: PyTree) -> Callable[..., Any]:
        return each_device(fn, mesh, in_axes, out_axes) if packing.groups == 1 else fn

    return Learning(
        reference_scores=at_own_pace(reference_scores, (None, 0), 0),
        make_score_fn=lambda ref_params: make_packed_score_fn(ref_params, config, sampling, packing),
        sum_parts=sum_parts,
    )


def prompt_indices(prompts: Array) -> Array:
    """Of a batch that is no part of another. [N, P] -> int32 [N]."""
    return jnp.arange(len(prompts), dtype=jnp.int32)
