"""Reading a few tokens at once into a cache gives the states of reading all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.models.config import gpt2, llama
from rl_jax.models.reading import empty_cache, read_tokens
from rl_jax.models.transformer import hidden_states, init_params

CONFIGS = {
    "llama": llama(50, 16, 2, 16, 4, kv_heads=2),
    "windows": llama(50, 16, 2, 16, 2, windows=(3, 0)),
    "gpt2": gpt2(50, 16, 2, 16, 2),
}
TOKENS = np.random.default_rng(0).integers(50, size=(2, 16)).astype(np.int32)


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "windows")), "gpt2"]
)
def test_chunks_are_read_as_the_whole_is(name):
    config = CONFIGS[name]
    params = jax.tree.map(lambda x: 5 * x, init_params(jax.random.key(0), config))
    expected = hidden_states(params, jnp.asarray(TOKENS), jnp.ones(TOKENS.shape, bool), config)
    cache, found = empty_cache(config, 2, 16 + 8), []
    for start, size, kept in ((0, 6, 6), (6, 1, 1), (7, 5, 2), (9, 1, 1), (10, 8, 6)):
        chunk = np.full((2, size), 49, np.int32)  # what is not kept fills it up, beyond the context in the end
        chunk[:, :kept] = TOKENS[:, start : start + kept]
        states, cache = read_tokens(params, cache, jnp.asarray(chunk), jnp.int32(start), config)
        found.append(states[:, :kept])
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, atol=2e-5)
