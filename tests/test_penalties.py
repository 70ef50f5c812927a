import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.reinforce.penalties import (
    adaptive_kl_coefficient,
    kl_loss_terms,
    kl_penalised_rewards,
    overlong_penalty,
    shape_rewards,
    token_rewards,
)

REWARDS = jnp.array([1.0, 2.0])
KL = jnp.array([[1.0, 2.0, jnp.nan], [-1.0, jnp.inf, 5.0]])
MASK = jnp.array([[True, True, False], [True, False, False]])


def test_kl_penalty_by_hand():
    np.testing.assert_allclose(kl_penalised_rewards(REWARDS, KL, MASK, 0.5), [-0.5, 2.5], rtol=1e-6)


def test_token_rewards_by_hand():
    expected = [[-0.5, 1 - 1, 0], [2 + 0.5, 0, 0]]
    np.testing.assert_allclose(token_rewards(REWARDS, KL, MASK, 0.5), expected, rtol=1e-6)
    whole = token_rewards(REWARDS, jnp.zeros((2, 3)), jnp.ones((2, 3), bool), 0.5)
    np.testing.assert_array_equal(whole, [[0, 0, 1], [0, 0, 2]])


def test_shaping_scales_then_clips_then_whitens():
    rewards = jnp.array([1.0, -3.0, 5.0, 0.5])
    plain = shape_rewards(rewards=rewards, scale=1.0, clip=np.inf, whiten=False)
    np.testing.assert_array_equal(plain, rewards)
    clipped = shape_rewards(rewards, scale=2.0, clip=4.0, whiten=False)
    np.testing.assert_array_equal(clipped, [2, -4, 4, 1])
    whitened = shape_rewards(rewards, scale=2.0, clip=4.0, whiten=True)
    np.testing.assert_allclose(whitened, (np.array([2, -4, 4, 1]) - 0.75) / np.std([2, -4, 4, 1]), rtol=1e-5)
    np.testing.assert_array_equal(shape_rewards(jnp.ones(3), scale=1.0, clip=np.inf, whiten=True), 0)
    tiny = shape_rewards(jnp.array([0.0, 2e-4]), scale=1.0, clip=np.inf, whiten=True)  # of a variance like epsilon
    np.testing.assert_allclose(tiny, [-1 / np.sqrt(2), 1 / np.sqrt(2)], rtol=1e-4)


def test_overlong_penalty_by_hand():
    lengths = jnp.array([1, 6, 7, 8, 10])
    mask = jnp.arange(10)[None, :] < lengths[:, None]
    np.testing.assert_allclose(overlong_penalty(mask, 0.4), [0, 0, -0.25, -0.5, -1], rtol=1e-6)
    np.testing.assert_allclose(overlong_penalty(mask, 1.0), [-0.1, -0.6, -0.7, -0.8, -1], rtol=1e-6)
    np.testing.assert_array_equal(overlong_penalty(mask, 0), np.zeros(5))


def test_kl_terms_by_hand():
    logprobs, ref, exact = jnp.log(jnp.array([[0.5, 0.2]])), jnp.log(jnp.array([[0.25, 0.4]])), jnp.array([[7.0, 8.0]])
    log2 = np.log(2)
    expected = {
        "k2_loss": [[log2**2 / 2] * 2],
        "k3_loss": [[log2 - 0.5, 1 - log2]],
        "exact_loss": [[7, 8]],
        "k1_reward": [[0, 0]],
        "none": [[0, 0]],
    }
    for placement, terms in expected.items():
        np.testing.assert_allclose(kl_loss_terms(logprobs, ref, exact, placement), terms, rtol=1e-5)


def test_coefficient_follows_the_error_up_to_a_fifth():
    settings = {"target": 6.0, "horizon": 1000.0, "completions": 50}
    for kl, change in ((6.0, 0), (6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (0.0, -0.2)):
        coefficient = adaptive_kl_coefficient(coefficient=jnp.float32(0.3), kl=jnp.float32(kl), **settings)
        np.testing.assert_allclose(coefficient, 0.3 * (1 + change * 50 / 1000), rtol=1e-5)
    for kl in (jnp.nan, jnp.inf, -jnp.inf):
        assert float(adaptive_kl_coefficient(jnp.float32(0.3), jnp.float32(kl), **settings)) == pytest.approx(0.3)


@pytest.mark.parametrize("penalty", [kl_penalised_rewards, token_rewards])
def test_shapes_that_would_broadcast_are_refused(penalty):
    for rewards, kl, mask in ((REWARDS[:, None], KL, MASK), (REWARDS, KL[0], MASK), (REWARDS, KL, MASK[0])):
        with pytest.raises(AssertionError):
            penalty(rewards, kl, mask, 0.5)


def test_ranks_are_checked():
    with pytest.raises(AssertionError):
        shape_rewards(REWARDS[:, None], scale=1.0, clip=1.0, whiten=False)
    with pytest.raises(AssertionError):
        overlong_penalty(MASK[0], 0.5)
    with pytest.raises(AssertionError):
        adaptive_kl_coefficient(REWARDS, jnp.float32(1), target=1.0, horizon=1.0, completions=1)


def test_penalties_of_masked_tokens_do_not_reach_the_gradient():
    slopes = jax.grad(lambda kl: jnp.sum(token_rewards(REWARDS, kl, MASK, 0.5)))(KL)
    np.testing.assert_array_equal(slopes, -0.5 * MASK)
