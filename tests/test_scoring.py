import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import CONFIG, EOS, LENGTH, VOCAB

from rl_jax import scoring
from rl_jax.errors import InputError
from rl_jax.models.config import llama
from rl_jax.models.transformer import hidden_states, init_params, logits
from rl_jax.reinforce.distributions import kl_estimate, token_logprobs
from rl_jax.reinforce.gradient import reinforce_gradient
from rl_jax.rollout import compute_params
from rl_jax.run.spmd import each_device, make_mesh, pmapped
from rl_jax.sampling import Sampling, warp_logits
from rl_jax.scoring import (
    Reference,
    completion_logprobs,
    completion_states,
    reference_scores,
    score_completions,
    token_scores,
)
from rl_jax.types import Rollout

PARAMS, REF_PARAMS = oracles.random_params(1), oracles.random_params(2)
FILTERS = Sampling(LENGTH, temperature=0.8, top_k=3, top_p=0.6, min_p=0.3)


@functools.partial(jax.jit, static_argnames="sampling")
def score(params, ref_params, rollout, sampling):
    reference = Reference(ref_params, completion_states(ref_params, rollout, CONFIG))
    scores = score_completions(params, rollout, CONFIG, sampling, reference)
    return scores, token_scores(ref_params, reference.states, rollout.completions, CONFIG, sampling).logprobs


def test_scores_and_divergences_are_those_of_enumeration():
    rollout, temperature = oracles.enumerated_rollout(), 0.7
    scores, ref_logprobs = score(PARAMS, REF_PARAMS, rollout, Sampling(LENGTH, temperature=temperature))
    logprobs, ref = (oracles.sequence_logprobs(params, temperature) for params in (PARAMS, REF_PARAMS))
    sums = jax.tree.map(lambda x: x.sum(axis=1).reshape(logprobs.shape), scores)
    np.testing.assert_allclose(sums.logprobs, logprobs, rtol=1e-4, atol=1e-5)

    probabilities, kl = np.exp(logprobs), oracles.sequence_kl(logprobs, ref)
    np.testing.assert_allclose(np.sum(probabilities * sums.kl, axis=1), kl, rtol=1e-4)
    k1 = jnp.where(rollout.completion_mask, kl_estimate(scores.logprobs, ref_logprobs, "k1"), 0.0).sum(axis=1)
    np.testing.assert_allclose(np.sum(probabilities * k1.reshape(logprobs.shape), axis=1), kl, rtol=1e-4)
    sequence_entropy = -np.sum(probabilities * logprobs, axis=1)
    np.testing.assert_allclose(np.sum(probabilities * sums.entropy, axis=1), sequence_entropy, rtol=1e-4)
    assert np.min(kl) > 0.5
    for array in jax.tree.leaves(scores):
        assert array.dtype == jnp.float32
        np.testing.assert_array_equal(array[~rollout.completion_mask], 0)


def test_states_are_those_of_reading_one_token_at_a_time():
    rollout = jax.device_get(oracles.enumerated_rollout())
    states = np.asarray(jax.jit(completion_states, static_argnums=2)(PARAMS, rollout, CONFIG))
    read = jax.jit(lambda params, tokens: hidden_states(params, tokens, jnp.ones(tokens.shape, bool), CONFIG)[0, -1])
    for row in (0, 3, 10, 39, 40, 45, 60, 79):
        prompt = rollout.prompts[row, rollout.prompt_mask[row]].tolist()
        completion = rollout.completions[row, rollout.completion_mask[row]].tolist()
        for column in range(len(completion)):
            tokens = jnp.array([prompt + completion[:column]])
            np.testing.assert_allclose(states[row, column], read(PARAMS, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sampling", "width", "with_reference"), [(Sampling(7), 1, True), (FILTERS, 2, False), (FILTERS, 4, True)]
)
def test_chunks_change_nothing(monkeypatch, sampling, width, with_reference):
    rng = np.random.default_rng(0)
    states, ref_states = jnp.asarray(rng.normal(size=(2, 3, 7, CONFIG.width)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (3, 7)))
    weights = jnp.asarray(rng.normal(size=(3, 3, 7)), jnp.float32)

    def compute():
        def loss(params, states):
            reference = Reference(REF_PARAMS, ref_states) if with_reference else None
            scores = token_scores(params, states, tokens, CONFIG, sampling, reference)
            return sum(jnp.sum(w * x) for w, x in zip(weights, scores[:3], strict=True)), scores

        (_, scores), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(PARAMS, states)
        return scores, gradients

    whole = compute()
    monkeypatch.setattr(scoring, "CHUNK_BYTES", {"cpu": 4 * 3 * VOCAB * width + 3})
    chunked = compute()
    for array, expected in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True):
        assert np.all(np.isfinite(expected))
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)
    assert bool(jnp.any(chunked[0].kl != 0)) == with_reference
    assert jnp.all(jnp.any(chunked[1][1] != 0, axis=-1))  # every state has its part in the loss


