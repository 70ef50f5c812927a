"""The reward of learned models: a function of the ensemble's parameters and a rollout, inside the compiled step.

Letters: K members, B sequences.
"""

from collections.abc import Callable

import chex
import jax.numpy as jnp

from rl_jax.models.config import TransformerConfig
from rl_jax.models.reward_model import ensemble_rewards
from rl_jax.types import Array, PyTree, Rollout

Combination = Callable[[Array], Array]
"""Rewards of every member [K, B] -> one reward [B]."""


def mean_reward(rewards: Array) -> Array:
    """The members' mean. [K, B] -> [B]."""
    chex.assert_rank(rewards, 2)
    return jnp.mean(rewards, axis=0)


def minimum_reward(rewards: Array) -> Array:
    """The lowest of the members' rewards, worst-case optimisation (Coste 2023). [K, B] -> [B]."""
    chex.assert_rank(rewards, 2)
    return jnp.min(rewards, axis=0)


def mean_minus_spread_reward(rewards: Array, *, spread_weight: float) -> Array:
    """The members' mean less a multiple of their standard deviation. [K, B] -> [B].

    Uncertainty-weighted optimisation (Coste 2023), which takes the variance.
    """
    chex.assert_rank(rewards, 2)
    return jnp.mean(rewards, axis=0) - spread_weight * jnp.std(rewards, axis=0)


def learned_reward(params: PyTree, rollout: Rollout, config: TransformerConfig, combine: Combination) -> Array:
    """The combined reward of an ensemble.

    Args:
        params: of the ensemble. [K, ...].
        rollout: B sequences.
        config: the members' configuration.
        combine: from [K, B] to [B].

    Returns:
        float32 [B].
    """
    return combine(ensemble_rewards(params, rollout, config))
