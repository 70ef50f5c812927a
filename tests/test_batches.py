import numpy as np
import pytest

from rl_jax.data.batches import held_out_batches, packed_batch
from rl_jax.errors import InputError

TOKENS = np.arange(1000, dtype=np.int32)


def test_rows_are_windows_of_the_corpus():
    batch = packed_batch(TOKENS, batch_size=64, length=16, seed=0, step=0)
    assert (batch.shape, batch.dtype) == ((64, 17), np.int32)
    assert (np.diff(batch, axis=1) == 1).all()
    assert batch.min() >= 0 and batch.max() <= 999


def test_a_batch_is_a_function_of_seed_and_step():
    batch = packed_batch(TOKENS, 8, 16, seed=1, step=10**9)
    np.testing.assert_array_equal(batch, packed_batch(TOKENS, 8, 16, seed=1, step=10**9))
    assert (batch != packed_batch(TOKENS, 8, 16, seed=1, step=10**9 + 1)).any()
    assert (batch != packed_batch(TOKENS, 8, 16, seed=2, step=10**9)).any()


def test_a_process_makes_its_own_rows_of_a_batch():
    whole = packed_batch(TOKENS, 8, 16, seed=1, step=3)
    own = np.array([2, 3, 6])
    np.testing.assert_array_equal(packed_batch(TOKENS, 8, 16, seed=1, step=3, rows=own), whole[own])


def test_every_offset_is_equally_likely():
    first = np.concatenate([packed_batch(TOKENS[:9], 100, 4, seed=0, step=step)[:, 0] for step in range(50)])
    counts = np.bincount(first)
    assert len(counts) == 5  # offsets 0 to 4: the first and the last token are both reached
    np.testing.assert_allclose(counts, 1000, atol=5 * np.sqrt(5000 * 0.2 * 0.8))


def test_a_corpus_of_one_window():
    assert packed_batch(TOKENS[:5], 2, 4, 0, 0).tolist() == [[0, 1, 2, 3, 4]] * 2
    with pytest.raises(InputError, match="has 4 tokens and one window needs 5"):
        packed_batch(TOKENS[:4], 2, 4, 0, 0)


@pytest.mark.parametrize("count", [2, 5, 6, 12, 13, 14, 25, 26])
def test_held_out_batches_hold_every_target_once(count):
    batches = list(held_out_batches(TOKENS[:count], batch_size=3, length=4))
    assert {(tokens.shape, mask.shape) for tokens, mask in batches} == {((3, 5), (3, 4))}
    assert {(tokens.dtype, mask.dtype) for tokens, mask in batches} == {(np.dtype(np.int32), np.dtype(bool))}
    targets = np.concatenate([tokens[:, 1:][mask] for tokens, mask in batches])
    inputs = np.concatenate([tokens[:, :-1][mask] for tokens, mask in batches])
    assert targets.tolist() == list(range(1, count))
    assert inputs.tolist() == list(range(count - 1))
    assert all(mask.any() for _, mask in batches)


def test_held_out_batches_need_a_target():
    with pytest.raises(InputError, match="has 1 tokens and needs 2"):
        next(held_out_batches(TOKENS[:1], 3, 4))
