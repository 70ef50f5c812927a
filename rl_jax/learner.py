"""The learner: an update is a pure function of a state and a batch.

Letters: B sequences, C completion length, L predicted tokens of a training window.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rl_jax.masked import masked_sum
from rl_jax.microbatch import sum_over_microbatches
from rl_jax.models.transformer import TransformerConfig, hidden_states
from rl_jax.reinforce.advantages import kl_penalised_rewards, zero_signal_groups
from rl_jax.reinforce.distributions import kl_estimate
from rl_jax.reinforce.gradient import reinforce_gradient
from rl_jax.reinforce.objectives import Normalize, token_weights
from rl_jax.sampling import Sampling, untruncated
from rl_jax.scoring import Reference, completion_states, score_completions, token_scores
from rl_jax.types import Array, Metrics, PyTree, Rollout, TrainState

AdvantageFn = Callable[[Array, Array], tuple[Array, Array]]
"""Rewards [B] and the state's baseline [] -> advantages [B] and the next baseline []."""


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


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        baseline=jnp.full((), jnp.nan, jnp.float32),
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
    updated = TrainState(
        step=state.step + 1,
        params=choose(params, state.params),
        opt_state=choose(opt_state, state.opt_state),
        baseline=state.baseline,
        nonfinite=nonfinite,
    )
    return updated, {"grad_norm": norm, "nonfinite": nonfinite}


def language_model_logprobs(params: PyTree, tokens: Array, config: TransformerConfig) -> Array:
    """Log-probability of each token after the first, given those before. int32 [B, L + 1] -> float32 [B, L], nats."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    states = hidden_states(params, inputs, jnp.ones(inputs.shape, bool), config)
    return token_scores(params, states, targets, config, Sampling(length=1)).logprobs


def pretrain_gradient(
    params: PyTree, tokens: Array, config: TransformerConfig, microbatches: int = 1
) -> tuple[PyTree, Metrics]:
    """Gradient of the mean next-token cross-entropy of packed windows.

    Args:
        params: the model's parameters.
        tokens: int32 [B, L + 1].
        config: the model's configuration.
        microbatches: parts that the batch is worked through in.

    Returns:
        The gradient, shaped as `params`, and {"loss": nats a token}.
    """
    weights = token_weights(jnp.ones(tokens[:, 1:].shape, bool), "token")

    def loss_fn(params: PyTree, part: tuple[Array, Array]) -> tuple[Array, Metrics]:
        tokens, weights = part
        loss = -jnp.sum(weights * language_model_logprobs(params, tokens, config))
        return loss, {"loss": loss}

    def gradient(part: tuple[Array, Array]) -> tuple[PyTree, Metrics]:
        return jax.grad(loss_fn, has_aux=True)(params, part)

    return sum_over_microbatches(gradient, (tokens, weights), microbatches)


def held_out_nats(params: PyTree, tokens: Array, mask: Array, config: TransformerConfig) -> Array:
    """Sum of the cross-entropy of the targets under the mask, nats. int32 [B, L + 1], bool [B, L] -> []."""
    return -masked_sum(language_model_logprobs(params, tokens, config), mask)


def reinforce_update(
    state: TrainState,
    ref_params: PyTree,
    rollout: Rollout,
    rewards: Array,
    *,
    config: TransformerConfig,
    sampling: Sampling,
    advantage_fn: AdvantageFn,
    kl_coefficient: float,
    normalize: Normalize,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
) -> tuple[TrainState, Metrics]:
    """One step of REINFORCE with the KL penalty in the reward (k1), from a rollout of the current policy.

    Args:
        state: its params sampled `rollout`.
        ref_params: the frozen reference policy.
        rollout: B completions.
        rewards: [B].
        config: configuration of policy and reference.
        sampling: how `rollout` was sampled. The reference is taken at its temperature, without its filters; so are both
            policies for the exact KL.
        advantage_fn: rewards less the penalty -> advantages.
        kl_coefficient: reward units a nat.
        normalize: see `token_weights`.
        optimizer: the transformation whose state `state` holds.
        microbatches: parts that the gradient is accumulated over.

    Returns:
        The state after, and metrics: those of `reinforce_gradient` and `apply_gradients`; reward and reward_std;
        kl_k1 (nats a completion); length (tokens); truncated (share of completions); zero_signal_groups (share of
        groups, where G is more than 1); tokens (sampled in all).
    """
    mask = rollout.completion_mask
    ref_states = completion_states(ref_params, rollout, config)
    ref_scores = token_scores(ref_params, ref_states, rollout.completions, config, untruncated(sampling))
    kl = kl_estimate(rollout.behavior_logprobs, ref_scores.logprobs, "k1")
    penalised = kl_penalised_rewards(rewards, kl, mask, kl_coefficient)
    advantages, baseline = advantage_fn(penalised, state.baseline)

    def score(params: PyTree, part: Rollout, ref_states: Any) -> Any:
        return score_completions(params, part, config, sampling, Reference(ref_params, ref_states))

    grads, metrics = reinforce_gradient(
        state.params,
        rollout,
        advantages,
        score,
        normalize=normalize,
        context=ref_states,
        microbatches=microbatches,
    )
    state, applied = apply_gradients(state, grads, optimizer)
    state = dataclasses.replace(state, baseline=jnp.where(jnp.isfinite(baseline), baseline, state.baseline))
    if sampling.group_size > 1:
        metrics["zero_signal_groups"] = zero_signal_groups(rewards, sampling.group_size)
    return state, metrics | applied | {
        "reward": jnp.mean(rewards),
        "reward_std": jnp.std(rewards),
        "kl_k1": masked_sum(kl, mask) / len(rewards),
        "length": jnp.mean(jnp.sum(mask, axis=1, dtype=jnp.float32)),
        "truncated": jnp.mean(rollout.truncated, dtype=jnp.float32),
        "tokens": jnp.sum(mask),
    }
