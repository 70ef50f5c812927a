"""The tabular softmax policy: a row of logits for each prompt and each prefix, where everything can be counted.

Letters: N prompts, B sequences, C completion length, V vocabulary, S = 1 + V + ... + V^(C - 1) prefixes.
"""

import chex
import jax
import numpy as np

from rl_jax.errors import InputError
from rl_jax.types import Array, Rollout


def init_table(key: Array, prompts: int, vocab_size: int, length: int, scale: float = 1.0) -> Array:
    """Normal logits for every prefix of every prompt.

    Args:
        key: of the numbers.
        prompts: N.
        vocab_size: V.
        length: C.
        scale: standard deviation of a logit.

    Returns:
        float32 [N, S, V].
    """
    nodes = sum(vocab_size**size for size in range(length))
    return scale * jax.random.normal(key, (prompts, nodes, vocab_size))


def prefix_nodes(completions: Array, vocab_size: int) -> Array:
    """The prefix that each token follows, as its number in the tree of prefixes, level by level from the root, 0.

    The child of node s along token t is V s + t + 1. int32 [B, C] -> int32 [B, C].
    """
    chex.assert_rank(completions, 2)
    length = completions.shape[1]
    gaps = np.arange(length)[None, :] - 1 - np.arange(length)[:, None]  # from a token to the one that follows later
    powers = np.where(gaps >= 0, vocab_size ** np.maximum(gaps, 0), 0).astype(np.int32)
    return (completions + 1) @ powers


def tabular_logits(
    table: Array, rollout: Rollout, temperature: Array | float = 1.0, rows: Array | None = None
) -> Array:
    """Logits of the distribution that each completion token is sampled from.

    Args:
        table: the policy's parameters. [N, S, V].
        rollout: B sequences of at most C tokens, C the length that the table was made for.
        temperature: divides the logits. [].
        rows: the row of the table for each sequence, int32 [B], below N; default the last token of its
            prompt, which then must be below N.

    Returns:
        float32 [B, C, V]; finite but without a meaning where masked.

    Raises:
        InputError: the table has no row for some of the prefixes.
    """
    chex.assert_rank(table, 3)
    prompt, node = _places(rollout, table.shape[2], rows)
    needed = sum(table.shape[2] ** size for size in range(node.shape[1]))
    if table.shape[1] < needed:
        raise InputError(f"Completions of {node.shape[1]} tokens have {needed} prefixes; the table {table.shape[1]}.")
    return table[prompt, node] / temperature


def tabular_values(values: Array, rollout: Rollout, vocab_size: int, rows: Array | None = None) -> Array:
    """The value of the prefix that each completion token follows. [N, S] -> [B, C]; `rows` as in `tabular_logits`."""
    chex.assert_rank(values, 2)
    return values[_places(rollout, vocab_size, rows)]


def _places(rollout: Rollout, vocab_size: int, rows: Array | None) -> tuple[Array, Array]:
    """The prompt's row and the prefix's node of each completion token. int32 [B, 1], int32 [B, C]."""
    rows = rollout.prompts[:, -1] if rows is None else rows
    chex.assert_shape(rows, rollout.completions.shape[:1])
    return rows[:, None], prefix_nodes(rollout.completions, vocab_size)
