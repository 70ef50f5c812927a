"""The gradient of a batch of rollouts, for any policy that can score them and any loss on its log-probabilities."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rl_jax.masked import masked_mean, masked_sum
from rl_jax.microbatch import SumParts, sum_over_whole
from rl_jax.reinforce.diagnostics import ratio_metrics
from rl_jax.reinforce.objectives import Loss, Normalize, reinforce_loss, token_weights
from rl_jax.types import Array, Metrics, PyTree, Rollout


class Scores(NamedTuple):
    """What a policy says of each completion token. Every array is float32 [B, C].

    Attributes:
        logprobs: under the distribution that was sampled from, filters included, nats.
        entropy: of the distribution at the sampling temperature, nats.
        kl: exact KL from the reference at the sampling temperature, nats; zeros without a reference.
        values: the return that a critic expects before each token, reward units; None without one.
    """

    logprobs: Array
    entropy: Array
    kl: Array
    values: Array | None = None


ScoreFn = Callable[[PyTree, Rollout, Any], Scores]
"""Params, rollout, context (any pytree of arrays [B, ...], or None) -> Scores."""

PenaltyFn = Callable[[Scores, Any], Array]
"""Scores and context -> terms [B, C] that the loss adds to its own under the same weights."""


class _Batch(NamedTuple):
    rollout: Rollout
    advantages: Array
    context: Any
    weights: Array


def as_partial(fn: Callable[..., Any]) -> Partial:
    """A function as a pytree of the arrays that it is bound to; of none where it is not a `Partial` already."""
    return fn if isinstance(fn, Partial) else Partial(fn)


def supply(fn: Callable[..., Any], quantities: dict[str, Any]) -> Any:
    """Calls `fn` with those of the quantities that it names among its parameters, its bound options aside."""
    return fn(**{name: quantities[name] for name in inspect.signature(fn).parameters if name in quantities})


def reinforce_gradient(
    params: PyTree,
    rollout: Rollout,
    advantages: Array,
    score_fn: ScoreFn,
    *,
    normalize: Normalize,
    loss_fn: Callable[..., Loss] = reinforce_loss,
    penalty_fn: PenaltyFn | None = None,
    context: Any = None,
    sum_parts: SumParts = sum_over_whole,
) -> tuple[PyTree, Metrics]:
    """Gradient of a loss of `rl_jax.reinforce.objectives`, the same however the batch is split.

    Args:
        params: the policy's parameters, which the gradient is taken for.
        rollout: B sequences.
        advantages: one for each completion [B] or each token [B, C]. No gradient flows through them.
        score_fn: the policy's scores of a rollout.
        normalize: what the loss is a mean of; see `token_weights`.
        loss_fn: names among its parameters what it needs of logprobs, behavior_logprobs, advantages and weights.
        penalty_fn: what else the loss holds: a divergence, a critic's error.
        context: what `score_fn` and `penalty_fn` are given besides, split with the rollout.
        sum_parts: how the batch is worked through in parts, to save memory, or to leave padding out.

    Returns:
        The gradient, shaped as `params`, and metrics: loss; entropy (mean over tokens, nats); kl (exact, nats a
        completion); clipped (share of tokens); those of `ratio_metrics`, of which logprob_gap is, for a policy that
        has not changed since it sampled, what the sampler and the learner disagree by.
    """
    mask = rollout.completion_mask
    chex.assert_rank(advantages, {1, 2})
    chex.assert_equal_shape_prefix([advantages, mask], advantages.ndim)
    batch = _Batch(rollout, jax.lax.stop_gradient(advantages), context, token_weights(mask, normalize))

    def loss(
        params: PyTree, part: _Batch, score_fn: ScoreFn, penalty_fn: PenaltyFn | None
    ) -> tuple[Array, tuple[Scores, Array]]:
        scores = score_fn(params, part.rollout, part.context)
        weights = jnp.where(part.rollout.completion_mask, part.weights, 0.0)  # a part may mask what is not its own
        quantities = {
            "logprobs": scores.logprobs,
            "behavior_logprobs": part.rollout.behavior_logprobs,
            "advantages": part.advantages,
            "weights": weights,
        }
        total, clipped = supply(loss_fn, quantities)
        if penalty_fn is not None:
            total += masked_sum(weights * penalty_fn(scores, part.context), part.rollout.completion_mask)
        return total, jax.lax.stop_gradient((scores, clipped))

    def gradient(
        params: PyTree, score_fn: ScoreFn, penalty_fn: PenaltyFn | None, part: _Batch
    ) -> tuple[tuple[Array, PyTree], tuple[Scores, Array]]:
        (total, rows), grads = jax.value_and_grad(loss, has_aux=True)(params, part, score_fn, penalty_fn)
        return (total, grads), rows

    fns = (as_partial(score_fn), None if penalty_fn is None else as_partial(penalty_fn))
    (total, grads), (scores, clipped) = sum_parts(Partial(gradient, params, *fns), batch)
    return grads, {
        "loss": total,
        "entropy": masked_mean(scores.entropy, mask),
        "kl": masked_sum(scores.kl, mask) / len(mask),
        "clipped": masked_mean(clipped, mask),
        **ratio_metrics(scores.logprobs, rollout.behavior_logprobs, mask),
    }
