"""Prompts to completions: prefill once for each prompt, then cached decoding in one compiled loop.

Letters: N prompts, G completions of each, B = N * G sequences, P prompt length, C completion length.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rl_jax.errors import InputError
from rl_jax.models.config import TransformerConfig
from rl_jax.models.transformer import Cache, decode_step, logits, prefill
from rl_jax.sampling import Sampling, draw, is_greedy, warp_logits
from rl_jax.types import Array, PyTree, Rollout


class _Decoding(NamedTuple):
    """The loop's carry. `index` is the number of completion tokens sampled so far."""

    index: Array
    cache: Cache
    tokens: Array
    completions: Array
    logprobs: Array
    mask: Array
    ended: Array


def check_lengths(prompt_length: int, sampling: Sampling, config: TransformerConfig) -> None:
    """Raise InputError where prompt and completion do not fit the context."""
    if prompt_length + sampling.length > config.context:
        raise InputError(
            f"A prompt of {prompt_length} tokens and a completion of {sampling.length} need a context of "
            f"{prompt_length + sampling.length}; the model's is {config.context}. Shorten one of them."
        )


def sequence_uniforms(key: Array, index: Array, sampling: Sampling) -> Array:
    """One uniform number a token, from one key a sequence, from its global index. [N] -> [B, C]."""
    group = sampling.group_size
    sequences = (index[:, None] * group + jnp.arange(group)[None, :]).reshape(-1)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, sequences)
    return jax.vmap(lambda sequence_key: jax.random.uniform(sequence_key, (sampling.length,)))(keys)


def sample_tokens(scores: Array, uniforms: Array, sampling: Sampling) -> tuple[Array, Array]:
    """Tokens int32 [B] and their log-probabilities [B], from logits [B, V] and uniform numbers [B]."""
    if is_greedy(sampling):
        return jnp.argmax(scores, axis=-1).astype(jnp.int32), jnp.zeros(len(scores))
    return draw(warp_logits(scores, sampling), uniforms)


def compute_params(params: PyTree, config: TransformerConfig) -> PyTree:
    """Matrices in the compute dtype, once, so that no step of a loop casts them again."""
    return jax.tree.map(lambda x: x.astype(config.dtype) if x.ndim > 1 else x, params)


def generate(
    params: PyTree,
    key: Array,
    prompts: Array,
    prompt_mask: Array,
    config: TransformerConfig,
    sampling: Sampling,
    index: Array | None = None,
) -> Rollout:
    """Sample a group of completions for each prompt: the plain form, which `slots.generate_in_slots` is held against.

    The loop ends when every completion has, or at C tokens. What a sequence samples depends on its own prompt,
    `key` and its index alone: neither on the batch around it nor on the number of devices.

    Args:
        params: the policy's parameters.
        key: the key of this step.
        prompts: token ids, left-padded. int32 [N, P].
        prompt_mask: true on real tokens; every prompt has one. bool [N, P].
        config: the policy's configuration.
        sampling: group size, length and distribution.
        index: global index of each prompt, where `prompts` is part of a larger batch. int32 [N]; default 0 to N - 1.

    Returns:
        A Rollout of B = N * G sequences, groups consecutive. Its `behavior_logprobs` are under the distribution
        sampled from, temperature and filters included; they are 0 for greedy decoding.

    Raises:
        InputError: prompt and completion do not fit the context.
    """
    chex.assert_rank([prompts, prompt_mask], 2)
    chex.assert_equal_shape([prompts, prompt_mask])
    check_lengths(prompts.shape[1], sampling, config)
    index = jnp.arange(prompts.shape[0]) if index is None else index
    uniforms = sequence_uniforms(key, index, sampling)
    rows, prompt_length = uniforms.shape[0], prompts.shape[1]
    stops = jnp.array(() if sampling.ignore_eos else sampling.eos, jnp.int32)
    params = compute_params(params, config)

    def record(carry: _Decoding, states: Array) -> _Decoding:
        uniform = jax.lax.dynamic_index_in_dim(uniforms, carry.index, axis=1, keepdims=False)
        tokens, logprobs = sample_tokens(logits(params, states, config), uniform, sampling)
        live = ~carry.ended
        tokens, logprobs = jnp.where(live, tokens, 0), jnp.where(live, logprobs, 0.0)
        write = jax.lax.dynamic_update_index_in_dim
        return carry._replace(
            index=carry.index + 1,
            tokens=tokens,
            completions=write(carry.completions, tokens, carry.index, 1),
            logprobs=write(carry.logprobs, logprobs, carry.index, 1),
            mask=write(carry.mask, live, carry.index, 1),
            ended=carry.ended | (live & jnp.any(tokens[:, None] == stops[None, :], axis=1)),
        )

    def unfinished(carry: _Decoding) -> Array:
        return (carry.index < sampling.length) & ~jnp.all(carry.ended)

    def advance(carry: _Decoding) -> _Decoding:
        states, cache = decode_step(params, carry.cache, carry.tokens, prompt_length + carry.index - 1, config)
        return record(carry._replace(cache=cache), states)

    states, cache = prefill(params, prompts, prompt_mask, config, prompt_length + sampling.length)
    states, cache = jax.tree.map(lambda x: jnp.repeat(x, sampling.group_size, axis=0), (states, cache))
    shape = (rows, sampling.length)
    empty = _Decoding(
        index=jnp.int32(0),
        cache=cache,
        tokens=jnp.zeros(rows, jnp.int32),
        completions=jnp.zeros(shape, jnp.int32),
        logprobs=jnp.zeros(shape),
        mask=jnp.zeros(shape, bool),
        ended=jnp.zeros(rows, bool),
    )
    final = jax.lax.while_loop(unfinished, advance, record(empty, states))
    return Rollout(
        prompts=jnp.repeat(prompts, sampling.group_size, axis=0),
        prompt_mask=jnp.repeat(prompt_mask, sampling.group_size, axis=0),
        completions=final.completions,
        completion_mask=final.mask,
        behavior_logprobs=final.logprobs,
        truncated=~final.ended,
    )


def refill_groups(batch: PyTree, fresh: PyTree, wanting: Array, usable: Array) -> PyTree:
    """A batch whose wanting groups are replaced, in order, by the usable ones of a fresh batch, as far as these go.

    Args:
        batch: a pytree of arrays [N * G, ...], groups consecutive.
        fresh: as `batch`.
        wanting: groups of the batch to replace. bool [N].
        usable: groups of the fresh batch to take. bool [N].
    """
    groups = len(wanting)
    taken = wanting & (jnp.cumsum(wanting) <= jnp.sum(usable))
    source = jnp.argsort(~usable, stable=True)[jnp.maximum(jnp.cumsum(wanting) - 1, 0)]

    def merge(old: Array, new: Array) -> Array:
        old, new = (x.reshape(groups, -1, *x.shape[1:]) for x in (old, new))
        chosen = taken.reshape(groups, *[1] * (old.ndim - 1))
        return jnp.where(chosen, new[source], old).reshape(-1, *old.shape[2:])

    return jax.tree.map(merge, batch, fresh)
