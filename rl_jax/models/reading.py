"""Reading tokens into a cache that holds a conversation: a few at once, after those that are there already."""

from typing import Any

import jax.numpy as jnp
from jax.tree_util import Partial

from rl_jax.models.config import TransformerConfig
from rl_jax.models.transformer import Pairs, Transformer, look_back
from rl_jax.types import Array, PyTree


def empty_cache(config: TransformerConfig, rows: int, columns: int) -> Pairs:
    """A cache of T columns for B sequences, none of which is read yet. [B, J, T, K]."""
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
    seen = jnp.arange(cache[0][0].shape[2])[None, :] <= columns[:, None]
    seen = jnp.broadcast_to(seen, (len(tokens), *seen.shape))
    looks = [Partial(look_back, keys, values, seen, index) for keys, values in cache]
    read: Any = Transformer(config).apply({"params": params}, tokens, positions, looks)
    return read
