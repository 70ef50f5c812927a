"""What tells a sound update from one that goes wrong: functions of what an update has computed already."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from rl_jax.masked import masked_mean, masked_var
from rl_jax.types import Array, Metrics, PyTree


def ratio_metrics(logprobs: Array, behavior_logprobs: Array, mask: Array) -> Metrics:
    """How far the policy is from the one that sampled.

    Args:
        logprobs: [B, C].
        behavior_logprobs: [B, C].
        mask: bool [B, C].

    Returns:
        logprob_gap (mean over tokens of |behavior_logprobs - logprobs|, nats); ratio_min and ratio_max (over tokens);
        effective_sample_size (Kish's, of the importance ratios of completions, as a share of B).
    """
    chex.assert_rank([logprobs, behavior_logprobs, mask], 2)
    chex.assert_equal_shape([logprobs, behavior_logprobs, mask])
    log_ratio = jnp.where(mask, logprobs - behavior_logprobs, 0.0)
    completions = jnp.sum(log_ratio, axis=1)
    # Times a constant, the ratios have the same effective sample size; with the largest at 1 none overflows.
    weights = jnp.exp(completions - jnp.max(completions))
    size = jnp.square(jnp.sum(weights)) / jnp.sum(jnp.square(weights))
    return {
        "logprob_gap": masked_mean(jnp.abs(log_ratio), mask),
        "ratio_min": jnp.exp(jnp.min(jnp.where(mask, log_ratio, jnp.inf))),
        "ratio_max": jnp.exp(jnp.max(jnp.where(mask, log_ratio, -jnp.inf))),
        "effective_sample_size": size / len(completions),
    }


def explained_variance(values: Array, targets: Array, mask: Array) -> Array:
    """1 - Var(targets - values) / Var(targets): 1 for a perfect critic, 0 for one that says the mean, below for worse.

    Args:
        values: [B, C].
        targets: the returns. [B, C].
        mask: bool [B, C].

    Returns:
        []; 0 where the targets do not vary.
    """
    chex.assert_rank([values, targets, mask], 2)
    chex.assert_equal_shape([values, targets, mask])
    variance = masked_var(targets, mask)
    left = masked_var(targets - values, mask)
    return jnp.where(variance > 0, 1 - left / variance, 0.0)


def gradient_noise(gradient_fn: Callable[[PyTree], PyTree], samples: PyTree, at_once: int = 1) -> Metrics:
    """The noise of a gradient that is a mean over independent samples, measured by one gradient each.

    Args:
        gradient_fn: one sample -> its gradient, a pytree; the batch's gradient is their mean.
        samples: a pytree of arrays [M, ...], M at least 2. Where advantages are taken within groups, a sample is a
            prompt with its group: the completions of a group are not independent.
        at_once: samples whose gradients are held in memory at once; M is a multiple of it.

    Returns:
        grad_variance (trace of the covariance of a sample's gradient), grad_signal (squared norm of the true
        gradient), both unbiased; grad_snr (the signal over the variance of the batch's gradient; may be negative, as
        the signal may); critical_batch_size (the variance over the signal, in samples: McCandlish 2018, eq. 2.9; not
        a number where the signal is not positive).
    """
    count = jax.tree.leaves(samples)[0].shape[0]
    if count < 2:
        raise ValueError(f"A variance needs at least 2 samples, not {count}.")

    def accumulate(sums: tuple[PyTree, Array], part: PyTree) -> tuple[tuple[PyTree, Array], None]:
        gradients = jax.vmap(gradient_fn)(part)
        total = jax.tree.map(lambda s, g: s + jnp.sum(g, axis=0), sums[0], gradients)
        return (total, sums[1] + _square(gradients)), None

    # Samples from all over the batch at once: where it is laid over devices, each has a share of every part.
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(at_once, -1, *x.shape[1:]), 1, 0), samples)
    one = jax.eval_shape(gradient_fn, jax.tree.map(lambda x: x[0], samples))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
    (total, squares), _ = jax.lax.scan(accumulate, (zeros, jnp.zeros(())), parts)
    mean_square = _square(total) / count**2
    variance = (squares / count - mean_square) * (count / (count - 1))
    signal = mean_square - variance / count
    return {
        "grad_variance": variance,
        "grad_signal": signal,
        "grad_snr": signal * count / variance,
        "critical_batch_size": jnp.where(signal > 0, variance / signal, jnp.nan),
    }


def _square(tree: PyTree) -> Array:
    """Sum of the squares of every element. []."""
    return sum((jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)), start=jnp.zeros(()))
