"""Where randomness comes from: a key for each purpose and step, and no state."""

import enum

import jax

from rl_jax.errors import InputError
from rl_jax.types import Array


class Purpose(enum.IntEnum):
    """What a key is for. The numbers are part of every result: add to them, never renumber."""

    INIT = 0
    SAMPLE = 1
    EVALUATE = 2
    SHUFFLE = 3
    REFILL = 4
    REFERENCE = 5
    PREFERENCE = 6
    HEAD = 7


def check_seed(seed: int) -> None:
    """Raise InputError for a seed that JAX would take modulo 2^32."""
    if not 0 <= seed < 2**32:
        raise InputError(f"The seed is {seed}; it must be at least 0 and below 2^32.")


def step_key(seed: int | Array, purpose: Purpose, step: int | Array = 0) -> Array:
    """The key of one step, a function of its arguments alone: a resumed run repeats nothing and skips nothing."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)
