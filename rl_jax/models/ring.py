"""A key-value cache for slots whose sequences begin at different steps: the prompt of each, and a ring of columns.

All slots write to one column a step, whichever token of their own sequence they are at, so writing is one contiguous
update; a slot sees as many columns back as its completion is long. Attention does not mind the order of columns,
since a key holds its position.

Letters: S slots, N prompts, P prompt length, H heads, J key-value heads, K head size, D width; a ring is R blocks of W
columns.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rl_jax.models.attention import Focus, capped
from rl_jax.models.config import TransformerConfig
from rl_jax.models.transformer import Pairs, step_states
from rl_jax.types import Array, PyTree

BLOCK = 32  # columns: what attention to the filled part of a ring is rounded up to


class Ring(NamedTuple):
    """What the slots remember.

    Attributes:
        prompts: keys and values of the prompt that each slot completes, for each layer. [S, J, P, K].
        prompt_mask: true on its real tokens. bool [S, P].
        blocks: keys and values of completion tokens, for each layer. [R, S, J, W, K].
    """

    prompts: Pairs
    prompt_mask: Array
    blocks: Pairs


class _Seen(NamedTuple):
    """Attention to some columns that can be merged with attention to others (Milakov 2018, Dao 2022): the largest
    logit, and relative to it the sum of weights [S, J, G] and of weighted values [S, J, G, K]. float32."""

    highest: Array
    weight: Array
    values: Array


def empty_ring(prompts: Pairs, slots: int, length: int) -> Ring:
    """A ring for completions of at most `length` tokens.

    Args:
        prompts: keys and values of prompts, which give shapes and types. [N, J, P, K] a layer.
        slots: S.
        length: C, tokens.
    """
    width = min(BLOCK, length)
    kv_heads, prompt_length, size = prompts[0][0].shape[1:]
    rings = (-(-length // width), slots, kv_heads, width, size)
    return Ring(
        prompts=jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype), prompts),
        prompt_mask=jnp.zeros((slots, prompt_length), bool),
        blocks=jax.tree.map(lambda x: jnp.zeros(rings, x.dtype), prompts),
    )


def take_prompts(ring: Ring, prompts: Pairs, mask: Array, chosen: Array, fresh: Array) -> Ring:
    """The ring after fresh slots [S] have taken the prompts with the chosen numbers, int32 [S]."""

    def take(old: Array, new: Array) -> Array:
        return jnp.where(fresh.reshape(-1, *[1] * (new.ndim - 1)), new[chosen], old)

    return ring._replace(prompts=jax.tree.map(take, ring.prompts, prompts), prompt_mask=take(ring.prompt_mask, mask))


def take_slots(ring: Ring, chosen: Array) -> Ring:
    """The ring of the slots with the chosen numbers alone, int32 [S']."""
    return Ring(
        prompts=jax.tree.map(lambda x: x[chosen], ring.prompts),
        prompt_mask=ring.prompt_mask[chosen],
        blocks=jax.tree.map(lambda x: x[:, chosen], ring.blocks),
    )


def ring_step(
    params: PyTree, ring: Ring, tokens: Array, step: Array, ages: Array, config: TransformerConfig
) -> tuple[Array, Ring]:
    """Append one token to the sequence of every slot.

    Args:
        params: the model's parameters.
        ring: as the step before left it.
        tokens: int32 [S].
        step: how many steps have been before. int32 [].
        ages: tokens of its completion that each slot has then seen, this one included; 0 for a slot whose result
            nothing reads. int32 [S].
        config: the model's configuration.

    Returns:
        The state [S, D] that predicts the token after, and the ring with this token's column written.
    """
    positions = jnp.sum(ring.prompt_mask, axis=1, dtype=jnp.int32) + jnp.maximum(ages, 1) - 1
    looks = [
        Partial(_look_back, prompt, ring.prompt_mask, blocks, step, ages)
        for prompt, blocks in zip(ring.prompts, ring.blocks, strict=True)
    ]
    states, blocks = step_states(params, tokens, positions, looks, config)
    return states, ring._replace(blocks=blocks)


def _look_back(
    prompt: tuple[Array, Array],
    prompt_mask: Array,
    blocks: tuple[Array, Array],
    step: Array,
    ages: Array,
    query: Array,
    key: Array,
    value: Array,
    focus: Focus,
) -> tuple[Array, tuple[Array, Array]]:
    """At the prompt and the columns of the slot's own completion, once the new keys and values are written."""
    count, slots, kv_heads, width, size = blocks[0].shape
    column = step % (count * width)
    at = (column // width, 0, 0, column % width, 0)
    blocks = jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice(x, new[None], at), blocks, (key, value))
    grouped = query.reshape(slots, kv_heads, -1, size)
    near = ages
    if focus.window:
        near = jnp.minimum(ages, focus.window)
        prompt_ago = jnp.arange(prompt_mask.shape[1])[::-1][None, :] + ages[:, None]
        prompt_mask = prompt_mask & (prompt_ago < focus.window)

    def look_at(block: Array | int, keys: Array, values: Array) -> _Seen:
        columns_ago = (column - block * width - jnp.arange(width)) % (count * width)
        return _look(grouped, keys, values, columns_ago[None, :] < near[:, None], focus.cap)

    def as_float32(x: Array) -> Array:
        return x.astype(jnp.float32)  # a block is copied anyway, and batched bfloat16 products are slow on a CPU

    def look_at_filled() -> _Seen:
        longest = jnp.max(near)
        first = (step - longest + 1) // width
        filled = jnp.minimum(jnp.where(longest > 0, step // width - first + 1, 0), count)

        def add(number: Array, seen: _Seen) -> _Seen:
            block = (first + number) % count
            keys, values = (as_float32(jax.lax.dynamic_index_in_dim(x, block, keepdims=False)) for x in blocks)
            return _merge(seen, look_at(block, keys, values))

        first_seen = _look(grouped, as_float32(prompt[0]), as_float32(prompt[1]), prompt_mask, focus.cap)
        return jax.lax.fori_loop(0, filled, add, first_seen)

    def look_at_all() -> _Seen:
        seen = [look_at(block, blocks[0][block], blocks[1][block]) for block in range(count)]
        return functools.reduce(_merge, seen, _look(grouped, *prompt, prompt_mask, focus.cap))

    # As many rounds as there is to see: it saves a CPU memory traffic, but would have a GPU wait for the host.
    seen = jax.lax.platform_dependent(cpu=look_at_filled, default=look_at_all)
    mixed = (seen.values / seen.weight[..., None]).astype(query.dtype)
    return mixed.reshape(query.shape), blocks


def _look(query: Array, keys: Array, values: Array, mask: Array, cap: float) -> _Seen:
    """Attention to some columns. [S, J, G, K], [S, J, W, K], [S, J, W, K], [S, W]."""
    query = query.astype(keys.dtype)
    scores = jnp.einsum("sjgk,sjwk->sjgw", query, keys, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    scores = jnp.where(mask[:, None, None, :], capped(scores, cap), jnp.finfo(jnp.float32).min)
    highest = jnp.max(scores, axis=-1)
    # Where a slot sees none of the columns its weights are 1, which a merge with any it does see multiplies by 0.
    weights = jnp.exp(scores - highest[..., None])
    mixed = jnp.einsum("sjgw,sjwk->sjgk", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return _Seen(highest, jnp.sum(weights, axis=-1), mixed)


def _merge(one: _Seen, other: _Seen) -> _Seen:
    highest = jnp.maximum(one.highest, other.highest)
    here, there = (jnp.exp(part.highest - highest) for part in (one, other))
    return _Seen(
        highest,
        one.weight * here + other.weight * there,
        one.values * here[..., None] + other.values * there[..., None],
    )
