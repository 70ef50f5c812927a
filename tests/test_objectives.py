import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.reinforce.objectives import reinforce_loss, token_weights

MASK = jnp.array([[True, True, True, True], [True, False, False, False]])
LOGPROBS = jnp.array([[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0, -8.0]])


@pytest.mark.parametrize(
    ("normalize", "long", "short"),
    [("token", 1 / 5, 1 / 5), ("sequence", 1 / 8, 1 / 2), ("completion", 1 / 2, 1 / 2), ("constant", 1 / 8, 1 / 8)],
)
def test_weights_by_hand(normalize, long, short):
    weights = token_weights(MASK, normalize)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, [[long] * 4, [short, 0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("normalize", ["token", "sequence", "completion", "constant"])
def test_weights_of_nothing_are_zero(normalize):
    np.testing.assert_array_equal(token_weights(jnp.zeros((2, 3), bool), normalize), 0)


def test_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="not 'batch'"):
        token_weights(MASK, "batch")


@pytest.mark.parametrize("hidden", [0.0, jnp.nan, -jnp.inf])
def test_loss_and_gradient_by_hand(hidden):
    logprobs = jnp.where(MASK, LOGPROBS, hidden)
    advantages, weights = jnp.array([2.0, -3.0]), token_weights(MASK, "completion")
    (loss, metrics), gradient = jax.value_and_grad(reinforce_loss, has_aux=True)(logprobs, advantages, weights)
    np.testing.assert_allclose(loss, (2 * 10 - 3 * 5) / 2, rtol=1e-6)
    np.testing.assert_array_equal(metrics["loss"], loss)
    np.testing.assert_allclose(gradient, [[-1] * 4, [1.5, 0, 0, 0]], rtol=1e-6)


def test_advantages_of_tokens_by_hand():
    advantages = jnp.array([[1.0, 0.0, 0.0, 2.0], [-1.0, 9.0, 9.0, 9.0]])
    loss, _ = reinforce_loss(LOGPROBS, advantages, token_weights(MASK, "token"))
    np.testing.assert_allclose(loss, (1 + 8 - 5) / 5, rtol=1e-6)


def test_shapes_that_would_broadcast_are_refused():
    weights = token_weights(MASK, "token")
    with pytest.raises(AssertionError):
        reinforce_loss(LOGPROBS[:1], jnp.ones(2), weights)
    with pytest.raises(AssertionError):
        reinforce_loss(LOGPROBS, jnp.ones(1), weights)
    with pytest.raises(AssertionError):
        reinforce_loss(LOGPROBS, jnp.ones((2, 1)), weights)
