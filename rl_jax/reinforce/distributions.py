"""Quantities of the token distributions: log-probabilities, entropy, and the KL divergence from a reference.

Everything is in nats. Logits may hold minus infinity where a token cannot be sampled.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rl_jax.types import Array

KLKind = Literal["k1", "k2", "k3"]


def token_logprobs(logits: Array, tokens: Array) -> Array:
    """Log-probability of each token. [..., V], int [...] -> [...]."""
    chex.assert_equal_shape_prefix([logits, tokens], tokens.ndim)
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: Array) -> Array:
    """Entropy of the distribution. [..., V] -> [...]."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return -_expectation(logprobs, logprobs)


def exact_kl(logits: Array, ref_logits: Array) -> Array:
    """KL(policy || reference) summed over the whole vocabulary. [..., V], [..., V] -> [...].

    Summed over the tokens of completions sampled from the policy, its mean is the sequence KL, with less variance
    than k1 has.
    """
    chex.assert_equal_shape([logits, ref_logits])
    logprobs, ref_logprobs = jax.nn.log_softmax(logits, axis=-1), jax.nn.log_softmax(ref_logits, axis=-1)
    return _expectation(logprobs, logprobs - ref_logprobs)


def kl_estimate(logprobs: Array, ref_logprobs: Array, kind: KLKind) -> Array:
    """Estimates of KL(policy || reference) from sampled tokens (Schulman 2020, "Approximating KL divergence").

    With log r = ref_logprobs - logprobs: k1 = -log r is unbiased; k2 = (log r)^2 / 2 is biased, with little variance;
    k3 = r - 1 - log r is unbiased and never negative. That speaks of their values: as a loss, the gradient of k1 has
    mean zero, that of k2 is the gradient of the KL, and that of k3 is the gradient of KL(reference || policy).

    Args:
        logprobs: of the tokens under the policy that sampled them. [B, C].
        ref_logprobs: of the same tokens under the reference. [B, C].
        kind: which estimate.

    Returns:
        [B, C].
    """
    chex.assert_rank([logprobs, ref_logprobs], 2)
    chex.assert_equal_shape([logprobs, ref_logprobs])
    log_ratio = ref_logprobs - logprobs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return jnp.square(log_ratio) / 2
    if kind == "k3":
        return jnp.exp(log_ratio) - 1 - log_ratio
    raise ValueError(f"kind is k1, k2 or k3, not {kind!r}.")


def _expectation(logprobs: Array, values: Array) -> Array:
    """Mean of values over the vocabulary, those of impossible tokens set aside first, so that gradients are finite."""
    probabilities = jnp.exp(logprobs)
    return jnp.sum(probabilities * jnp.where(probabilities > 0, values, 0.0), axis=-1)
