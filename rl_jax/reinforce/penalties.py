"""What is done to rewards before they become advantages, and the divergence from the reference that they are charged.

The KL divergence from the reference policy can be charged in the reward, as the k1 estimate of each token (Ziegler
2019), or be a term of the loss. In the reward the expected gradient is that of E[r] - coefficient * KL of whole
completions, of the policy that sampled. In the loss it leaves out what a token does to the divergence of later ones:
"k2_loss" and "exact_loss" have the gradient of the KL of each next token, at the prefixes that the policy visits (the
same expectation, exact_loss with less variance); "k3_loss" (GRPO) has that of KL(reference || policy), the other way
round. That holds for the first update from a batch; in later ones k2 and k3 weigh tokens as the policy that sampled.
The reference is never filtered: with top-k, top-p or min-p, k1 to k3 compare the filtered policy with it, and
exact_loss the policy before its filters.
"""

from typing import Literal

import chex
import jax.numpy as jnp

from rl_jax.masked import masked_sum
from rl_jax.reinforce.distributions import kl_estimate
from rl_jax.types import Array

KLPlacement = Literal["k1_reward", "k2_loss", "k3_loss", "exact_loss", "none"]


def shape_rewards(rewards: Array, *, scale: float, clip: float, whiten: bool) -> Array:
    """Rewards times `scale`, then within [-clip, clip], then, for `whiten`, of mean 0 and variance 1 over the batch.

    Args:
        rewards: [B].
        scale: a factor.
        clip: the largest size, after scaling; infinity for none.
        whiten: whether the batch is standardised.

    Returns:
        [B].
    """
    chex.assert_rank(rewards, 1)
    rewards = jnp.clip(rewards * scale, -clip, clip)
    if not whiten:
        return rewards
    return (rewards - jnp.mean(rewards)) / jnp.sqrt(jnp.var(rewards) + 1e-8)


def overlong_penalty(mask: Array, share: float) -> Array:
    """Soft overlong punishment (DAPO, Yu 2025, eq. 13): 0 up to a length, then falling to -1 at C tokens.

    Args:
        mask: true on completion tokens. bool [B, C].
        share: of C, the last tokens over which it falls; 0 for no penalty.

    Returns:
        [B], to be added to the rewards.
    """
    chex.assert_rank(mask, 2)
    if share == 0:
        return jnp.zeros(mask.shape[0])
    length, buffer = jnp.sum(mask, axis=1), share * mask.shape[1]
    return -jnp.maximum(length - (mask.shape[1] - buffer), 0.0) / buffer


def kl_penalised_rewards(rewards: Array, kl: Array, mask: Array, coefficient: float | Array) -> Array:
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


def token_rewards(rewards: Array, kl: Array, mask: Array, coefficient: float | Array) -> Array:
    """`kl_penalised_rewards` token by token: the reward on the last real token, the divergence on each (Ziegler 2019).

    [B], [B, C], bool [B, C], [] -> [B, C], 0 where masked.
    """
    chex.assert_rank([rewards, kl, mask], [1, 2, 2])
    last = jnp.arange(mask.shape[1])[None, :] == jnp.sum(mask, axis=1, keepdims=True) - 1
    return jnp.where(last, rewards[:, None], 0.0) - coefficient * jnp.where(mask, kl, 0.0)


def kl_loss_terms(logprobs: Array, ref_logprobs: Array, exact: Array, placement: KLPlacement) -> Array:
    """The token terms that a placement in the loss adds to it, times the coefficient; zeros for the other placements.

    Args:
        logprobs: [B, C].
        ref_logprobs: [B, C].
        exact: the KL over the whole vocabulary. [B, C].
        placement: see the module's docstring.

    Returns:
        [B, C], nats.
    """
    if placement == "exact_loss":
        return exact
    if placement == "k2_loss":
        return kl_estimate(logprobs, ref_logprobs, "k2")
    if placement == "k3_loss":
        return kl_estimate(logprobs, ref_logprobs, "k3")
    return jnp.zeros(logprobs.shape)


def adaptive_kl_coefficient(coefficient: Array, kl: Array, *, target: float, horizon: float, completions: int) -> Array:
    """The next coefficient, larger where the KL lies above its target (Ziegler 2019, section 2.2).

    Args:
        coefficient: reward units a nat. [].
        kl: of this step, nats a completion. [].
        target: nats a completion.
        horizon: completions in which an error of 20 % or more changes the coefficient by 20 %, 10,000 in OpenAI's code;
            above a fifth of `completions`, or the coefficient could change its sign.
        completions: of this step.

    Returns:
        [], the coefficient as it was where the KL is not finite.
    """
    chex.assert_rank([coefficient, kl], 0)
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return jnp.where(jnp.isfinite(kl), coefficient * (1 + error * completions / horizon), coefficient)
