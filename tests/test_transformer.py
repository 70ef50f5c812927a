import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.errors import InputError
from rl_jax.models.config import TransformerConfig, gpt2, llama
from rl_jax.models.transformer import (
    attend,
    decode_step,
    hidden_states,
    init_params,
    logits,
    prefill,
    rotate,
    token_positions,
)

VOCAB, CONTEXT = 61, 16
TINY_LLAMA = functools.partial(llama, VOCAB, CONTEXT, 2, 16, 4, mlp_width=32)
CONFIGS = {
    "gpt2": gpt2(VOCAB, CONTEXT, 2, 16, 2),
    "llama": TINY_LLAMA(rope_theta=100.0, tied=False),
    "qwen2": TINY_LLAMA(kv_heads=1, qkv_bias=True),
    "qwen3": TINY_LLAMA(kv_heads=2, qk_norm=True, head_size=6),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
RNG = np.random.default_rng(0)
TOKENS = RNG.permutation(VOCAB)[:36].reshape(3, 12).astype(np.int32)  # no token twice
PROMPT_LENGTH = 6
MASK = np.arange(12) >= np.array([[0], [2], [5]])  # prompts of 6, 4 and 1 tokens
BOTH_SIDES = MASK & (np.arange(12) < np.array([[12], [9], [8]]))

states_of = jax.jit(hidden_states, static_argnames="config")


def shapes(config: TransformerConfig):
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config))


def random_params(config: TransformerConfig):
    """Parameters none of which is left at 0 or 1, and large enough to matter."""
    rng = np.random.default_rng(1)

    def fill(path, shape):
        return rng.normal(path[-1].key == "scale", 0.3, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes(config))


@functools.partial(jax.jit, static_argnames="config")
def cached_states(params, tokens, mask, config):
    """States of the last prompt token and of all after it, one token at a time. [B, T - P + 1, D]."""

    def step(cache, column):
        state, cache = decode_step(params, cache, tokens[:, column], column, config)
        return cache, state

    prompts, prompt_mask = tokens[:, :PROMPT_LENGTH], mask[:, :PROMPT_LENGTH]
    first, cache = prefill(params, prompts, prompt_mask, config, tokens.shape[1])
    _, rest = jax.lax.scan(step, cache, jnp.arange(PROMPT_LENGTH, tokens.shape[1]))
    return jnp.concatenate([first[:, None], jnp.moveaxis(rest, 0, 1)], axis=1)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in CONFIGS), ("gpt2", "bfloat16"), ("qwen3", "bfloat16")]
)
def test_cached_decoding_is_the_full_forward(name, dtype):
    config, tolerance = dataclasses.replace(CONFIGS[name], dtype=dtype), {"float32": 1e-5, "bfloat16": 0.1}[dtype]
    params = random_params(config)
    full = states_of(params, TOKENS, MASK, config)[:, PROMPT_LENGTH - 1 :]
    cached = cached_states(params, TOKENS, MASK, config)
    assert full.dtype == cached.dtype == dtype
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (cached, full)), atol=tolerance)
    np.testing.assert_allclose(logits(params, cached, config), logits(params, full, config), atol=8 * tolerance)
    assert np.std(np.asarray(full, np.float32)) > 0.5


@every_config
def test_padding_on_the_left_moves_nothing(config):
    params = random_params(config)
    padded, alone = states_of(params, TOKENS, MASK, config), states_of(params, TOKENS[2:, 5:], MASK[2:, 5:], config)
    assert not MASK[2, :5].any() and MASK[2, 5:].all()
    np.testing.assert_allclose(padded[2, 5:], alone[0], atol=1e-5)


@every_config
@pytest.mark.parametrize("mask", [MASK, BOTH_SIDES], ids=["left", "both sides"])
def test_what_stands_in_the_padding_changes_nothing(config, mask):
    params = random_params(config)
    other = np.where(mask, TOKENS, (TOKENS + 17) % VOCAB)
    states, changed = states_of(params, TOKENS, mask, config), states_of(params, other, mask, config)
    np.testing.assert_array_equal(states[mask], changed[mask])
    assert np.all(np.isfinite(states))
    assert np.any(states_of(params, np.where(mask, other, (TOKENS + 17) % VOCAB), ~mask, config) != states)


@every_config
def test_causality_by_gradients(config):
    """How much each state depends on the embedding of each token; no token stands twice, so each has its own row."""
    params = random_params(config)
    probe = jax.random.normal(jax.random.key(2), (1, 1, config.width))

    @jax.jit
    def probed(embedding):
        states = hidden_states(params | {"embedding": {"embedding": embedding}}, TOKENS, BOTH_SIDES, config)
        return jnp.sum(states * probe, axis=-1)

    jacobian = jax.jacrev(probed)(params["embedding"]["embedding"])  # [B, T, V, D]
    influence = np.abs(jacobian).max(axis=-1)[:, :, TOKENS]  # [B, T, B, T]: state of a row on token of a row
    rows, columns = np.arange(len(TOKENS)), np.arange(TOKENS.shape[1])
    seen = (rows[:, None, None, None] == rows[None, None, :, None]) & (
        columns[None, :, None, None] >= columns[None, None, None, :]
    )
    seen = seen & BOTH_SIDES[None, None, :, :]
    influence, seen = influence[BOTH_SIDES], seen[BOTH_SIDES]  # states of padding mean nothing
    assert np.all(influence[~seen] == 0)
    assert np.all(influence[seen] > 1e-6)


