"""Learning from unlabelled text: the gradient of the cross-entropy of packed windows.

Letters: B windows, L predicted tokens of each.
"""

import jax
import jax.numpy as jnp

from rl_jax.masked import masked_sum
from rl_jax.microbatch import sum_over_microbatches
from rl_jax.models.transformer import TransformerConfig, hidden_states
from rl_jax.reinforce.objectives import token_weights
from rl_jax.sampling import Sampling
from rl_jax.scoring import token_scores
from rl_jax.types import Array, Metrics, PyTree


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

    def gradient(part: tuple[Array, Array]) -> tuple[tuple[PyTree, Metrics], tuple[()]]:
        return jax.grad(loss_fn, has_aux=True)(params, part), ()

    return sum_over_microbatches(gradient, (tokens, weights), microbatches)[0]


def held_out_nats(params: PyTree, tokens: Array, mask: Array, config: TransformerConfig) -> Array:
    """Sum of the cross-entropy of the targets under the mask, nats. int32 [B, L + 1], bool [B, L] -> []."""
    return -masked_sum(language_model_logprobs(params, tokens, config), mask)
