"""Losses whose gradients are policy gradients, and the weights that say what they are means of.

Every loss is a sum of weights times token terms, so the losses (and gradients) of the parts of a batch add up to
that of the whole. Each returns the loss [], whose value has no meaning of its own, and which tokens were clipped, bool
[B, C]: those whose gradient it cut off or shrank. What losses take is described once, at `reinforce_loss` and
`ppo_clip_loss`.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rl_jax.masked import masked_mean, masked_sum
from rl_jax.types import Array

Normalize = Literal["token", "sequence", "completion", "constant"]
Loss = tuple[Array, Array]


def token_weights(mask: Array, normalize: Normalize) -> Array:
    """The weight of each token in a loss: every denominator of a batch, said once and for the whole of it.

    Args:
        mask: true on completion tokens. bool [B, C].
        normalize: "completion" sums the tokens of each completion and takes the mean over B completions: the policy
            gradient of E[r] itself. "constant" divides that by C (Dr. GRPO, Liu 2025). "token" takes the mean over
            all tokens (DAPO, Yu 2025): the direction of "completion" for one batch, with a random scale. "sequence"
            takes the mean over each completion's tokens, then over completions (GRPO, Shao 2024): it weighs the
            tokens of short completions more, and is biased for E[r].

    Returns:
        float32 [B, C], 0 where masked.
    """
    chex.assert_rank(mask, 2)
    weights = mask.astype(jnp.float32)
    completions, length = mask.shape
    if normalize == "completion":
        return weights / completions
    if normalize == "constant":
        return weights / (completions * length)
    if normalize == "token":
        return weights / jnp.maximum(jnp.sum(weights), 1)
    if normalize == "sequence":
        return weights / (completions * jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1))
    raise ValueError(f"normalize is token, sequence, completion or constant, not {normalize!r}.")


def reinforce_loss(logprobs: Array, advantages: Array, weights: Array) -> Loss:
    """REINFORCE (Williams 1992): the gradient of -sum(weights * advantage * logprob).

    Unbiased for the gradient of E[r] with weights normalised by "completion" and unbiased advantages, for
    completions that the policy itself has sampled.

    Args:
        logprobs: of the sampled tokens under the policy, under the distribution that sampled them. [B, C].
        advantages: one for each completion [B], or each token [B, C]; constants.
        weights: from `token_weights`, of these tokens. [B, C].
    """
    advantages = _by_token(advantages, logprobs, weights)
    return _total(-advantages * logprobs, weights), jnp.zeros(weights.shape, bool)


def ppo_clip_loss(
    logprobs: Array,
    behavior_logprobs: Array,
    advantages: Array,
    weights: Array,
    *,
    clip_low: float,
    clip_high: float,
) -> Loss:
    """PPO's clipped surrogate (Schulman 2017, eq. 7): -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A).

    At ratio 1, before the policy has moved, its gradient is that of `reinforce_loss`. Away from there it is biased in
    two ways: the ratio is that of one token, not of those that led to it, and clipped tokens are left out.

    Args:
        logprobs: as in `reinforce_loss`. [B, C].
        behavior_logprobs: of the same tokens under the policy that sampled them. [B, C].
        advantages: as in `reinforce_loss`. [B] or [B, C].
        weights: as in `reinforce_loss`. [B, C].
        clip_low: how far below 1 a ratio counts where the advantage is negative.
        clip_high: how far above 1 it counts where the advantage is positive (asymmetric in DAPO, Yu 2025, eq. 10).
    """
    advantages = _by_token(advantages, logprobs, weights)
    return _clipped(jnp.exp(_log_ratio(logprobs, behavior_logprobs, weights)), advantages, weights, clip_low, clip_high)


def dual_clip_loss(
    logprobs: Array,
    behavior_logprobs: Array,
    advantages: Array,
    weights: Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> Loss:
    """PPO's clip, with a bound for negative advantages too (Ye 2020, eq. 5): the loss is at most dual_clip * |A|.

    dual_clip is the largest ratio that counts where the advantage is negative; above 1.
    """
    advantages = _by_token(advantages, logprobs, weights)
    ratio = jnp.exp(_log_ratio(logprobs, behavior_logprobs, weights))
    bounded = jnp.where(advantages < 0, jnp.minimum(ratio, dual_clip), ratio)
    loss, clipped = _clipped(bounded, advantages, weights, clip_low, clip_high)
    return loss, clipped | ((advantages < 0) & (ratio > dual_clip))  # the ratio of masked tokens is 1


def sequence_clip_loss(
    logprobs: Array,
    behavior_logprobs: Array,
    advantages: Array,
    weights: Array,
    *,
    clip_low: float,
    clip_high: float,
) -> Loss:
    """GSPO (Zheng 2025, eq. 5 to 7): PPO's clip of one ratio a completion, exp(mean over its tokens of the log-ratio).

    With weights by "sequence" it is the paper's mean over completions. At ratio 1 its gradient is that of
    `reinforce_loss` under the same weights: biased for E[r] by the division by length. The geometric mean is no
    importance ratio, so away from there it is biased whatever the weights. The paper clips at 3e-4 and 4e-4.
    """
    by_token = _by_token(advantages, logprobs, weights)
    log_ratio = masked_mean(_log_ratio(logprobs, behavior_logprobs, weights), weights > 0, axis=1)
    ratio = jnp.broadcast_to(jnp.exp(log_ratio)[:, None], weights.shape)
    return _clipped(ratio, by_token, weights, clip_low, clip_high)


def token_importance_loss(
    logprobs: Array, behavior_logprobs: Array, advantages: Array, weights: Array, *, ratio_cap: float
) -> Loss:
    """REINFORCE with each token weighed by its own ratio, truncated: the gradient of -min(ratio, cap) A logprob.

    Truncated importance sampling (Ionides 2008; V-trace, Espeholt 2018, eq. 1). Every token keeps a gradient, which
    is what CISPO (MiniMax 2025, eq. 4) is about. Biased off policy: the ratios of the tokens before are left out, and
    the cap shrinks large ones.
    """
    advantages = _by_token(advantages, logprobs, weights)
    ratio = jnp.exp(_log_ratio(jax.lax.stop_gradient(logprobs), behavior_logprobs, weights))
    clipped = (ratio > ratio_cap) & (weights > 0)
    return _total(-jnp.minimum(ratio, ratio_cap) * advantages * logprobs, weights), clipped


def sequence_importance_loss(
    logprobs: Array, behavior_logprobs: Array, advantages: Array, weights: Array, *, ratio_cap: float
) -> Loss:
    """REINFORCE with each completion weighed by its ratio, the product of its tokens', truncated (Ionides 2008).

    Unbiased off policy with an infinite cap, weights by "completion" and unbiased advantages; its variance grows
    exponentially with the length, which the cap trades for a bias.
    """
    advantages = _by_token(advantages, logprobs, weights)
    log_ratio = _log_ratio(jax.lax.stop_gradient(logprobs), behavior_logprobs, weights)
    ratio = jnp.exp(jnp.sum(log_ratio, axis=1, keepdims=True))
    clipped = (ratio > ratio_cap) & (weights > 0)
    return _total(-jnp.minimum(ratio, ratio_cap) * advantages * logprobs, weights), clipped


def value_errors(values: Array, old_values: Array, targets: Array, *, value_clip: float) -> Array:
    """Half the squared error of a critic, or of its change clipped to value_clip, whichever is larger.

    PPO's reference implementation (Huang 2022, detail 9); an infinite value_clip gives the plain squared error.

    Args:
        values: [B, C].
        old_values: the critic's before this step's updates. [B, C].
        targets: the returns. [B, C].
        value_clip: how far, in reward units, the values may move before their gradient is cut off.

    Returns:
        [B, C].
    """
    chex.assert_rank([values, old_values, targets], 2)
    chex.assert_equal_shape([values, old_values, targets])
    near = old_values + jnp.clip(values - old_values, -value_clip, value_clip)
    return jnp.maximum(jnp.square(values - targets), jnp.square(near - targets)) / 2


def _by_token(advantages: Array, logprobs: Array, weights: Array) -> Array:
    """Advantages as constants [B, C] or [B, 1], after the shapes are checked."""
    chex.assert_rank([logprobs, advantages, weights], [2, {1, 2}, 2])
    chex.assert_equal_shape([logprobs, weights])
    chex.assert_equal_shape_prefix([logprobs, advantages], advantages.ndim)
    return jax.lax.stop_gradient(advantages[:, None] if advantages.ndim == 1 else advantages)


def _log_ratio(logprobs: Array, behavior_logprobs: Array, weights: Array) -> Array:
    """[B, C], 0 where the weights are, so that what is masked can neither overflow nor reach the gradient."""
    chex.assert_equal_shape([logprobs, behavior_logprobs])
    return jnp.where(weights > 0, logprobs - behavior_logprobs, 0.0)


def _total(terms: Array, weights: Array) -> Array:
    return masked_sum(weights * terms, weights > 0)


def _clipped(ratio: Array, advantages: Array, weights: Array, clip_low: float, clip_high: float) -> Loss:
    within = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    gains = jnp.minimum(ratio * advantages, within * advantages)
    # Where the minimum is the clipped term, and not by being equal to the other.
    return _total(-gains, weights), (weights > 0) & (within * advantages < ratio * advantages)
