"""Sums over the parts of a batch, one part in memory at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rl_jax.errors import InputError
from rl_jax.types import PyTree


def sum_over_microbatches(fn: Callable[[PyTree], PyTree], batch: PyTree, microbatches: int) -> PyTree:
    """The sum of `fn` over parts of a batch; `fn` must be a sum over sequences, so that parts add up to the whole.

    Part m takes the sequences m, m + microbatches, ...: where a batch is laid over devices, each part is too.

    Args:
        fn: a part of the batch -> a pytree of sums.
        batch: a pytree of arrays [B, ...].
        microbatches: number of parts; B is a multiple of it.

    Returns:
        What `fn` returns, summed.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if microbatches < 1 or rows % microbatches:
        raise InputError(f"A batch of {rows} sequences does not divide into {microbatches} microbatches.")
    if microbatches == 1:
        return fn(batch)
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), batch)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, jax.tree.map(lambda x: x[0], parts)))
    total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, fn(part)), None), zeros, parts)
    return total
