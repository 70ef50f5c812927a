import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from rl_jax.errors import InputError
from rl_jax.models.config import llama
from rl_jax.models.transformer import hidden_states, init_params
from rl_jax.models.transformer import logits as logits_of
from rl_jax.rollout import generate
from rl_jax.sampling import Sampling, draw, untruncated, warp_logits

LOWEST_P = 1e-4  # of a chi-square test; seeds are fixed, so a pass stays a pass
LAST_UNIFORM = np.float32(1 - 2**-24)  # the float32 before 1
CHUNK = 1 << 12

draw_rows = jax.jit(draw)


@functools.partial(jax.jit, static_argnames="chunks")
def draw_chunks(row, uniforms, chunks):
    """Draws from one row of logits, a chunk of uniforms at a time."""
    return jax.lax.map(lambda u: draw(jnp.broadcast_to(row, (CHUNK, row.size)), u), uniforms.reshape(chunks, CHUNK))


def draws(row, uniforms):
    """Tokens and log-probabilities from one row of logits, for uniforms of any number. [n] each."""
    chunks = -(-len(uniforms) // CHUNK)
    padded = np.resize(np.asarray(uniforms, np.float32), chunks * CHUNK)
    return (np.asarray(x).reshape(-1)[: len(uniforms)] for x in draw_chunks(row, padded, chunks))


def chi_square_p(tokens, probabilities):
    """How likely counts as far from `probabilities` as those of `tokens` are; rare tokens count as one."""
    counts, expected = np.bincount(tokens, minlength=len(probabilities)), len(tokens) * probabilities
    assert np.all(counts[probabilities == 0] == 0)
    rare = expected < 10
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    possible = expected > 0
    if possible.sum() == 1:
        return 1.0
    return scipy.stats.chisquare(counts[possible], expected[possible] * (counts.sum() / expected.sum())).pvalue


def random_row(vocab, seed=0):
    return np.random.default_rng(seed).normal(0, 2, vocab).astype(np.float32)


ROWS = {
    "1 token": random_row(1),
    "2 tokens": random_row(2),
    "3 tokens": random_row(3),
    "37 tokens, in blocks of 8": random_row(37),
    "4096 tokens": random_row(4096),
    "uniform": np.zeros(100, np.float32),
    "minus infinity": np.where(np.arange(61) % 7 == 3, random_row(61), -np.inf).astype(np.float32),
    "one possible": np.where(np.arange(50) == 17, 0, -np.inf).astype(np.float32),
    "one certain": np.where(np.arange(50) == 49, 3e38, -3e38).astype(np.float32),
    "far from 0": random_row(61) + np.float32(1e4),
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


@every_row
def test_frequencies_are_the_distribution(row):
    """By random uniforms within the noise of counting, and by evenly spaced ones with no noise at all."""
    probabilities = scipy.special.softmax(row.astype(np.float64))
    tokens, logprobs = draws(row, np.asarray(jax.random.uniform(jax.random.key(1), (1 << 15,))))
    assert chi_square_p(tokens, probabilities) > LOWEST_P
    np.testing.assert_allclose(logprobs, scipy.special.log_softmax(row.astype(np.float64))[tokens], atol=2e-5)
    spaced, _ = draws(row, (np.arange(1 << 15) + 0.5) / (1 << 15))
    np.testing.assert_allclose(np.bincount(spaced, minlength=len(row)), probabilities * (1 << 15), atol=1.5)


@every_row
def test_first_and_last_uniform_draw_the_first_and_last_possible_token(row):
    tokens, logprobs = draws(row, [0.0, LAST_UNIFORM])
    masses = np.exp(row.astype(np.float64) - row.max())
    assert tokens[0] == np.flatnonzero(masses)[0]
    assert masses[tokens[1]] > 0 and masses[tokens[1] + 1 :].sum() < 1e-6 * masses.sum()
    assert np.all(np.isfinite(logprobs))


def parallel_cumsum(x, axis):
    """A sum as accelerators add it up: not monotone in the last bit."""
    return jax.lax.associative_scan(jnp.add, x, axis=axis)


@pytest.mark.parametrize("cumsum", [jnp.cumsum, parallel_cumsum], ids=["of this device", "parallel"])
@pytest.mark.parametrize("vocab", [300, 4096])
def test_no_rounding_draws_what_cannot_be(monkeypatch, cumsum, vocab):
    """Uniforms within a few float32 steps of every boundary between tokens."""
    monkeypatch.setattr(jnp, "cumsum", cumsum)
    draw_chunks = jax.jit(lambda row, u: jax.lax.map(lambda u: draw(jnp.broadcast_to(row, (CHUNK, row.size)), u), u))
    for seed in range(4):
        rng = np.random.default_rng(seed)
        row = np.where(rng.random(vocab) < 0.3, rng.normal(0, 1, vocab), -np.inf).astype(np.float32)
        boundaries = np.unique(np.cumsum(scipy.special.softmax(row.astype(np.float64))))
        near = (boundaries[:, None] + np.arange(-6, 7) * 2.0**-24).clip(0, LAST_UNIFORM).astype(np.float32).reshape(-1)
        uniforms = np.resize(near, (-(-near.size // CHUNK), CHUNK))
        tokens, logprobs = draw_chunks(row, uniforms)
        assert np.all(np.isfinite(row[np.asarray(tokens)]))
        assert np.all(np.isfinite(logprobs))


def test_rows_are_drawn_independently():
    rows = np.stack([random_row(37, seed) for seed in range(6)])
    uniforms = np.linspace(0.05, 0.95, 6, dtype=np.float32)
    tokens, logprobs = draw_rows(rows, uniforms)
    for row, uniform, token, logprob in zip(rows, uniforms, tokens, logprobs, strict=True):
        probabilities = scipy.special.softmax(row.astype(np.float64))
        assert token == np.searchsorted(np.cumsum(probabilities), uniform, side="right")  # in the vocabulary's order
        np.testing.assert_allclose(logprob, np.log(probabilities[token]), rtol=1e-5)


def filtered(row, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities after the filters, one token at a time, in float64."""
    scores = np.asarray(row, np.float64) / temperature
    probabilities = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    ranked = sorted(range(len(row)), key=lambda token: -scores[token])
    if top_k:
        least = scores[ranked[min(top_k, len(ranked)) - 1]]
        ranked = [token for token in ranked if scores[token] >= least]
    if top_p < 1:
        share, nucleus = 0.0, []
        for token in ranked:
            if share >= top_p and scores[token] < scores[nucleus[-1]]:
                break
            nucleus.append(token)
            share += probabilities[token] / probabilities[ranked].sum()
        ranked = nucleus
    ranked = [token for token in ranked if probabilities[token] >= min_p * probabilities.max()]
    kept = np.where(np.isin(np.arange(len(row)), ranked), probabilities, 0)
    return kept / kept.sum()


SETTINGS = (
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 37},
    {"top_k": 100},
    {"top_p": 0.8},
    {"top_p": 1e-6},
    {"top_p": 0.99, "temperature": 1.5},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.2, "temperature": 2.0},
    {"top_k": 7, "top_p": 0.6, "min_p": 0.15, "temperature": 1.3},
    {"top_k": 3, "top_p": 0.97},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters_are_those_of_brute_force(settings):
    rows = np.stack([random_row(37, seed) for seed in range(20)])
    rows[1, 5:9] = rows[1].max()  # ties
    rows[2] = 0.0
    rows[3, :30] = -np.inf
    warped = np.asarray(warp_logits(jnp.asarray(rows), Sampling(length=1, **settings)))
    expected = np.stack([filtered(row, **settings) for row in rows])
    np.testing.assert_array_equal(np.isfinite(warped), expected > 0)
    np.testing.assert_allclose(scipy.special.softmax(warped.astype(np.float64), axis=-1), expected, atol=1e-6)
    np.testing.assert_array_equal(warp_logits(jnp.asarray(rows)[:, None], Sampling(length=1, **settings))[:, 0], warped)


def test_filters_leave_and_drop_tokens():
    kept = [np.isfinite(warp_logits(random_row(37), Sampling(length=1, **s))).sum() for s in SETTINGS]
    assert kept[:6] == [37, 37, 1, 5, 37, 37]
    assert 1 < kept[6] < 20 and kept[7] == 1 and kept[10] == 1 and 1 < kept[12] < 7


def test_a_token_to_keep_is_kept_and_the_gradient_is_finite():
    row = jnp.asarray(random_row(37))
    sampling = Sampling(length=1, top_k=3, temperature=0.5)
    outside = int(jnp.argsort(row)[10])

    def logprob(row):
        return jax.nn.log_softmax(warp_logits(row, sampling, jnp.int32(outside)))[outside]

    kept = np.isfinite(warp_logits(row, sampling, jnp.int32(outside)))
    assert kept.sum() == 4 and kept[outside]
    shares = np.where(kept, np.exp(np.asarray(row, np.float64) / 0.5), 0)
    expected = ((np.arange(37) == outside) - shares / shares.sum()) / 0.5
    np.testing.assert_allclose(jax.grad(logprob)(row), expected, atol=1e-5)


CONFIG = llama(37, 8, 1, 16, 2, mlp_width=16)
PROMPTS, PROMPT_MASK = np.array([[0, 5, 11, 3], [1, 7, 2, 30]], np.int32), np.array([[False, True, True, True]] * 2)


@functools.cache
def policy():
    """Parameters, and the logits that follow each of the unpadded prompts."""
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), CONFIG))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)

    @jax.jit
    def rows(params, tokens):
        return logits_of(params, hidden_states(params, tokens, jnp.ones(tokens.shape, bool), CONFIG)[:, -1], CONFIG)

    return params, np.asarray(rows(params, PROMPTS[:, 1:]))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 7}], ids=str)
def test_first_tokens_of_completions_follow_the_policy(settings):
    params, rows = policy()
    sampling = Sampling(length=1, group_size=1 << 14, **settings)
    run = jax.jit(generate, static_argnames=("config", "sampling"))
    rollout = run(params, jax.random.key(3), PROMPTS, PROMPT_MASK, CONFIG, sampling)
    for row, tokens in zip(rows, np.asarray(rollout.completions).reshape(2, -1), strict=True):
        probabilities = filtered(row, **settings)
        assert np.sort(probabilities)[-2] > 0.02  # there is something to choose
        assert chi_square_p(tokens, probabilities) > LOWEST_P


def test_untruncated_keeps_the_rest():
    sampling = Sampling(length=3, group_size=2, temperature=0.7, top_k=4, top_p=0.5, min_p=0.1, eos=(1,))
    assert untruncated(sampling) == Sampling(length=3, group_size=2, temperature=0.7, eos=(1,))


@pytest.mark.parametrize(
    "settings",
    [
        {"length": 0},
        {"group_size": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        Sampling(**{"length": 4} | settings)


def test_greedy_decoding_has_no_log_probabilities():
    with pytest.raises(InputError, match="temperature 0"):
        warp_logits(jnp.zeros(3), Sampling(length=1, temperature=0))
