import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.errors import InputError
from rl_jax.microbatch import sum_over_microbatches

BATCH = {"rows": jnp.arange(24.0).reshape(12, 2), "weights": jnp.arange(12.0), "absent": None}


def weighted_sums(batch):
    sums = {"rows": batch["weights"] @ batch["rows"], "count": jnp.int32(len(batch["weights"]))}
    return sums, (batch["rows"] + 1, 2 * batch["weights"])


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 12])
def test_parts_add_up_to_the_whole(microbatches):
    sums, rows = jax.jit(sum_over_microbatches, static_argnums=(0, 2))(weighted_sums, BATCH, microbatches)
    index = np.arange(12)
    np.testing.assert_allclose(sums["rows"], [np.sum(index * 2 * index), np.sum(index * (2 * index + 1))])
    assert (int(sums["count"]), sums["count"].dtype) == (12, jnp.int32)
    np.testing.assert_array_equal(rows[0], BATCH["rows"] + 1)
    np.testing.assert_array_equal(rows[1], 2 * index)


def test_part_m_takes_every_mth_sequence():
    assert sum_over_microbatches(lambda part: (part, ()), jnp.arange(6), 2)[0].tolist() == [0 + 1, 2 + 3, 4 + 5]


@pytest.mark.parametrize("microbatches", [0, -1, 5, 24])
def test_batch_that_does_not_divide_is_refused(microbatches):
    with pytest.raises(InputError, match=f"12 sequences does not divide into {microbatches} microbatches"):
        sum_over_microbatches(weighted_sums, BATCH, microbatches)
