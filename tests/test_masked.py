import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.masked import masked_mean, masked_sum, masked_var

VALUES = jnp.array([[1.0, 2.0, 6.0, 100.0], [3.0, -1.0, 50.0, 70.0], [5.0, 5.0, 5.0, 5.0]])
MASK = jnp.array([[True, True, True, False], [True, True, False, False], [False, False, False, False]])


@pytest.mark.parametrize(
    ("reduce", "rows", "columns", "whole"),
    [
        (masked_sum, [9, 2, 0], [4, 1, 6, 0], 11),
        (masked_mean, [3, 1, 0], [2, 0.5, 6, 0], 2.2),
        (masked_var, [14 / 3, 4, 0], [1, 2.25, 0, 0], 5.36),  # deviations from 2.2: -1.2, -0.2, 3.8, 0.8, -3.2
    ],
)
@pytest.mark.parametrize("hidden", [0.0, 1e30, np.nan, -np.inf])
def test_reductions_by_hand_whatever_the_mask_hides(reduce, rows, columns, whole, hidden):
    values = jnp.where(MASK, VALUES, hidden)
    np.testing.assert_allclose(reduce(values, MASK, axis=1), rows, rtol=1e-6)
    np.testing.assert_allclose(reduce(values, MASK, axis=0), columns, rtol=1e-6)
    np.testing.assert_allclose(reduce(values, MASK), whole, rtol=1e-6)
    np.testing.assert_allclose(reduce(values, MASK, axis=(0, 1)), whole, rtol=1e-6)


@pytest.mark.parametrize(
    ("reduce", "first_row"),
    [
        (masked_sum, [1, 1, 1, 0]),
        (masked_mean, [1 / 3, 1 / 3, 1 / 3, 0]),
        (masked_var, [-4 / 3, -2 / 3, 2, 0]),  # 2 (x - 3) / 3
    ],
)
@pytest.mark.parametrize("hidden", [100.0, np.nan, np.inf])
def test_gradients_by_hand_whatever_the_mask_hides(reduce, first_row, hidden):
    values = jnp.where(MASK, VALUES, hidden)
    gradient = jax.grad(lambda x: jnp.sum(reduce(x, MASK, axis=1)))(values)
    np.testing.assert_allclose(gradient[0], first_row, rtol=1e-6)
    np.testing.assert_array_equal(gradient[2], 0)