def test_remat_changes_no_gradient():
    config = dataclasses.replace(CONFIGS["qwen3"], layers=1)
    params = random_params(config)
    rematted = dataclasses.replace(config, remat=True)

    def loss(params, config):
        states = hidden_states(params, TOKENS, MASK, config)
        return jnp.mean(jax.nn.logsumexp(logits(params, states, config), axis=-1), where=MASK)

    gradient = jax.jit(jax.grad(loss), static_argnames="config")
    for plain, again in zip(*(jax.tree.leaves(gradient(params, c)) for c in (config, rematted)), strict=True):
        np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-7)
        assert np.any(plain != 0)
    assert "remat" in str(jax.make_jaxpr(loss, static_argnums=1)(params, rematted))
    assert "remat" not in str(jax.make_jaxpr(loss, static_argnums=1)(params, config))


def test_rotation_is_multiplication_by_a_complex_unit():
    x = RNG.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 300, 2, 11]])
    numbers = x[..., :4] + 1j * x[..., 4:].astype(np.float64)
    turned = numbers * np.exp(1j * positions[:, :, None, None] * 500.0 ** (-2 * np.arange(4) / 8))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(x, positions, 500.0), expected, atol=2e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_grouped_attention_is_attention_over_repeated_heads(kv_heads):
    query = RNG.normal(size=(2, 4, 6, 8)).astype(np.float32)
    keys, values = (RNG.normal(size=(2, kv_heads, 5, 8)).astype(np.float32) for _ in range(2))
    mask = RNG.random((2, 4, 5)) < 0.6
    mask[..., 0] = True
    repeated_keys, repeated_values = (np.repeat(x, 6 // kv_heads, axis=1) for x in (keys, values))
    expected = np.zeros(query.shape)
    for b, s, h in np.ndindex(2, 4, 6):
        seen = mask[b, s]
        weights = np.exp(repeated_keys[b, h][seen] @ query[b, s, h] / np.sqrt(8))
        expected[b, s, h] = weights @ repeated_values[b, h][seen] / weights.sum()
    np.testing.assert_allclose(attend(query, keys, values, mask), expected, atol=1e-5)


def test_positions_count_real_tokens():
    np.testing.assert_array_equal(
        token_positions(jnp.array([[False, False, True, True], [True, True, True, False]])),
        [[0, 0, 0, 1], [0, 1, 2, 2]],
    )


def test_logits_are_products_with_the_embedding_or_the_output_projection():
    states = RNG.normal(size=(2, 3, 16)).astype(np.float32)
    for name, path in (("gpt2", ("embedding", "embedding")), ("llama", ("output", "kernel"))):
        params = random_params(CONFIGS[name])
        matrix = np.asarray(params[path[0]][path[1]])
        expected = states @ (matrix.T if name == "gpt2" else matrix)
        np.testing.assert_allclose(logits(params, states, CONFIGS[name]), expected, atol=1e-5)
    coarse = dataclasses.replace(CONFIGS["llama"], dtype="bfloat16")
    assert logits(params, states.astype(jnp.bfloat16), coarse).dtype == jnp.float32


def test_initial_scales():
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), gpt2(500, 100, 2, 64, 4))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == jnp.float32
        if leaf.ndim == 1:
            np.testing.assert_array_equal(leaf, 1.0 if "scale" in name else 0.0)
        else:
            expected = 0.02 / 2 if "'out'" in name or "'down'" in name else 0.02  # sqrt(2 * 2 layers) = 2
            np.testing.assert_allclose(np.std(leaf), expected, rtol=0.1, err_msg=name)


def test_number_of_parameters():
    def count(config):
        return sum(x.size for x in jax.tree.leaves(shapes(config)))

    assert count(gpt2(50257, 1024, 12, 768, 12)) == 124_439_808  # GPT-2 small, as published
    qwen3 = llama(151936, 40960, 28, 1024, 16, kv_heads=8, head_size=128, mlp_width=3072, qk_norm=True)
    assert count(qwen3) == 596_049_920  # Qwen3-0.6B, as published


def test_widths_by_default():
    assert (gpt2(VOCAB, CONTEXT, 2, 16, 2).mlp_width, llama(VOCAB, CONTEXT, 2, 512, 8).mlp_width) == (64, 1376)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gpt2(VOCAB, CONTEXT, 2, 16, 3), "width of 16 .* 3 heads"),
        (lambda: TINY_LLAMA(kv_heads=3), "4 heads cannot share 3"),
        (lambda: TINY_LLAMA(head_size=5), "even head size, not 5"),
    ],
)
def test_shapes_that_cannot_be(make, message):
    with pytest.raises(InputError, match=message):
        make()
