import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.reinforce.advantages import (
    best_of_group_advantages,
    exponential_advantages,
    gae_advantages,
    greedy_advantages,
    group_mean_advantages,
    group_standardized_advantages,
    leave_one_out_advantages,
    moving_average_advantages,
    rewards_to_go,
    total_rewards,
    whiten,
    zero_signal_groups,
)

REWARDS = jnp.array([1.0, 2.0, 6.0, 10.0, 10.0, 40.0])
NAN = jnp.nan
MASK = jnp.array([[True, True, True], [True, False, False]])
TOKEN_REWARDS = jnp.array([[1.0, -2.0, 4.0], [3.0, NAN, NAN]])
VALUES = jnp.array([[0.5, 1.5, -1.0], [2.0, NAN, NAN]])


def test_no_baseline_leaves_rewards_as_they_are():
    np.testing.assert_array_equal(total_rewards(REWARDS), REWARDS)


def test_leave_one_out_by_hand():
    expected = [1 - 4, 2 - 3.5, 6 - 1.5, 10 - 25, 10 - 25, 40 - 10]
    np.testing.assert_allclose(leave_one_out_advantages(REWARDS, 3), expected, rtol=1e-6)
    np.testing.assert_allclose(leave_one_out_advantages(REWARDS, 2), [-1, 1, -4, 4, -30, 30], rtol=1e-6)


def test_group_mean_by_hand():
    np.testing.assert_allclose(group_mean_advantages(REWARDS, 3), [-2, -1, 3, -10, -10, 20], rtol=1e-6)
    np.testing.assert_array_equal(group_mean_advantages(REWARDS, 1), 0)


def test_equal_rewards_leave_no_rounding():
    rewards = jnp.repeat(jnp.array([0.1, 0.7, 1 / 3]), 7)  # whose means are rounded
    assert jnp.any(rewards - jnp.repeat(jnp.mean(rewards.reshape(3, 7), axis=1), 7) != 0)
    np.testing.assert_array_equal(group_mean_advantages(rewards, 7), 0)


def test_group_standard_deviation_by_hand():
    first, second = np.sqrt(14 / 2) + 1e-4, np.sqrt(600 / 2) + 1e-4
    expected = [-2 / first, -1 / first, 3 / first, -10 / second, -10 / second, 20 / second]
    np.testing.assert_allclose(group_standardized_advantages(REWARDS, 3), expected, rtol=1e-6)
    np.testing.assert_array_equal(group_standardized_advantages(jnp.full(4, 7.0), 2), 0)
    small = group_standardized_advantages(jnp.array([0.0, 2e-4]), 2)  # of a deviation like epsilon
    np.testing.assert_allclose(small, [-1 / (np.sqrt(2) + 1), 1 / (np.sqrt(2) + 1)], rtol=1e-5)


@pytest.mark.parametrize("advantages", [leave_one_out_advantages, group_standardized_advantages])
def test_a_group_of_one_is_refused(advantages):
    with pytest.raises(ValueError, match="at least 2, not 1"):
        advantages(REWARDS, 1)
    assert advantages(REWARDS, 2).shape == (6,)


def test_moving_average_by_hand():
    first, baseline = moving_average_advantages(jnp.array([1.0, 3.0]), jnp.array(NAN), baseline_decay=0.9)
    np.testing.assert_allclose(first, [-1, 1], rtol=1e-6)
    np.testing.assert_allclose(baseline, 2, rtol=1e-6)
    second, baseline = moving_average_advantages(jnp.array([5.0, 9.0]), baseline, baseline_decay=0.9)
    np.testing.assert_allclose(second, [3, 7], rtol=1e-6)
    np.testing.assert_allclose(baseline, 2.5, rtol=1e-6)
    _, baseline = moving_average_advantages(jnp.array([4.0, 6.0]), jnp.float32(1), baseline_decay=0.25)
    np.testing.assert_allclose(baseline, 0.25 * 1 + 0.75 * 5, rtol=1e-6)


def test_greedy_baseline_by_hand():
    np.testing.assert_array_equal(greedy_advantages(REWARDS, jnp.array([1.0, 1, 1, 3, 3, 3])), [0, 1, 5, 7, 7, 37])


def test_the_best_of_a_group_is_the_first_of_equals():
    np.testing.assert_array_equal(best_of_group_advantages(REWARDS, 3), [0, 0, 3, 0, 0, 3])
    np.testing.assert_array_equal(best_of_group_advantages(jnp.array([2.0, 5.0, 5.0, 1.0]), 4), [0, 4, 0, 0])


