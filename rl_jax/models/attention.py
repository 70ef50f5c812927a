"""Attention as training needs it. Letters: B sequences, S queries, T columns, H heads, J key-value heads, K size."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl_jax.types import Array


class Focus(NamedTuple):
    """How a layer looks: how many tokens back, 0 for all; and c of c tanh(x / c) that logits go through, 0 for none."""

    window: int = 0
    cap: float = 0.0


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(query: Array, keys: Array, values: Array, mask: Array, cap: float = 0.0) -> Array:
    """Softmax attention with grouped key-value heads, softmax in float32.

    Its gradient is written out: it takes the inner product that a softmax's gradient needs from the output, K numbers
    a query instead of T (Dao 2022, appendix B.2), and never divides the [S, T] weights by their sum.

    Args:
        query: [B, S, H, K].
        keys: [B, J, T, K].
        values: [B, J, T, K].
        mask: true where a query may look. bool [B, S, T].
        cap: of the logits, see `Focus`.

    Returns:
        [B, S, H, K]. A query that may look nowhere gets the mean of the values, which nothing reads.
    """
    return _attend_forward(query, keys, values, mask, cap)[0]


def capped(scores: Array, cap: float) -> Array:
    """c tanh(x / c), or x where c is 0."""
    return cap * jnp.tanh(scores / cap) if cap else scores


def _attend_forward(query: Array, keys: Array, values: Array, mask: Array, cap: float) -> tuple[Array, tuple[Any, ...]]:
    b, s, h, k = query.shape
    grouped = query.reshape(b, s, keys.shape[1], -1, k)
    scores = jnp.einsum("bsjgk,bjtk->bjgst", grouped, keys, preferred_element_type=jnp.float32) * k**-0.5
    scores = capped(scores, cap)
    slope = 1 - (scores / cap) ** 2 if cap else None
    scores = jnp.where(mask[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.moveaxis(jnp.sum(weights, axis=-1), 3, 1)[..., None]
    weights = weights.astype(values.dtype)
    mixed = jnp.einsum("bjgst,bjtk->bsjgk", weights, values).astype(jnp.float32) / total
    return mixed.reshape(b, s, h, k).astype(query.dtype), (grouped, keys, values, weights, total, mixed, slope)


def _attend_backward(cap: float, kept: tuple[Any, ...], gradient: Array) -> tuple[Array, Array, Array, None]:
    del cap
    grouped, keys, values, weights, total, mixed, slope = kept
    gradient = gradient.reshape(grouped.shape).astype(jnp.float32) / total
    inner = jnp.moveaxis(jnp.sum(gradient * mixed, axis=-1), 1, 3)[..., None]
    gradient = gradient.astype(values.dtype)
    by_weight = jnp.einsum("bsjgk,bjtk->bjgst", gradient, values)
    by_score = weights * (by_weight - inner) * keys.shape[-1] ** -0.5
    by_score = (by_score if slope is None else by_score * slope).astype(keys.dtype)
    return (
        jnp.einsum("bjgst,bjtk->bsjgk", by_score, keys).reshape(*grouped.shape[:2], -1, keys.shape[-1]),
        jnp.einsum("bjgst,bsjgk->bjtk", by_score, grouped),
        jnp.einsum("bjgst,bsjgk->bjtk", weights, gradient),
        None,
    )


attend.defvjp(_attend_forward, _attend_backward)
