"""Learning a reward: the gradient of one member, and one update of an ensemble.

Letters: M members, B prompts, K candidates of each.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from rl_jax.learner import apply_gradients, init_state
from rl_jax.masked import masked_mean
from rl_jax.microbatch import SumParts, sum_over_whole
from rl_jax.models.config import TransformerConfig
from rl_jax.models.lora import WholeFn, itself
from rl_jax.models.reward_model import candidate_rewards
from rl_jax.types import Array, Metrics, PreferenceBatch, PyTree, TrainState

JudgedLoss = Callable[[Array, PreferenceBatch], Array]
"""Rewards [B, K] of a batch's candidates, and the batch -> the loss of each prompt [B]."""


def reward_gradient(
    params: PyTree,
    batch: PreferenceBatch,
    config: TransformerConfig,
    loss_fn: JudgedLoss,
    sum_parts: SumParts = sum_over_whole,
    whole: WholeFn = itself,
) -> tuple[PyTree, Metrics]:
    """Gradient of the mean loss of a batch's prompts, for one member.

    Args:
        params: what is trained of one member; its normalizer has no part in it.
        batch: B prompts with K candidates each.
        config: the member's configuration.
        loss_fn: what it learns by; see `rl_jax.preferences.losses`.
        sum_parts: how the gradient is accumulated over parts of the batch.
        whole: what is trained of a member -> its parameters.

    Returns:
        The gradient, shaped as `params`, and metrics: loss; accuracy, the share of the batch's ordered pairs of
        candidates that the rewards order so (where K is more than 1).
    """
    prompts = len(batch.prompts)

    def loss_of(params: PyTree, whole: WholeFn, part: PreferenceBatch) -> tuple[Array, tuple[Array, Array]]:
        rewards = candidate_rewards(whole(params), part, config)
        loss = jnp.sum(loss_fn(rewards, part)) / prompts
        return loss, (loss, rewards)

    def gradient(params: PyTree, whole: WholeFn, part: PreferenceBatch) -> tuple[tuple[PyTree, Array], Array]:
        grads, (loss, rewards) = jax.grad(loss_of, has_aux=True)(params, whole, part)
        return (grads, loss), rewards

    (grads, loss), rewards = sum_parts(Partial(gradient, params, whole), batch)
    metrics = {"loss": loss}
    if batch.labels.shape[1] > 1:
        metrics["accuracy"] = concordance(rewards, batch.labels, jnp.any(batch.completion_mask, axis=2))
    return grads, metrics


def concordance(rewards: Array, labels: Array, mask: Array) -> Array:
    """Share of the pairs of a prompt's candidates with unequal labels whose rewards are in the same order; ties half.

    Args:
        rewards: [B, K].
        labels: higher is better. [B, K].
        mask: which candidates there are. bool [B, K].

    Returns:
        [].
    """
    led = jnp.sign(rewards[:, :, None] - rewards[:, None, :])
    judged = jnp.sign(labels[:, :, None] - labels[:, None, :])
    return masked_mean((led * judged + 1) / 2, mask[:, :, None] & mask[:, None, :] & (judged > 0))


def init_ensemble_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update of an ensemble, each member with an optimizer state of its own. [M, ...]."""
    state = init_state(params, optimizer, kl_coefficient=0.0)
    return dataclasses.replace(state, opt_state=jax.vmap(optimizer.init)(params))


def ensemble_update(
    state: TrainState,
    batch: PreferenceBatch,
    config: TransformerConfig,
    loss_fn: JudgedLoss,
    optimizer: optax.GradientTransformation,
    sum_parts: SumParts = sum_over_whole,
    whole: WholeFn = itself,
) -> tuple[TrainState, Metrics]:
    """One update of every member of an ensemble, each from its own batch.

    Args:
        state: params and opt_state have a leading axis [M, ...]; see `init_ensemble_state`.
        batch: of each member. [M, B, ...].
        config: the members' configuration.
        loss_fn: what they learn by.
        optimizer: the transformation whose state `state` holds.
        sum_parts: as for `reward_gradient`, and so is whole.

    Returns:
        The state after, and the metrics of `reward_gradient` and `apply_gradients`, their means over members (of
        nonfinite the largest).
    """

    def member(params: PyTree, opt_state: PyTree, part: PreferenceBatch) -> tuple[PyTree, PyTree, Array, Metrics]:
        grads, metrics = reward_gradient(params, part, config, loss_fn, sum_parts, whole)
        after, applied = apply_gradients(
            dataclasses.replace(state, params=params, opt_state=opt_state), grads, optimizer
        )
        return after.params, after.opt_state, after.nonfinite, metrics | applied

    params, opt_state, nonfinite, metrics = jax.vmap(member)(state.params, state.opt_state, batch)
    worst = jnp.max(nonfinite)
    updated = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, nonfinite=worst)
    return updated, {name: jnp.mean(value) for name, value in metrics.items()} | {"nonfinite": worst}
