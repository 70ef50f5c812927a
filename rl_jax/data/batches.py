"""Batches, each a function of data, seed and step alone: windows of packed tokens, or rows of a data set."""

from collections.abc import Iterator

import jax
import numpy as np

from rl_jax.errors import InputError
from rl_jax.types import PyTree

RowNumbers = np.ndarray | slice
"""Numbers of rows of a batch: those that a process has to make of it."""
ALL = slice(None)


def packed_batch(
    tokens: np.ndarray, batch_size: int, length: int, seed: int, step: int, rows: RowNumbers = ALL
) -> np.ndarray:
    """Windows of `length + 1` tokens at random offsets: inputs and the targets one further on.

    Args:
        tokens: the corpus. int32 [n].
        batch_size: B, the number of windows.
        length: predicted tokens a window.
        seed: which sequence of batches.
        step: which batch of the sequence; none needs the ones before it.
        rows: those of the batch that are wanted.

    Returns:
        int32 [B, length + 1], or those rows of it.

    Raises:
        InputError: the corpus is shorter than one window.
    """
    offsets = len(tokens) - length
    if offsets < 1:
        raise InputError(
            f"the corpus has {len(tokens)} tokens and one window needs {length + 1}: "
            "give more text or a shorter context"
        )
    starts = np.random.default_rng([seed, step]).integers(offsets, size=(batch_size, 1))
    return tokens[starts[rows] + np.arange(length + 1)]


def held_out_batches(tokens: np.ndarray, batch_size: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of one shape that together hold every target, tokens 1 to n - 1, exactly once.

    Args:
        tokens: the held-out corpus. int32 [n].
        batch_size: B, the number of windows.
        length: predicted tokens a window.

    Yields:
        Tokens, int32 [B, length + 1], and which of their targets (`[:, 1:]`) count, bool [B, length]; what
        fills the end of the last batch is masked.

    Raises:
        InputError: there is no target.
    """
    targets = len(tokens) - 1
    if targets < 1:
        raise InputError(f"the held-out corpus has {len(tokens)} tokens and needs 2: hold out more of the text")
    batches = -(-targets // (batch_size * length))
    index = np.arange(batches * batch_size)[:, None] * length + np.arange(length + 1)
    mask = index[:, 1:] <= targets
    windows = tokens[np.minimum(index, targets)]
    yield from zip(np.split(windows, batches), np.split(mask, batches), strict=True)


def shuffled_batch(data: PyTree, batch_size: int, seed: int, step: int, name: str, rows: RowNumbers = ALL) -> PyTree:
    """Batch `step` of an endless stream of rows, in which every epoch is a fresh permutation of them all.

    A batch may end one epoch and begin the next, so that none is left out of an epoch.

    Args:
        data: NumPy arrays of M rows each.
        batch_size: B.
        seed: which stream.
        step: which batch of it; none needs the ones before it.
        name: what the rows are, for the message.
        rows: those of the batch that are wanted.

    Returns:
        Arrays of B rows, or those rows of them.

    Raises:
        InputError: M < B.
    """
    total = len(jax.tree.leaves(data)[0])
    if total < batch_size:
        raise InputError(
            f"there are {total} {name} and a batch needs {batch_size}: give more {name} or a smaller batch"
        )
    epoch, first = divmod(step * batch_size, total)
    order = np.concatenate([np.random.default_rng([seed, e]).permutation(total) for e in (epoch, epoch + 1)])
    chosen = order[first : first + batch_size][rows]
    return jax.tree.map(lambda x: x[chosen], data)
