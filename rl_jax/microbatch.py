"""Sums over the parts of a batch, one part in memory at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rl_jax.errors import InputError
from rl_jax.types import PyTree

Part = Callable[[PyTree], tuple[PyTree, PyTree]]
"""A part of a batch -> a pytree of sums over its sequences, so that those of the parts add up to that of the whole, and
a pytree of arrays with a row for each sequence. A `Partial` of the arrays that it reads besides: where each device
works by itself, it is given them too."""

SumParts = Callable[[Part, PyTree], tuple[PyTree, PyTree]]
"""What a function of parts makes of a batch: how it is cut, and put together again, is all that these differ in."""


def sum_over_whole(fn: Part, batch: PyTree) -> tuple[PyTree, PyTree]:
    """The batch is one part."""
    return fn(batch)


def sum_over_microbatches(fn: Part, batch: PyTree, microbatches: int) -> tuple[PyTree, PyTree]:
    """The sums and the rows that `fn` makes of a batch, got from its parts.

    Part m takes the sequences m, m + microbatches, ...: where a batch is laid over devices, each part is too.

    Args:
        fn: what is made of a part.
        batch: a pytree of arrays [B, ...].
        microbatches: number of parts; B is a multiple of it.

    Returns:
        What `fn` returns, the sums added up, and the rows [B, ...] in the order of the batch.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if microbatches < 1 or rows % microbatches:
        raise InputError(f"A batch of {rows} sequences does not divide into {microbatches} microbatches.")
    if microbatches == 1:
        return fn(batch)
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0), batch)
    shapes, _ = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(sums: PyTree, part: PyTree) -> tuple[PyTree, PyTree]:
        more, rows = fn(part)
        return jax.tree.map(jnp.add, sums, more), rows

    sums, split = jax.lax.scan(add, zeros, parts)
    return sums, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), split)
