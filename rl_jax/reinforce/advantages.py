"""Rewards to advantages. Each function is unbiased for the policy gradient unless its docstring says otherwise."""

import chex
import jax.numpy as jnp

from rl_jax.masked import masked_sum
from rl_jax.types import Array


def kl_penalised_rewards(rewards: Array, kl: Array, mask: Array, coefficient: float) -> Array:
    """Rewards less the divergence of each completion from the reference (Ziegler 2019, eq. 2).

    With the k1 estimate as `kl` and REINFORCE as the objective, the expected gradient is that of
    E[r] - coefficient * KL(policy || reference).

    Args:
        rewards: [B].
        kl: an estimate for each token, nats. [B, C].
        mask: true on completion tokens. bool [B, C].
        coefficient: reward units a nat.

    Returns:
        [B].
    """
    chex.assert_rank([rewards, kl, mask], [1, 2, 2])
    return rewards - coefficient * masked_sum(kl, mask, axis=1)


def leave_one_out_advantages(rewards: Array, group_size: int) -> Array:
    """Each reward less the mean of the others in its group: RLOO (Kool 2019; Ahmadian 2024, eq. 8).

    Args:
        rewards: groups consecutive. [B].
        group_size: G, at least 2.

    Returns:
        G / (G - 1) times the deviation from the group's mean. [B].
    """
    if group_size < 2:
        raise ValueError(f"Leaving one out needs a group of at least 2, not {group_size}.")
    return group_mean_advantages(rewards, group_size) * (group_size / (group_size - 1))


def group_mean_advantages(rewards: Array, group_size: int) -> Array:
    """Each reward less its group's mean, itself included: the policy gradient times (G - 1) / G in expectation.

    Args:
        rewards: groups consecutive. [B].
        group_size: G.

    Returns:
        [B].
    """
    chex.assert_rank(rewards, 1)
    groups = rewards.reshape(-1, group_size)
    return (groups - jnp.mean(groups, axis=1, keepdims=True)).reshape(-1)


def moving_average_advantages(rewards: Array, baseline: Array, decay: float) -> tuple[Array, Array]:
    """Each reward less a baseline from earlier steps (Williams 1992's reinforcement comparison).

    Args:
        rewards: [B].
        baseline: the moving average before this step; not a number before the first, which then takes the mean of
            its own rewards, and is biased by (B - 1) / B. [].
        decay: how much of the old average stays.

    Returns:
        Advantages [B], and the baseline [] for the next step.
    """
    chex.assert_rank([rewards, baseline], [1, 0])
    mean = jnp.mean(rewards)
    baseline = jnp.where(jnp.isnan(baseline), mean, baseline)
    return rewards - baseline, decay * baseline + (1 - decay) * mean


def zero_signal_groups(rewards: Array, group_size: int) -> Array:
    """Share of groups whose rewards are all equal: less a mean of the group, they teach nothing. [B] -> []."""
    chex.assert_rank(rewards, 1)
    groups = rewards.reshape(-1, group_size)
    return jnp.mean(jnp.all(groups == groups[:, :1], axis=1).astype(jnp.float32))
