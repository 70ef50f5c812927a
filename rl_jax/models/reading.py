"""Reading tokens into a cache that holds a conversation: a few at once, after those that are there already."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rl_jax.models.attention import Focus, attend
from rl_jax.models.config import TransformerConfig
from rl_jax.models.transformer import Transformer
from rl_jax.types import Array, PyTree

Pairs = tuple[tuple[Array, Array], ...]
"""Keys and values of each layer. [B, J, T, K]."""


def empty_cache(config: TransformerConfig, rows: int, columns: int) -> Pairs:
    """A cache of T columns for B sequences, none of which is read yet."""
    shape = (rows, config.kv_heads, columns, config.head_size)
    return tuple((jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in range(config.layers))


def read_tokens(
    params: PyTree, cache: Pairs, tokens: Array, index: Array, config: TransformerConfig
) -> tuple[Array, Pairs]:
    """Read the next tokens of sequences of the same length.

    Columns from `index` on are written over, so tokens that were read in vain need no clearing.

    Args:
        params: the model's parameters.
        cache: has `index` tokens, and room for S more.
        tokens: int32 [B, S].
        index: the column, and the position, of the first of them. int32 [].
        config: the model's configuration.

    Returns:
        States [B, S, D], each of which predicts the token after, and the cache.
    """
    columns = index + jnp.arange(tokens.shape[1])
    # What fills up a chunk may lie beyond the context, where there is no embedding of its position.
    positions = jnp.broadcast_to(jnp.minimum(columns, config.context - 1), tokens.shape)
    looks = [Partial(_look_back, keys, values, columns) for keys, values in cache]
    read: Any = Transformer(config).apply({"params": params}, tokens, positions, looks)
    return read


def _look_back(
    keys: Array, values: Array, columns: Array, query: Array, key: Array, value: Array, focus: Focus
) -> tuple[Array, tuple[Array, Array]]:
    """At a cache [B, J, T, K], once the tokens are written to their columns [S]."""
    keys = jax.lax.dynamic_update_slice_in_dim(keys, key, columns[0], axis=2)
    values = jax.lax.dynamic_update_slice_in_dim(values, value, columns[0], axis=2)
    back = columns[:, None] - jnp.arange(keys.shape[2])[None, :]
    seen = (back >= 0) & (back < focus.window) if focus.window else back >= 0
    return attend(query, keys, values, jnp.broadcast_to(seen, (len(query), *seen.shape)), focus.cap), (keys, values)