def jaxprs(jaxpr):
    """A program and every program inside it."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from jaxprs(inner)


LARGE = llama(vocab_size=8192, context=320, layers=1, width=32, heads=2, mlp_width=32)
ROWS, PROMPT, COMPLETION = 16, 8, 200


def trace_gradient():
    """The REINFORCE gradient with a reference at a larger size, traced and not run."""

    def gradient(params, ref_params, rollout, advantages):
        def score(params, part, ref_states):
            return score_completions(params, part, LARGE, Sampling(COMPLETION), Reference(ref_params, ref_states))

        states = completion_states(ref_params, rollout, LARGE)
        return reinforce_gradient(params, rollout, advantages, score, normalize="token", context=states)

    shape = jax.ShapeDtypeStruct
    rollout = Rollout(
        prompts=shape((ROWS, PROMPT), jnp.int32),
        prompt_mask=shape((ROWS, PROMPT), bool),
        completions=shape((ROWS, COMPLETION), jnp.int32),
        completion_mask=shape((ROWS, COMPLETION), bool),
        behavior_logprobs=shape((ROWS, COMPLETION), jnp.float32),
        truncated=shape((ROWS,), bool),
    )
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), LARGE))
    return jax.jit(gradient).trace(params, params, rollout, shape((ROWS,), jnp.float32))


def largest_logits(traced) -> int:
    """Elements of the largest array that holds a number for each token of the vocabulary, weights aside."""
    variables = [v for jaxpr in jaxprs(traced.jaxpr.jaxpr) for equation in jaxpr.eqns for v in equation.outvars]
    shapes = [v.aval.shape for v in variables]
    return max(int(np.prod(shape)) for shape in shapes if LARGE.vocab_size in shape and LARGE.width not in shape)


def test_logits_of_a_batch_are_never_held(monkeypatch):
    whole = ROWS * COMPLETION * LARGE.vocab_size
    monkeypatch.setattr(scoring, "CHUNK_BYTES", {"cpu": 1 << 22})
    traced = trace_gradient()
    assert largest_logits(traced) * 4 <= scoring.CHUNK_BYTES["cpu"] < whole * 4 / 20
    memory = traced.lower().compile().memory_analysis()
    assert memory is None or memory.temp_size_in_bytes < whole * 4 / 2
    monkeypatch.setattr(scoring, "CHUNK_BYTES", {"cpu": whole * 4})
    assert largest_logits(trace_gradient()) == whole  # the search finds them where they are


def test_a_reference_may_be_kept_in_the_compute_dtype():
    rollout, config = oracles.enumerated_rollout(), dataclasses.replace(CONFIG, dtype="bfloat16")
    kept = compute_params(REF_PARAMS, config)
    mapped = jax.jit(lambda params: reference_scores(params, rollout, config, Sampling(LENGTH, temperature=0.7)))
    for array, expected in zip(mapped(kept), mapped(REF_PARAMS), strict=True):
        np.testing.assert_array_equal(array, expected)
    assert {x.dtype for x in jax.tree.leaves(kept) if x.ndim > 1} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("sizes", "platform", "expected"),
    [
        ({"data": 1}, "cpu", 20),  # 40 columns of 8 rows and 1,000 tokens are 1,280,000 bytes
        ({"data": 4}, "cpu", 40),
        ({"data": 2, "fsdp": 2}, "cpu", 40),
        ({"data": 1, "fsdp": 2}, "cpu", 40),
        ({"data": 1, "tensor": 2}, "cpu", 20),
        ({"data": 1}, "tpu", 10),
    ],
)
def test_a_chunk_is_as_large_as_suits_one_device(sizes, platform, expected, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK_BYTES", {"cpu" if platform == "cpu" else "gpu": 640_000})
    monkeypatch.setattr(scoring, "MANY_BYTES", 320_000)
    mesh = make_mesh(jax.devices()[: math.prod(sizes.values())], sizes)
    found = []

    def look(x):
        found.append(scoring._columns_at_once((8, 40), 1000))
        return each_device(look_again, mesh, (0,), 0)(x)

    def look_again(x):
        found.append(scoring._columns_at_once((8, 40), 1000))
        return x

    pmapped(look, mesh, (0,), 0).lower(jnp.zeros(8))
    assert found[0] == expected
    assert found[1] == (20 if platform == "cpu" else 10)  # each device has 8 rows of its own
    found.clear()
    jax.eval_shape(look_again, jnp.zeros(8))
    assert found == [20 if platform == "cpu" else 10]


def test_filters_keep_the_sampled_token_and_finite_gradients():
    states = jnp.asarray(np.random.default_rng(0).normal(size=(VOCAB, 5, CONFIG.width)), jnp.float32)
    tokens = jnp.tile(jnp.arange(VOCAB)[:, None], (1, 5))  # every token, those outside the nucleus too

    @functools.partial(jax.jit, static_argnums=1)
    def compute(params, sampling):
        return jax.value_and_grad(lambda p: jnp.sum(token_scores(p, states, tokens, CONFIG, sampling).logprobs))(params)

    dropped = token_logprobs(warp_logits(logits(PARAMS, states, CONFIG), FILTERS), tokens) == -jnp.inf
    assert 0.2 < jnp.mean(dropped) < 0.8
    loss, gradients = compute(PARAMS, FILTERS)
    assert jnp.isfinite(loss) and loss < 0
    gradient = np.asarray(gradients["embedding"]["embedding"])
    assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 0.1


def test_what_the_mask_hides_changes_nothing():
    rollout = oracles.enumerated_rollout()
    garbage = jnp.where(rollout.completion_mask, rollout.completions, EOS)
    prompts = jnp.where(rollout.prompt_mask, rollout.prompts, VOCAB - 1)
    other = dataclasses.replace(rollout, completions=garbage, prompts=prompts)
    sampling = Sampling(LENGTH, temperature=0.7)
    same, _ = score(PARAMS, REF_PARAMS, other, sampling)
    for array, expected in zip(same[:3], score(PARAMS, REF_PARAMS, rollout, sampling)[0][:3], strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6)
    assert jnp.any(garbage != rollout.completions) and jnp.any(prompts != rollout.prompts)


def test_greedy_decoding_has_no_logprobs():
    rollout = oracles.enumerated_rollout()
    with pytest.raises(InputError, match="temperature"):
        jax.eval_shape(lambda: completion_logprobs(PARAMS, rollout, CONFIG, Sampling(LENGTH, temperature=0)))
