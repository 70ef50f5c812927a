import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from oracles import CONFIG, VOCAB

from rl_jax.microbatch import sum_over_microbatches
from rl_jax.models.transformer import hidden_states, logits
from rl_jax.pretraining import held_out_nats, language_model_logprobs, pretrain_gradient

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (8, 6)))


def cross_entropy(params, tokens):
    """Of each token after the first, by optax. [B, L]."""
    inputs = tokens[:, :-1]
    states = hidden_states(params, inputs, jnp.ones(inputs.shape, bool), CONFIG)
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, states, CONFIG), tokens[:, 1:])


@pytest.mark.parametrize("microbatches", [1, 4])
def test_pretraining_gradient_is_that_of_optax(microbatches):
    params = oracles.random_params(1)
    loss, expected = optax_gradient(params)
    sum_parts = functools.partial(sum_over_microbatches, microbatches=microbatches)
    gradient = jax.jit(functools.partial(pretrain_gradient, config=CONFIG, sum_parts=sum_parts))
    grads, metrics = gradient(params, TOKENS)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for array, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=1e-4, atol=1e-5)
    assert set(metrics) == {"loss"}


optax_gradient = jax.jit(jax.value_and_grad(lambda params: jnp.mean(cross_entropy(params, TOKENS))))


def test_held_out_nats_are_those_of_optax():
    params = oracles.random_params(1)
    mask = jnp.asarray(np.random.default_rng(1).random((8, 5)) < 0.6)
    nats = np.asarray(jax.jit(cross_entropy)(params, TOKENS))
    measured = jax.jit(held_out_nats, static_argnums=3)(params, TOKENS, mask, CONFIG)
    np.testing.assert_allclose(measured, nats[mask].sum(), rtol=1e-5)
    logprobs = jax.jit(language_model_logprobs, static_argnums=2)(params, TOKENS, CONFIG)
    np.testing.assert_allclose(logprobs, -nats, rtol=1e-4, atol=1e-6)
