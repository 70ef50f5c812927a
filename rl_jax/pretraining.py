"""Learning from text: the gradient of the cross-entropy of packed windows, or of completions given their prompts.

Letters: B windows or prompts, L predicted tokens of a window, C completion length.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rl_jax.masked import masked_sum
from rl_jax.microbatch import SumParts, sum_over_whole
from rl_jax.models.config import TransformerConfig
from rl_jax.models.lora import WholeFn, itself
from rl_jax.models.transformer import hidden_states
from rl_jax.reinforce.objectives import token_weights
from rl_jax.sampling import Sampling
from rl_jax.scoring import completion_logprobs, token_scores
from rl_jax.types import Array, Metrics, PreferenceBatch, PyTree, Rollout


def language_model_logprobs(params: PyTree, tokens: Array, config: TransformerConfig) -> Array:
    """Log-probability of each token after the first, given those before. int32 [B, L + 1] -> float32 [B, L], nats."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    states = hidden_states(params, inputs, jnp.ones(inputs.shape, bool), config)
    return token_scores(params, states, targets, config, Sampling(length=1)).logprobs


def pretrain_gradient(
    params: PyTree, tokens: Array, config: TransformerConfig, sum_parts: SumParts = sum_over_whole
) -> tuple[PyTree, Metrics]:
    """Gradient of the mean next-token cross-entropy of packed windows.

    Args:
        params: the model's parameters.
        tokens: int32 [B, L + 1].
        config: the model's configuration.
        sum_parts: how the gradient is accumulated over parts of the batch.

    Returns:
        The gradient, shaped as `params`, and {"loss": nats a token}.
    """
    mask = jnp.ones(tokens[:, 1:].shape, bool)
    return _gradient(functools.partial(language_model_logprobs, config=config), params, tokens, mask, sum_parts)


def held_out_nats(params: PyTree, tokens: Array, mask: Array, config: TransformerConfig) -> Array:
    """Sum of the cross-entropy of the targets under the mask, nats. int32 [B, L + 1], bool [B, L] -> []."""
    return -masked_sum(language_model_logprobs(params, tokens, config), mask)


def finetune_gradient(
    params: PyTree,
    batch: PreferenceBatch,
    config: TransformerConfig,
    sum_parts: SumParts = sum_over_whole,
    whole: WholeFn = itself,
) -> tuple[PyTree, Metrics]:
    """Gradient of the mean cross-entropy of the tokens of completions, given their prompts; prompts cost nothing.

    Supervised fine-tuning, as Ziegler 2019, Stiennon 2020 and Ouyang 2022 have it between pretraining and the reward.

    Args:
        params: what is trained of the model.
        batch: prompts with one completion each, completions [B, 1, C]; labels and margins count for nothing.
        config: the model's configuration.
        sum_parts: how the gradient is accumulated over parts of the batch.
        whole: what is trained -> the model's parameters.

    Returns:
        The gradient, shaped as `params`, and {"loss": nats a completion token}.
    """
    rollout = demonstrations(batch)
    logprobs_fn = functools.partial(_logprobs, config=config)
    return _gradient(logprobs_fn, params, rollout, rollout.completion_mask, sum_parts, whole)


def completion_nats(params: PyTree, batch: PreferenceBatch, config: TransformerConfig) -> Array:
    """Sum of the cross-entropy of the completions' tokens, nats; prompts with one completion each, [B, 1, C] -> []."""
    return -jnp.sum(_logprobs(params, demonstrations(batch), config))


def demonstrations(batch: PreferenceBatch) -> Rollout:
    """Completions that somebody wrote, one for each prompt, as if they had been sampled. [B, 1, C] -> [B, C]."""
    chex.assert_rank([batch.completions, batch.completion_mask], 3)
    chex.assert_axis_dimension(batch.completions, 1, 1)
    completions, mask = batch.completions[:, 0], batch.completion_mask[:, 0]
    whole = jnp.zeros(len(completions), bool)
    return Rollout(batch.prompts, batch.prompt_mask, completions, mask, jnp.zeros(mask.shape), truncated=whole)


def _logprobs(params: PyTree, rollout: Rollout, config: TransformerConfig) -> Array:
    return completion_logprobs(params, rollout, config, Sampling(length=rollout.completions.shape[1]))


def _gradient(
    logprobs_fn: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    batch: PyTree,
    mask: Array,
    sum_parts: SumParts,
    whole: WholeFn = itself,
) -> tuple[PyTree, Metrics]:
    """Of the mean cross-entropy of the tokens under a mask, whose log-probabilities are a function of a batch."""

    def loss_fn(params: PyTree, whole: WholeFn, part: tuple[PyTree, Array]) -> tuple[Array, Metrics]:
        batch, weights = part
        loss = -jnp.sum(weights * logprobs_fn(whole(params), batch))
        return loss, {"loss": loss}

    def gradient(params: PyTree, whole: WholeFn, part: tuple[PyTree, Array]) -> tuple[tuple[PyTree, Metrics], tuple]:
        return jax.grad(loss_fn, has_aux=True)(params, whole, part), ()

    return sum_parts(Partial(gradient, params, whole), (batch, token_weights(mask, "token")))[0]
