"""Rewards computed from token ids: pure functions of a rollout that stay inside the compiled step."""

import chex
import jax.numpy as jnp

from rl_jax.masked import masked_mean
from rl_jax.types import Array, Rollout


def length_reward(rollout: Rollout, target: int) -> Array:
    """How near the completion's length is to a target: -|length - target| / target.

    Args:
        rollout: sequences; the token that ended a completion counts towards its length.
        target: length in tokens, at least 1.

    Returns:
        float32 [B], at most 0.
    """
    chex.assert_rank(rollout.completion_mask, 2)
    length = jnp.sum(rollout.completion_mask, axis=1)
    return -jnp.abs(length - target).astype(jnp.float32) / target


def repetition_penalty(rollout: Rollout) -> Array:
    """Minus the share of the completion's bigrams that occur earlier in it; 0 with fewer than two tokens.

    Compares all pairs of bigrams: O(C^2) work, which XLA fuses into the reduction.

    Returns:
        float32 [B], in (-1, 0].
    """
    tokens, mask = rollout.completions, rollout.completion_mask
    chex.assert_rank(tokens, 2)
    chex.assert_equal_shape((tokens, mask))
    first, second = tokens[:, :-1], tokens[:, 1:]
    exists = mask[:, 1:]  # the mask is true up to the end, so the bigram's first token exists too
    same = (first[:, :, None] == first[:, None, :]) & (second[:, :, None] == second[:, None, :])
    positions = jnp.arange(first.shape[1])
    earlier = (positions[:, None] > positions[None, :])[None]
    repeats = jnp.any(same & earlier, axis=2)
    return -masked_mean(repeats.astype(jnp.float32), exists, axis=1)


def token_share(rollout: Rollout, token_ids: Array) -> Array:
    """Share of the completion's tokens, its end included, that are among `token_ids` [K].

    Returns:
        float32 [B], in [0, 1].
    """
    tokens, mask = rollout.completions, rollout.completion_mask
    chex.assert_rank([tokens, token_ids], [2, 1])
    chex.assert_equal_shape((tokens, mask))
    return masked_mean(jnp.isin(tokens, token_ids).astype(jnp.float32), mask, axis=1)
