"""The learner: an update is a pure function of a state and a batch, whatever kind of policy it is.

Letters: B sequences, N prompts of G completions each, C completion length.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from rl_jax.masked import masked_mean, masked_sum
from rl_jax.microbatch import SumParts, sum_over_whole
from rl_jax.reinforce.advantages import zero_signal_groups
from rl_jax.reinforce.composition import Estimator, estimate_advantages
from rl_jax.reinforce.diagnostics import explained_variance, gradient_noise
from rl_jax.reinforce.distributions import kl_estimate
from rl_jax.reinforce.gradient import ScoreFn, Scores, as_partial, reinforce_gradient
from rl_jax.reinforce.objectives import value_errors
from rl_jax.reinforce.penalties import adaptive_kl_coefficient, kl_loss_terms, overlong_penalty, shape_rewards
from rl_jax.types import Array, Metrics, PyTree, Rollout, TrainState

REDUCTIONS = {  # of a metric over the updates of one step, where it is not the mean
    "logprob_gap": lambda x: x[0],  # later ones are no gap between sampler and learner but what was learned
    "ratio_min": jnp.min,
    "ratio_max": jnp.max,
    "effective_sample_size": jnp.min,
}


class Experience(NamedTuple):
    """A batch of completions, and what was worked out about them before the gradient. Every array begins with B.

    Attributes:
        rollout: B completions.
        advantages: [B] or [B, C].
        ref_logprobs: of the tokens under the reference policy, nats. [B, C].
        critic: None without one.
        context: what the score function is given besides.
    """

    rollout: Rollout
    advantages: Array
    ref_logprobs: Array
    critic: "CriticTargets | None"
    context: Any


class CriticTargets(NamedTuple):
    """What a critic expected before each token, before the step, and what it is to learn. [B, C] each."""

    values: Array
    targets: Array


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float, clip_norm: float, betas: tuple[float, float]
) -> optax.GradientTransformation:
    """AdamW (Loshchilov 2019) after clipping the gradient's global norm. Weights decay in matrices alone.

    Args:
        learning_rate: a number, or a schedule of the number of updates applied.
        weight_decay: a step multiplies matrices by 1 - learning_rate * weight_decay.
        clip_norm: the longest gradient, global L2 norm.
        betas: decay of the first and of the second moment.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(
            learning_rate,
            *betas,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


def init_state(params: PyTree, optimizer: optax.GradientTransformation, kl_coefficient: float | Array) -> TrainState:
    """The state before the first update; `kl_coefficient` is what `policy_gradient_update` charges for a nat."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        baseline=jnp.full((), jnp.nan, jnp.float32),
        kl_coefficient=jnp.asarray(kl_coefficient, jnp.float32),
        nonfinite=jnp.zeros((), jnp.int32),
    )


def apply_gradients(
    state: TrainState, grads: PyTree, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One update, skipped where the gradient is not finite.

    Args:
        state: before.
        grads: as `state.params`.
        optimizer: the transformation whose state `state` holds.

    Returns:
        The state after, its step one higher either way, and metrics: grad_norm (global L2, before clipping) and
        nonfinite (consecutive updates skipped).
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    def choose(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    nonfinite = jnp.where(finite, 0, state.nonfinite + 1)
    updated = dataclasses.replace(
        state,
        step=state.step + 1,
        params=choose(params, state.params),
        opt_state=choose(opt_state, state.opt_state),
        nonfinite=nonfinite,
    )
    return updated, {"grad_norm": norm, "nonfinite": nonfinite}


def policy_gradient_update(
    state: TrainState,
    rollout: Rollout,
    rewards: Array,
    *,
    estimator: Estimator,
    score_fn: ScoreFn,
    optimizer: optax.GradientTransformation,
    group_size: int,
    ref_logprobs: Array,
    context: Any = None,
    greedy_rewards: Array | None = None,
    key: Array | None = None,
    sum_parts: SumParts = sum_over_whole,
    noise_at_once: int = 0,
) -> tuple[TrainState, Metrics]:
    """One step of an estimator, from a rollout of the current policy.

    Args:
        state: its params sampled `rollout`, and its KL coefficient is the one charged.
        rollout: B completions.
        rewards: [B].
        estimator: a row of `rl_jax.reinforce.estimators`.
        score_fn: the policy's scores of a rollout, with values where the estimator has a critic.
        optimizer: the transformation whose state `state` holds.
        group_size: G, completions of each prompt.
        ref_logprobs: of the rollout's tokens under the reference policy, nats. [B, C].
        context: what `score_fn` is given besides, a pytree of arrays [B, ...].
        greedy_rewards: of the greedy completion of each sequence's prompt, where the estimator asks for them. [B].
        key: shuffles the batch, where there are several minibatches.
        sum_parts: how each gradient is accumulated over parts of the batch.
        noise_at_once: where it is not 0, adds the metrics of `gradient_noise` over prompts, so many prompts at once:
            a multiple of the number of devices, and a divisor of N.

    Returns:
        The state after, and metrics: those of `reinforce_gradient` and `apply_gradients`, of several updates their
        mean (ratio_min and effective_sample_size the least, ratio_max the largest, logprob_gap the first); reward and
        reward_std; kl_k1 (nats a completion); kl_coefficient; length (tokens); truncated (share of completions);
        zero_signal_groups (share of groups whose rewards are all equal, where G is more than 1); tokens (in all); with
        a critic explained_variance and value_loss, of before the step.
    """
    kl = kl_estimate(rollout.behavior_logprobs, ref_logprobs, "k1")
    values = critic_values(state.params, rollout, score_fn, context, sum_parts) if estimator.critic else None
    shaped, greedy = _shape(estimator, rewards, greedy_rewards)
    advantages, targets, baseline = estimate_advantages(
        estimator,
        shaped + overlong_penalty(rollout.completion_mask, estimator.overlong_share),
        kl,
        rollout.completion_mask,
        kl_coefficient=state.kl_coefficient,
        group_size=group_size,
        baseline=state.baseline,
        values=values,
        greedy_rewards=greedy,
    )
    critic = None if values is None or targets is None else CriticTargets(values, targets)
    experience = Experience(rollout, advantages, ref_logprobs, critic, context)
    about = _batch_metrics(experience, rewards, kl, group_size)
    if noise_at_once:
        about |= _noise(state, experience, estimator, score_fn, group_size, noise_at_once)
    updated, metrics = _fit(state, experience, estimator, score_fn, optimizer, key, sum_parts)
    nonfinite = jnp.where(updated.nonfinite > 0, state.nonfinite + 1, 0)
    coefficient = state.kl_coefficient
    if estimator.kl_target is not None:
        steering = {"target": estimator.kl_target, "horizon": estimator.kl_horizon, "completions": len(rewards)}
        coefficient = adaptive_kl_coefficient(coefficient, about["kl_k1"], **steering)
    updated = dataclasses.replace(
        updated,
        step=state.step + 1,
        baseline=jnp.where(jnp.isfinite(baseline), baseline, state.baseline),
        kl_coefficient=coefficient,
        nonfinite=nonfinite,
    )
    metrics |= {"nonfinite": nonfinite, "kl_coefficient": state.kl_coefficient}
    return updated, metrics | about


def experience_gradient(
    params: PyTree,
    kl_coefficient: Array,
    experience: Experience,
    *,
    estimator: Estimator,
    score_fn: ScoreFn,
    sum_parts: SumParts = sum_over_whole,
) -> tuple[PyTree, Metrics]:
    """The gradient of everything that an estimator's loss holds: policy, divergence, entropy, critic.

    Args:
        params: what the gradient is taken for.
        kl_coefficient: reward units a nat. [].
        experience: a batch, or a part of one that is to have an update of its own.
        estimator: as for `policy_gradient_update`, and so are score_fn and sum_parts.

    Returns:
        As `reinforce_gradient`.
    """

    def score(score_fn: ScoreFn, params: PyTree, rollout: Rollout, part: Experience) -> Scores:
        return score_fn(params, rollout, part.context)

    def penalty(kl_coefficient: Array, scores: Scores, part: Experience) -> Array:
        terms = kl_coefficient * kl_loss_terms(scores.logprobs, part.ref_logprobs, scores.kl, estimator.kl)
        terms -= estimator.entropy_coefficient * scores.entropy
        if part.critic is not None and scores.values is not None:
            errors = value_errors(scores.values, *part.critic, value_clip=estimator.value_clip)
            terms += estimator.value_coefficient * errors
        return terms

    return reinforce_gradient(
        params,
        experience.rollout,
        experience.advantages,
        Partial(score, as_partial(score_fn)),
        normalize=estimator.normalize,
        loss_fn=estimator.loss,
        penalty_fn=Partial(penalty, kl_coefficient),
        context=experience,
        sum_parts=sum_parts,
    )


def critic_values(
    params: PyTree, rollout: Rollout, score_fn: ScoreFn, context: Any, sum_parts: SumParts = sum_over_whole
) -> Array:
    """What the critic expects before each token of a rollout, as constants. [B, C].

    Raises:
        ValueError: the score function has no values.
    """

    def values(params: PyTree, score_fn: ScoreFn, part: tuple[Rollout, Any]) -> tuple[tuple[()], Array | None]:
        return (), score_fn(params, *part).values

    _, expected = sum_parts(Partial(values, params, as_partial(score_fn)), (rollout, context))
    if expected is None:
        raise ValueError("The estimator has a critic, and the policy has none: see `transformer.add_value_head`.")
    return jax.lax.stop_gradient(expected)


def _shape(estimator: Estimator, rewards: Array, greedy_rewards: Array | None) -> tuple[Array, Array | None]:
    """Rewards and those of greedy completions [B] each, shaped alike."""
    parts = [rewards] if greedy_rewards is None else [rewards, greedy_rewards]
    shaped = shape_rewards(
        jnp.concatenate(parts),
        scale=estimator.reward_scale,
        clip=estimator.reward_clip,
        whiten=estimator.whiten_rewards,
    )
    return shaped[: len(rewards)], None if greedy_rewards is None else shaped[len(rewards) :]


def _fit(
    state: TrainState,
    experience: Experience,
    estimator: Estimator,
    score_fn: ScoreFn,
    optimizer: optax.GradientTransformation,
    key: Array | None,
    sum_parts: SumParts,
) -> tuple[TrainState, Metrics]:
    """Every update that an estimator makes from a batch, at the KL coefficient of its beginning."""

    def update(state: TrainState, part: Experience) -> tuple[TrainState, Metrics]:
        grads, metrics = experience_gradient(
            state.params,
            state.kl_coefficient,
            part,
            estimator=estimator,
            score_fn=score_fn,
            sum_parts=sum_parts,
        )
        state, applied = apply_gradients(state, grads, optimizer)
        return state, metrics | applied

    if estimator.updates == 1:
        return update(state, experience)

    def epoch(state: TrainState, key: Array | None) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(update, state, _minibatches(key, experience, estimator.minibatches))

    keys = None if key is None else jax.random.split(key, estimator.epochs)
    state, metrics = jax.lax.scan(epoch, state, keys, length=estimator.epochs)
    return state, {name: REDUCTIONS.get(name, jnp.mean)(over.reshape(-1)) for name, over in metrics.items()}


def _minibatches(key: Array | None, experience: Experience, minibatches: int) -> Experience:
    """A batch in random parts. [B, ...] -> [minibatches, B / minibatches, ...].

    Of every few neighbours each part takes one, so that a batch that is laid over devices stays where it is.
    """
    if minibatches == 1:
        return jax.tree.map(lambda x: x[None], experience)
    if key is None:
        raise ValueError("Several minibatches need a key to shuffle the batch with.")
    order = jnp.argsort(jax.random.uniform(key, (len(experience.advantages) // minibatches, minibatches)), axis=1)

    def cut(x: Array) -> Array:
        neighbours = x.reshape(-1, minibatches, *x.shape[1:])
        chosen = jnp.take_along_axis(neighbours, order.reshape(*order.shape, *[1] * (x.ndim - 1)), axis=1)
        return jnp.moveaxis(chosen, 1, 0)

    return jax.tree.map(cut, experience)


def _noise(
    state: TrainState,
    experience: Experience,
    estimator: Estimator,
    score_fn: ScoreFn,
    group_size: int,
    at_once: int,
) -> Metrics:
    """`gradient_noise` over prompts; what advantages share across prompts, and a mean over tokens, is held fixed."""
    mask = experience.rollout.completion_mask
    scale = len(mask) / jnp.sum(mask) if estimator.normalize == "token" else 1.0
    normalize = "completion" if estimator.normalize == "token" else estimator.normalize
    estimator = dataclasses.replace(estimator, normalize=normalize)
    groups = jax.tree.map(lambda x: x.reshape(-1, group_size, *x.shape[1:]), experience)

    def gradient(group: Experience) -> PyTree:
        grads, _ = experience_gradient(
            state.params, state.kl_coefficient, group, estimator=estimator, score_fn=score_fn
        )
        return jax.tree.map(lambda x: scale * x, grads)

    return gradient_noise(gradient, groups, at_once)


def _batch_metrics(experience: Experience, rewards: Array, kl: Array, group_size: int) -> Metrics:
    """What can be said of a batch without the policy."""
    rollout, mask = experience.rollout, experience.rollout.completion_mask
    metrics = {
        "reward": jnp.mean(rewards),
        "reward_std": jnp.std(rewards),
        "kl_k1": masked_sum(kl, mask) / len(rewards),
        "length": jnp.mean(jnp.sum(mask, axis=1, dtype=jnp.float32)),
        "truncated": jnp.mean(rollout.truncated, dtype=jnp.float32),
        "tokens": jnp.sum(mask),
    }
    if group_size > 1:
        metrics["zero_signal_groups"] = jnp.mean(zero_signal_groups(rewards, group_size), dtype=jnp.float32)
    if experience.critic is not None:
        values, targets = experience.critic
        metrics["explained_variance"] = explained_variance(values, targets, mask)
        metrics["value_loss"] = masked_mean(jnp.square(values - targets), mask) / 2
    return metrics
