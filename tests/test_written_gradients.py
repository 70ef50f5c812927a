"""The gradients that are written out by hand are those of automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.models.attention import attend
from rl_jax.models.dense import project


def plain_attention(query, keys, values, mask):
    group = query.shape[2] // keys.shape[1]
    keys, values = (jnp.repeat(x, group, axis=1) for x in (keys, values))
    scores = jnp.einsum("bshk,bhtk->bhst", query, keys) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhst,bhtk->bshk", weights, values)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_gradient_of_attention(kv_heads):
    query, keys, values = normal(0, 2, 5, 4, 8), normal(1, 2, kv_heads, 7, 8), normal(2, 2, kv_heads, 7, 8)
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, (2, 5, 7)).at[:, :, 0].set(True)
    direction = normal(4, 2, 5, 4, 8)

    def gradient(attention):
        out, pull = jax.vjp(lambda *args: attention(*args, mask), 3 * query, keys, values)
        return out, *pull(direction)

    for found, expected in zip(gradient(attend), gradient(plain_attention), strict=True):
        assert float(jnp.max(jnp.abs(expected))) > 0.1
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_dense_layer():
    x, kernel, direction = normal(0, 6, 3), normal(1, 3, 5), normal(2, 6, 5)
    out, pull = jax.vjp(project, x, kernel)
    plain, plain_pull = jax.vjp(jnp.matmul, x, kernel)
    for found, expected in zip((out, *pull(direction)), (plain, *plain_pull(direction)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