def test_exponential_weights_by_hand():
    weights = exponential_advantages(REWARDS, 3, reward_temperature=2.0, weight_cap=4.0)
    np.testing.assert_allclose(weights, np.minimum(np.exp([-1, -0.5, 1.5, -5, -5, 10]), 4), rtol=1e-6)
    assert jnp.all(jnp.isfinite(exponential_advantages(1e3 * REWARDS, 3, reward_temperature=1.0, weight_cap=20.0)))
    uncapped = exponential_advantages(REWARDS, 3, reward_temperature=2.0, weight_cap=np.inf)
    np.testing.assert_allclose(uncapped[2], np.exp(1.5), rtol=1e-6)


def test_rewards_to_go_by_hand():
    expected = [[1 - 2 * 0.5 + 4 * 0.25, -2 + 4 * 0.5, 4], [3, 0, 0]]
    np.testing.assert_allclose(rewards_to_go(TOKEN_REWARDS, MASK, discount=0.5), expected, rtol=1e-6)
    np.testing.assert_allclose(rewards_to_go(TOKEN_REWARDS, MASK, discount=1.0), [[3, 2, 4], [3, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 1.0), (0.9, 0.8), (0.9, 0.0), (0.5, 1.0)])
def test_gae_is_the_sum_of_its_definition(discount, gae_lambda):
    rewards, values = np.asarray(TOKEN_REWARDS), np.asarray(VALUES)
    expected = np.zeros((2, 3))
    for row, length in ((0, 3), (1, 1)):
        after = np.append(values[row, 1:length], 0.0)
        errors = rewards[row, :length] + discount * after - values[row, :length]
        for token in range(length):
            powers = (discount * gae_lambda) ** np.arange(length - token)
            expected[row, token] = np.sum(powers * errors[token:])
    measured = gae_advantages(TOKEN_REWARDS, VALUES, MASK, discount=discount, gae_lambda=gae_lambda)
    np.testing.assert_allclose(measured, expected, rtol=1e-6, atol=1e-6)


def test_gae_is_zero_where_masked_wherever_that_is():
    holes = jnp.array([[False, True, False, True]])
    advantages = gae_advantages(jnp.ones((1, 4)), jnp.full((1, 4), 0.5), holes, discount=1.0, gae_lambda=1.0)
    np.testing.assert_array_equal(advantages[~holes], 0)


def test_whitening_by_hand():
    values = jnp.array([[1.0, 2.0, 3.0], [6.0, NAN, NAN]])
    std = np.sqrt((4 + 1 + 0 + 9) / 4)
    np.testing.assert_allclose(whiten(values, MASK), [[-2 / std, -1 / std, 0], [3 / std, 0, 0]], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(whiten(jnp.ones((2, 3)), MASK), 0)
    tiny = whiten(jnp.array([[0.0, 2e-4]]), jnp.ones((1, 2), bool))  # of a variance like epsilon
    np.testing.assert_allclose(tiny, [[-1 / np.sqrt(2), 1 / np.sqrt(2)]], rtol=1e-4)


def test_zero_signal_groups_by_hand():
    rewards = jnp.array([1.0, 1.0, 2.0, 1.0, 0.0, 1.0, 3.0, 3.0])
    assert zero_signal_groups(rewards, 2).tolist() == [True, False, False, True]
    assert zero_signal_groups(rewards, 4).tolist() == [False, False]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: total_rewards(REWARDS[:, None]),
        lambda: leave_one_out_advantages(REWARDS[:, None], 2),
        lambda: group_mean_advantages(REWARDS[:, None], 2),
        lambda: group_standardized_advantages(REWARDS[:, None], 2),
        lambda: best_of_group_advantages(REWARDS[:, None], 2),
        lambda: exponential_advantages(REWARDS[:, None], 2, reward_temperature=1.0, weight_cap=2.0),
        lambda: zero_signal_groups(REWARDS[:, None], 2),
        lambda: moving_average_advantages(REWARDS[:, None], jnp.float32(0), baseline_decay=0.9),
        lambda: moving_average_advantages(REWARDS, jnp.zeros(1), baseline_decay=0.9),
        lambda: greedy_advantages(REWARDS, REWARDS[:3]),
        lambda: greedy_advantages(REWARDS[:, None], REWARDS[:, None]),
        lambda: gae_advantages(TOKEN_REWARDS, VALUES[:1], MASK, discount=1.0, gae_lambda=1.0),
        lambda: gae_advantages(TOKEN_REWARDS[0], VALUES[0], MASK[0], discount=1.0, gae_lambda=1.0),
        lambda: rewards_to_go(TOKEN_REWARDS, MASK[:, :2], discount=1.0),
        lambda: whiten(VALUES, MASK[:1]),
        lambda: whiten(VALUES[0], MASK[0]),
    ],
)
def test_shapes_that_would_broadcast_are_refused(wrong):
    with pytest.raises(AssertionError):
        wrong()
