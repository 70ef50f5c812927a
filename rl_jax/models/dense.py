"""The product of a dense layer as training needs it. Letters: N tokens, I and O features."""

import jax

from rl_jax.types import Array


@jax.custom_vjp
def project(x: Array, kernel: Array) -> Array:
    """The states of tokens times a matrix. [N, I], [I, O] -> [N, O].

    Its gradient is written out so that the matrix's comes after the states': left to itself XLA on CPU computes both at
    once, each product takes the other's threads and caches, and both take longer.
    """
    return x @ kernel


def _project_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _project_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    by_state, x, gradient = jax.lax.optimization_barrier((gradient @ kernel.T, x, gradient))
    return by_state, x.T @ gradient


project.defvjp(_project_forward, _project_backward)
