"""The REINFORCE gradient of a batch of rollouts, for any policy that can score them."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

from rl_jax.masked import masked_sum
from rl_jax.microbatch import sum_over_microbatches
from rl_jax.reinforce.objectives import Normalize, reinforce_loss, token_weights
from rl_jax.types import Array, Metrics, PyTree, Rollout


class Scores(Protocol):
    """What the gradient needs to know of each completion token, [B, C] each; see `rl_jax.scoring.TokenScores`."""

    logprobs: Array
    entropy: Array
    kl: Array


ScoreFn = Callable[[PyTree, Rollout, Any], Scores]
"""Params, rollout, context (any pytree of arrays [B, ...], or None) -> Scores."""


class _Batch(NamedTuple):
    rollout: Rollout
    advantages: Array
    context: Any
    weights: Array
    by_token: Array
    by_completion: Array


def reinforce_gradient(
    params: PyTree,
    rollout: Rollout,
    advantages: Array,
    score_fn: ScoreFn,
    *,
    normalize: Normalize,
    context: Any = None,
    microbatches: int = 1,
) -> tuple[PyTree, Metrics]:
    """Gradient of the REINFORCE loss, the same however the batch is split.

    Args:
        params: the policy's parameters, which the gradient is taken for.
        rollout: B sequences.
        advantages: one for each completion [B] or each token [B, C]. No gradient flows through them.
        score_fn: the policy's scores of a rollout.
        normalize: what the loss is a mean of; see `token_weights`.
        context: what `score_fn` is given besides, split with the rollout.
        microbatches: parts that the batch is worked through in, to save memory.

    Returns:
        The gradient, shaped as `params`, and metrics: loss; entropy (mean over tokens, nats); kl (exact, nats a
        completion); logprob_gap (mean over tokens of |behavior_logprobs - logprobs|, nats: for a policy that has not
        changed since it sampled, what the sampler and the learner disagree by).
    """
    chex.assert_rank(advantages, {1, 2})
    chex.assert_equal_shape_prefix([advantages, rollout.completion_mask], advantages.ndim)
    mask = rollout.completion_mask
    batch = _Batch(
        rollout,
        jax.lax.stop_gradient(advantages),
        context,
        weights=token_weights(mask, normalize),
        by_token=token_weights(mask, "token"),
        by_completion=token_weights(mask, "completion"),
    )

    def loss_fn(params: PyTree, part: _Batch) -> tuple[Array, Metrics]:
        scores = score_fn(params, part.rollout, part.context)
        loss, metrics = reinforce_loss(scores.logprobs, part.advantages, part.weights)
        gap = jnp.abs(part.rollout.behavior_logprobs - scores.logprobs)
        terms = {
            "entropy": part.by_token * scores.entropy,
            "kl": part.by_completion * scores.kl,
            "logprob_gap": part.by_token * gap,
        }
        sums = {name: masked_sum(term, part.rollout.completion_mask) for name, term in terms.items()}
        return loss, jax.lax.stop_gradient(metrics | sums)

    def gradient(part: _Batch) -> tuple[PyTree, Metrics]:
        return jax.grad(loss_fn, has_aux=True)(params, part)

    return sum_over_microbatches(gradient, batch, microbatches)
