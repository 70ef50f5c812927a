import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from oracles import CONFIG, VOCAB

from rl_jax.errors import InputError
from rl_jax.learner import (
    apply_gradients,
    held_out_nats,
    init_state,
    language_model_logprobs,
    make_optimizer,
    pretrain_gradient,
)
from rl_jax.models.transformer import hidden_states, logits

RATES = np.array([0.1, 0.05, 0.2, 0.1, 0.1], np.float32)
OPTIMIZER = make_optimizer(lambda count: jnp.asarray(RATES)[count], weight_decay=0.3, clip_norm=1.0, betas=(0.8, 0.95))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (8, 6)))


def toy_params():
    return {"matrix": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "bias": jnp.array([0.3, -0.7]), "gain": jnp.array(2.0)}


def toy_gradients(seed, scale):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32), toy_params())


@jax.jit
def apply(state, grads):
    return apply_gradients(state, grads, OPTIMIZER)


def assert_bitwise(tree, expected):
    for array, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert (array.dtype, np.asarray(array).tobytes()) == (wanted.dtype, np.asarray(wanted).tobytes())


def test_updates_are_those_of_adamw_by_hand():
    state = init_state(toy_params(), OPTIMIZER)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), toy_params())
    first, second = (dict.fromkeys(params, 0.0) for _ in range(2))
    norms = []
    for step, scale in enumerate([0.1, 3.0, 0.2, 10.0, 0.05]):
        grads = toy_gradients(step, scale)
        norm = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in grads.values()))
        norms.append(norm)
        for name, param in params.items():
            grad = np.asarray(grads[name], np.float64) / max(norm, 1)
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            mean, square = first[name] / (1 - 0.8 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
            decay = 0.3 * param if param.ndim > 1 else 0.0
            params[name] = param - RATES[step] * (mean / (np.sqrt(square) + 1e-8) + decay)
        state, metrics = apply(state, grads)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        for name, param in params.items():
            np.testing.assert_allclose(state.params[name], param, rtol=1e-5, atol=1e-6)
    assert min(norms) < 1 < max(norms)
    assert int(state.step) == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_update_that_is_not_finite_is_skipped(bad):
    state, _ = apply(init_state(toy_params(), OPTIMIZER), toy_gradients(0, 1.0))
    grads = toy_gradients(1, 1.0)
    broken = grads | {"bias": grads["bias"].at[1].set(bad)}
    skipped, metrics = apply(state, broken)
    assert_bitwise((skipped.params, skipped.opt_state), (state.params, state.opt_state))
    assert (int(skipped.step), int(skipped.nonfinite), int(metrics["nonfinite"])) == (2, 1, 1)
    assert not jnp.isfinite(metrics["grad_norm"])
    twice, metrics = apply(skipped, broken)
    assert (int(twice.step), int(twice.nonfinite), int(metrics["nonfinite"])) == (3, 2, 2)

    resumed, metrics = apply(twice, grads)
    assert (int(resumed.step), int(resumed.nonfinite), int(metrics["nonfinite"])) == (4, 0, 0)
    expected, _ = apply(state, grads)
    assert_bitwise((resumed.params, resumed.opt_state), (expected.params, expected.opt_state))
    assert jnp.any(resumed.params["matrix"] != state.params["matrix"])


def test_initial_state():
    state = init_state(toy_params(), OPTIMIZER)
    assert (int(state.step), int(state.nonfinite)) == (0, 0)
    assert jnp.isnan(state.baseline)
    assert {x.dtype for x in (state.step, state.nonfinite)} == {jnp.dtype("int32")}
    kept, _ = apply(dataclasses.replace(state, baseline=jnp.float32(3.5)), toy_gradients(0, 1.0))
    assert float(kept.baseline) == 3.5


def cross_entropy(params, tokens):
    """Of each token after the first, by optax. [B, L]."""
    inputs = tokens[:, :-1]
    states = hidden_states(params, inputs, jnp.ones(inputs.shape, bool), CONFIG)
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, states, CONFIG), tokens[:, 1:])


@pytest.mark.parametrize("microbatches", [1, 4])
def test_pretraining_gradient_is_that_of_optax(microbatches):
    params = oracles.random_params(1)
    loss, expected = optax_gradient(params)
    gradient = jax.jit(functools.partial(pretrain_gradient, config=CONFIG, microbatches=microbatches))
    grads, metrics = gradient(params, TOKENS)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for array, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=1e-4, atol=1e-5)
    assert set(metrics) == {"loss"}


optax_gradient = jax.jit(jax.value_and_grad(lambda params: jnp.mean(cross_entropy(params, TOKENS))))


def test_pretraining_refuses_a_batch_that_does_not_divide():
    with pytest.raises(InputError, match="8 sequences does not divide into 3"):
        pretrain_gradient(oracles.random_params(1), TOKENS, CONFIG, microbatches=3)


def test_held_out_nats_are_those_of_optax():
    params = oracles.random_params(1)
    mask = jnp.asarray(np.random.default_rng(1).random((8, 5)) < 0.6)
    nats = np.asarray(jax.jit(cross_entropy)(params, TOKENS))
    measured = jax.jit(held_out_nats, static_argnums=3)(params, TOKENS, mask, CONFIG)
    np.testing.assert_allclose(measured, nats[mask].sum(), rtol=1e-5)
    logprobs = jax.jit(language_model_logprobs, static_argnums=2)(params, TOKENS, CONFIG)
    np.testing.assert_allclose(logprobs, -nats, rtol=1e-4, atol=1e-6)
