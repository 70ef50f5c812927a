import jax
import numpy as np

from rl_jax.keys import Purpose, step_key


def bits(key) -> tuple[int, ...]:
    return tuple(jax.random.key_data(key).tolist())


def test_keys_differ_by_seed_purpose_and_step():
    keys = {bits(step_key(seed, purpose, step)) for seed in range(4) for purpose in Purpose for step in range(10)}
    assert len(keys) == 4 * len(Purpose) * 10


def test_key_is_a_function_of_its_arguments_compiled_or_not():
    compiled = jax.jit(step_key, static_argnums=1)
    for seed, step in ((0, 0), (3, 17), (2**31 - 1, 10**6)):
        assert bits(compiled(seed, Purpose.SAMPLE, step)) == bits(step_key(seed, Purpose.SAMPLE, step))


def test_keys_are_those_of_earlier_results():
    """Numbers that must never change, for runs to be repeatable."""
    assert [(purpose.name, purpose.value) for purpose in Purpose] == [
        ("INIT", 0),
        ("SAMPLE", 1),
        ("EVALUATE", 2),
        ("SHUFFLE", 3),
        ("REFILL", 4),
        ("REFERENCE", 5),
        ("PREFERENCE", 6),
        ("HEAD", 7),
    ]
    root = jax.random.key(5)
    by_hand = jax.random.fold_in(jax.random.fold_in(root, 1), 9)
    np.testing.assert_array_equal(bits(step_key(5, Purpose.SAMPLE, 9)), bits(by_hand))
