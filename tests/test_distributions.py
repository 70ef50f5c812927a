import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from rl_jax.reinforce.distributions import entropy, exact_kl, kl_estimate, token_logprobs

DRAW = np.random.default_rng(0)
LOGITS = DRAW.normal(0, 3, (3, 4, 5)).astype(np.float32)
REF_LOGITS = DRAW.normal(0, 3, (3, 4, 5)).astype(np.float32)
TOKENS = DRAW.integers(0, 5, (3, 4))
TRUNCATED = np.array([[1.0, -np.inf, 0.5], [-np.inf, 0.0, -np.inf]], np.float32)  # what a filter leaves


def test_token_logprobs_are_those_of_scipy():
    expected = np.take_along_axis(scipy.special.log_softmax(LOGITS, -1), TOKENS[..., None], -1)[..., 0]
    np.testing.assert_allclose(token_logprobs(LOGITS, TOKENS), expected, rtol=1e-5, atol=1e-6)


def test_token_logprobs_do_not_overflow():
    np.testing.assert_allclose(token_logprobs(jnp.array([1e4, 1e4, -1e4]), jnp.array(1)), np.log(0.5), rtol=1e-3)


def test_entropy_is_that_of_scipy():
    expected = scipy.stats.entropy(scipy.special.softmax(LOGITS.astype(np.float64), -1), axis=-1)
    np.testing.assert_allclose(entropy(LOGITS), expected, rtol=1e-5)


def test_exact_kl_is_that_of_scipy():
    probabilities, ref = (scipy.special.softmax(x.astype(np.float64), -1) for x in (LOGITS, REF_LOGITS))
    expected = scipy.stats.entropy(probabilities, ref, axis=-1)
    np.testing.assert_allclose(exact_kl(LOGITS, REF_LOGITS), expected, rtol=1e-5)
    np.testing.assert_allclose(exact_kl(LOGITS, LOGITS), 0, atol=1e-6)


def test_tokens_that_cannot_be_sampled_count_for_nothing():
    whole = jnp.array([[1.0, 2.0, 0.5], [0.3, 0.0, 0.1]])
    p = scipy.special.expit(0.5)
    np.testing.assert_allclose(entropy(TRUNCATED), [-p * np.log(p) - (1 - p) * np.log(1 - p), 0], rtol=1e-6)
    ref = scipy.special.log_softmax(whole, -1)
    by_hand = [p * (np.log(p) - ref[0, 0]) + (1 - p) * (np.log(1 - p) - ref[0, 2]), -ref[1, 1]]
    np.testing.assert_allclose(exact_kl(TRUNCATED, whole), by_hand, rtol=1e-6)
    np.testing.assert_array_equal(exact_kl(whole, TRUNCATED), np.inf)


def test_gradients_are_finite_where_tokens_cannot_be_sampled():
    whole = jnp.array([[0.2, 2.0, 0.5], [0.3, 0.0, 0.1]])
    kept = jnp.array([1.0, 0.5])  # of the first row
    gradient = jax.grad(lambda x: jnp.sum(entropy(x)))(jnp.asarray(TRUNCATED))
    np.testing.assert_allclose(gradient[0, [0, 2]], jax.grad(entropy)(kept), rtol=1e-6)
    np.testing.assert_allclose(gradient[1], 0, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(exact_kl(x, whole)))(jnp.asarray(TRUNCATED))
    np.testing.assert_allclose(gradient[0, [0, 2]], jax.grad(exact_kl)(kept, whole[0, jnp.array([0, 2])]), rtol=1e-5)
    np.testing.assert_allclose(gradient[1], 0, atol=1e-6)


def test_kl_estimates_by_hand():
    logprobs, ref = jnp.log(jnp.array([[0.5, 0.2]])), jnp.log(jnp.array([[0.25, 0.4]]))
    log2 = np.log(2)
    np.testing.assert_allclose(kl_estimate(logprobs, ref, "k1"), [[log2, -log2]], rtol=1e-6)
    np.testing.assert_allclose(kl_estimate(logprobs, ref, "k2"), [[log2**2 / 2, log2**2 / 2]], rtol=1e-6)
    np.testing.assert_allclose(kl_estimate(logprobs, ref, "k3"), [[log2 - 0.5, 1 - log2]], rtol=1e-5)
    for unknown in ("", "k4"):
        with pytest.raises(ValueError, match=f"not '{unknown}'"):
            kl_estimate(logprobs, ref, unknown)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: token_logprobs(LOGITS, TOKENS[:1]),
        lambda: exact_kl(LOGITS, REF_LOGITS[:1]),
        lambda: kl_estimate(LOGITS[0], LOGITS[0, :1], "k1"),
        lambda: kl_estimate(LOGITS, REF_LOGITS, "k1"),
    ],
)
def test_shapes_that_would_broadcast_are_refused(wrong):
    with pytest.raises(AssertionError):
        wrong()


def expected_estimate(logits, weights, ref_logits, kind):
    """The mean of an estimate over every token, weighted by `weights` rather than by a sample. [V] each."""
    logprobs, ref_logprobs = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
    return jnp.sum(weights * kl_estimate(logprobs[None], ref_logprobs[None], kind)[0])


def kl(logits, ref_logits):
    """Written out again, for a single distribution."""
    p, q = jax.nn.softmax(logits), jax.nn.softmax(ref_logits)
    return jnp.sum(p * jnp.log(p / q))


def test_means_of_the_estimates():
    logits, ref = jnp.asarray(LOGITS[0, 0]), jnp.asarray(REF_LOGITS[0, 0])
    means = {kind: expected_estimate(logits, jax.nn.softmax(logits), ref, kind) for kind in ("k1", "k2", "k3")}
    np.testing.assert_allclose(means["k1"], kl(logits, ref), rtol=1e-5)
    np.testing.assert_allclose(means["k3"], kl(logits, ref), rtol=1e-5)
    assert abs(means["k2"] / kl(logits, ref) - 1) > 0.1


def test_gradients_of_the_estimates_as_losses():
    logits, ref = jnp.asarray(LOGITS[0, 0]), jnp.asarray(REF_LOGITS[0, 0])
    weights = jax.nn.softmax(logits)  # of sampling, and so constant
    gradients = {kind: jax.grad(expected_estimate)(logits, weights, ref, kind) for kind in ("k1", "k2", "k3")}
    np.testing.assert_allclose(gradients["k1"], 0, atol=1e-6)
    np.testing.assert_allclose(gradients["k2"], jax.grad(kl)(logits, ref), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients["k3"], jax.grad(kl, argnums=1)(ref, logits), rtol=1e-4, atol=1e-5)
    assert jnp.max(jnp.abs(gradients["k2"])) > 0.1
    assert jnp.max(jnp.abs(gradients["k2"] - gradients["k3"])) > 0.1
