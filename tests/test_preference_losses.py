"""What a reward model learns by, against constants worked out by hand, plain Python and finite differences."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.preferences.losses import bradley_terry_loss, centring_penalty, plackett_luce_loss, rating_loss

REWARDS = jnp.array([[1.0, -0.5], [0.2, 0.7]])
NONE = jnp.zeros(2)


def test_bradley_terry_is_the_log_odds_of_the_preferred():
    loss = bradley_terry_loss(REWARDS, jnp.array([[1.0, 0.0], [1.0, 0.0]]), NONE)
    # log(1 + e^-1.5) and log(1 + e^0.5)
    np.testing.assert_allclose(loss, [0.20141328, 0.97407699], rtol=1e-6)


def test_a_tie_pulls_rewards_together_and_shares_are_matched():
    tie = jax.grad(lambda r: bradley_terry_loss(r, jnp.full((2, 2), 0.5), NONE).sum())(REWARDS)
    assert tie[0, 0] > 0 > tie[0, 1] and tie[1, 0] < 0 < tie[1, 1]
    share = 17 / 20  # the loss is least where the odds are those of the judges
    lead = math.log(share / (1 - share))
    slope = jax.grad(lambda r: bradley_terry_loss(r, jnp.array([[share, 1 - share]]), NONE[:1]).sum())
    np.testing.assert_allclose(slope(jnp.array([[lead, 0.0]])), 0.0, atol=1e-6)
    assert abs(slope(jnp.array([[lead + 0.5, 0.0]]))).max() > 0.01


def test_a_margin_has_to_be_led_by():
    loss = bradley_terry_loss(REWARDS, jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([1.5, 0.3]))
    np.testing.assert_allclose(loss, [math.log(2), math.log1p(math.exp(-0.2))], rtol=1e-6)


def test_label_smoothing_mixes_both_labels():
    labels = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    right, wrong = (bradley_terry_loss(REWARDS, x, NONE) for x in (labels, 1 - labels))
    smoothed = bradley_terry_loss(REWARDS, labels, NONE, label_smoothing=0.1)
    np.testing.assert_allclose(smoothed, 0.9 * right + 0.1 * wrong, rtol=1e-6)


def test_plackett_luce_by_hand():
    # Ranking c, a, b of rewards 1, 0, 2: e^2/(e^2+e+1) * e/(e+1).
    loss = plackett_luce_loss(jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[2.0, 1.0, 3.0]]), jnp.ones((1, 3), bool))
    np.testing.assert_allclose(loss, [-math.log(0.66524096 * 0.73105858)], rtol=1e-6)


def test_plackett_luce_is_a_distribution_over_rankings_and_draws_like_exponential_races():
    rewards = jnp.array([0.3, -1.0, 0.8, 0.1])
    labels = jnp.array([[-order.index(k) for k in range(4)] for order in itertools.permutations(range(4))], jnp.float32)
    loss = plackett_luce_loss(jnp.tile(rewards, (24, 1)), labels, jnp.ones((24, 4), bool))
    np.testing.assert_allclose(np.exp(-loss).sum(), 1.0, rtol=1e-5)
    arrivals = np.random.default_rng(0).exponential(size=(200_000, 4)) / np.exp(rewards)
    drawn = np.mean(np.all(np.argsort(arrivals, axis=1) == [2, 0, 3, 1], axis=1))
    order = jnp.array([[-1.0, -3.0, 0.0, -2.0]])
    expected = np.exp(-plackett_luce_loss(rewards[None], order, jnp.ones((1, 4), bool)))[0]
    assert abs(drawn - expected) < 4 * math.sqrt(expected / 200_000)


def test_plackett_luce_of_two_is_bradley_terry_whatever_stands_in_empty_places():
    labels = jnp.array([[1.0, 0.0, 9.0], [0.0, 1.0, 9.0]])
    padded = jnp.concatenate([REWARDS, jnp.full((2, 1), 50.0)], axis=1)
    mask = jnp.array([[True, True, False]] * 2)
    loss = plackett_luce_loss(padded, labels, mask)
    np.testing.assert_allclose(loss, bradley_terry_loss(REWARDS, labels[:, :2], NONE), rtol=1e-6)
    grads = jax.grad(lambda r: plackett_luce_loss(r, labels, mask).sum())(padded)
    assert np.isfinite(grads).all() and (grads[:, 2] == 0).all() and (grads[:, :2] != 0).all()


def test_candidates_that_tie_are_pulled_together():
    """Breslow by hand: a and b tie above c, with rewards 1, 0 and 2."""
    labels, mask = jnp.array([[2.0, 2.0, 1.0]]), jnp.ones((1, 3), bool)
    loss = plackett_luce_loss(jnp.array([[1.0, 0.0, 2.0]]), labels, mask)
    np.testing.assert_allclose(loss, [2 * math.log(math.e + 1 + math.e**2) - 1], rtol=1e-6)
    slopes = jax.grad(lambda r: plackett_luce_loss(r, jnp.ones((1, 3)), mask).sum())
    np.testing.assert_allclose(slopes(jnp.full((1, 3), 0.7)), 0.0, atol=1e-6)
    apart = slopes(jnp.array([[1.0, 0.0, 0.5]]))[0]
    assert apart[0] > 0 > apart[1]


def test_ratings_and_centring():
    np.testing.assert_allclose(rating_loss(jnp.array([[1.0], [3.0]]), jnp.array([[2.0], [0.0]])), [0.5, 4.5])
    mask = jnp.array([[True, True, False]])
    np.testing.assert_allclose(centring_penalty(jnp.array([[1.0, 3.0, 100.0]]), mask), [4.0])


@pytest.mark.parametrize("name", ["pairs", "ranking"])
def test_gradients_against_finite_differences(name):
    rewards = np.array([[0.4, -0.2], [1.5, 0.9]])
    labels, margins = jnp.array([[0.7, 0.3], [0.1, 0.9]]), jnp.array([0.5, 0.0])

    def loss(rewards):
        if name == "pairs":
            return bradley_terry_loss(rewards, labels, margins, label_smoothing=0.05).sum()
        return plackett_luce_loss(rewards, labels, jnp.ones((2, 2), bool)).sum()

    exact = jax.grad(loss)(jnp.asarray(rewards))
    for place in np.ndindex(2, 2):
        step = np.zeros((2, 2))
        step[place] = 1e-2
        slope = (loss(jnp.asarray(rewards + step)) - loss(jnp.asarray(rewards - step))) / 2e-2
        np.testing.assert_allclose(exact[place], slope, atol=2e-4)
