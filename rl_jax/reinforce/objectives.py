"""Losses whose gradients are policy gradients, and the weights that say what they are means of."""

from typing import Literal

import chex
import jax.numpy as jnp

from rl_jax.masked import masked_sum
from rl_jax.types import Array, Metrics

Normalize = Literal["token", "sequence", "completion", "constant"]


def token_weights(mask: Array, normalize: Normalize) -> Array:
    """The weight of each token in a loss: every denominator of a batch, said once and for the whole of it.

    A loss is the sum of weights times token terms, so the losses (and gradients) of the parts of a batch, whatever
    the parts, add up to that of the whole.

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


def reinforce_loss(logprobs: Array, advantages: Array, weights: Array) -> tuple[Array, Metrics]:
    """REINFORCE (Williams 1992): the gradient of -sum(weights * advantage * logprob).

    Unbiased for the gradient of E[r] with weights normalised by "completion" and unbiased advantages.

    Args:
        logprobs: of the sampled tokens under the policy, under the distribution that sampled them. [B, C].
        advantages: one for each completion [B], or each token [B, C]; constants.
        weights: from `token_weights`, of these tokens. [B, C].

    Returns:
        The loss [], whose value has no meaning of its own, and {"loss": loss}.
    """
    chex.assert_rank([logprobs, advantages, weights], [2, {1, 2}, 2])
    chex.assert_equal_shape([logprobs, weights])
    chex.assert_equal_shape_prefix([logprobs, advantages], advantages.ndim)
    by_token = advantages[:, None] if advantages.ndim == 1 else advantages
    loss = -masked_sum(weights * by_token * logprobs, weights > 0)
    return loss, {"loss": loss}
