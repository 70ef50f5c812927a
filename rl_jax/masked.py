"""Reductions under a mask. Each names its denominator; none divides by the size of an array with padding in it."""

import jax.numpy as jnp

from rl_jax.types import Array


def masked_sum(values: Array, mask: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Sum of `values` where `mask` is true; values under a false mask may be anything, NaN included."""
    return jnp.sum(jnp.where(mask, values, 0), axis=axis)


def masked_mean(values: Array, mask: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Mean over the positions where `mask` is true; 0 where there is none."""
    return masked_sum(values, mask, axis) / jnp.maximum(jnp.sum(mask, axis=axis), 1)


def masked_var(values: Array, mask: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Population variance (denominator: the count of true positions); 0 where there is none."""
    values = jnp.where(mask, values, 0)  # before they are squared: a masked NaN would reach the gradient
    mean = jnp.sum(values, axis=axis, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=axis, keepdims=True), 1)
    return masked_mean(jnp.square(values - mean), mask, axis)
