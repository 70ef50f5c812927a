import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.reinforce.advantages import (
    group_mean_advantages,
    kl_penalised_rewards,
    leave_one_out_advantages,
    moving_average_advantages,
    zero_signal_groups,
)

REWARDS = jnp.array([1.0, 2.0, 6.0, 10.0, 10.0, 40.0])


def test_leave_one_out_by_hand():
    expected = [1 - 4, 2 - 3.5, 6 - 1.5, 10 - 25, 10 - 25, 40 - 10]
    np.testing.assert_allclose(leave_one_out_advantages(REWARDS, 3), expected, rtol=1e-6)
    np.testing.assert_allclose(leave_one_out_advantages(REWARDS, 2), [-1, 1, -4, 4, -30, 30], rtol=1e-6)


def test_leaving_one_out_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2, not 1"):
        leave_one_out_advantages(REWARDS, 1)


def test_group_mean_by_hand():
    np.testing.assert_allclose(group_mean_advantages(REWARDS, 3), [-2, -1, 3, -10, -10, 20], rtol=1e-6)
    np.testing.assert_array_equal(group_mean_advantages(REWARDS, 1), 0)


def test_moving_average_by_hand():
    first, baseline = moving_average_advantages(jnp.array([1.0, 3.0]), jnp.array(jnp.nan), decay=0.9)
    np.testing.assert_allclose(first, [-1, 1], rtol=1e-6)
    np.testing.assert_allclose(baseline, 2, rtol=1e-6)
    second, baseline = moving_average_advantages(jnp.array([5.0, 9.0]), baseline, decay=0.9)
    np.testing.assert_allclose(second, [3, 7], rtol=1e-6)
    np.testing.assert_allclose(baseline, 2.5, rtol=1e-6)


def test_kl_penalty_by_hand():
    kl = jnp.array([[1.0, 2.0, jnp.nan], [-1.0, jnp.inf, 5.0]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    np.testing.assert_allclose(kl_penalised_rewards(jnp.array([1.0, 2.0]), kl, mask, 0.5), [-0.5, 2.5], rtol=1e-6)


def test_zero_signal_groups_by_hand():
    np.testing.assert_allclose(zero_signal_groups(jnp.array([1.0, 1.0, 2.0, 2.0, 0.0, 1.0, 3.0, 3.0]), 2), 0.75)
    np.testing.assert_allclose(zero_signal_groups(jnp.array([1.0, 1.0, 2.0, 2.0, 2.0, 2.0]), 3), 0.5)


@pytest.mark.parametrize("advantages", [leave_one_out_advantages, group_mean_advantages, zero_signal_groups])
def test_rewards_of_tokens_are_refused(advantages):
    with pytest.raises(AssertionError):
        advantages(REWARDS[:, None], 2)
