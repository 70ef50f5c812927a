import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.errors import InputError
from rl_jax.run.spmd import fingerprint, make_mesh, pmapped, put

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(5,)).astype(np.float32)
INPUTS = RNG.normal(size=(16, 5)).astype(np.float32)
LENGTHS = np.arange(16)
MASK = RNG.random((16,)) < np.repeat([0.9, 0.2], 8)  # parts of the batch count differently


def loss(weights, inputs, mask):
    return jnp.sum(jnp.where(mask, jnp.tanh(inputs @ weights), 0)) / jnp.sum(mask)


def test_gradient_is_that_of_literal_pmap():
    assert jax.device_count() == 8

    def shard_gradient(weights, inputs, mask):
        def part(weights):
            return jnp.sum(jnp.where(mask, jnp.tanh(inputs @ weights), 0))

        return jax.lax.psum(jax.grad(part)(weights), "devices") / jax.lax.psum(jnp.sum(mask), "devices")

    expected = jax.pmap(shard_gradient, axis_name="devices", in_axes=(None, 0, 0))(
        WEIGHTS, INPUTS.reshape(8, 2, 5), MASK.reshape(8, 2)
    )
    gradient = pmapped(jax.grad(loss), make_mesh(), (None, 0, 0), None)(WEIGHTS, INPUTS, MASK)
    np.testing.assert_allclose(gradient, expected[0], rtol=1e-6)
    assert np.abs(gradient).max() > 0.01


def test_mapped_outputs_are_those_of_literal_pmap():
    def rows(weights, inputs):
        return {"row": jnp.tanh(inputs @ weights), "square": inputs**2}

    expected = jax.pmap(rows, in_axes=(None, 0))(WEIGHTS, INPUTS.reshape(8, 2, 5))
    outputs = pmapped(rows, make_mesh(), (None, 0), 0)(WEIGHTS, INPUTS)
    np.testing.assert_allclose(outputs["row"], expected["row"].reshape(16), rtol=1e-6)
    np.testing.assert_array_equal(outputs["square"], expected["square"].reshape(16, 5))
    assert [shard.data.shape for shard in outputs["square"].addressable_shards] == [(2, 5)] * 8


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_answer_is_that_of_other_numbers_of_devices(devices):
    gradient = functools.partial(pmapped, jax.grad(loss), in_axes=(None, 0, 0), out_axes=None)
    few, all_of_them = gradient(make_mesh(jax.devices()[:devices])), gradient(make_mesh())
    np.testing.assert_allclose(few(WEIGHTS, INPUTS, MASK), all_of_them(WEIGHTS, INPUTS, MASK), rtol=1e-6)


def test_axes_may_be_prefixes_of_trees_and_need_not_be_first():
    def total(batch, columns):
        return batch["inputs"].sum(0) * batch["weights"], columns * 2

    fn = pmapped(total, make_mesh(), ({"inputs": 0, "weights": None}, 1), (None, 1))
    columns = np.arange(24.0, dtype=np.float32).reshape(3, 8)
    sums, doubled = fn({"inputs": INPUTS, "weights": WEIGHTS}, columns)
    np.testing.assert_allclose(sums, INPUTS.sum(0) * WEIGHTS, rtol=1e-5)
    np.testing.assert_array_equal(doubled, columns * 2)
    assert sums.sharding.is_fully_replicated
    assert doubled.addressable_shards[0].data.shape == (3, 1)


def test_an_axis_that_does_not_divide_is_named():
    with pytest.raises(InputError, match=r"Argument 1 of loss has size 6 on axis 0, which 8 devices .* multiple of 8"):
        pmapped(loss, make_mesh(), (None, 0, 0), None)(WEIGHTS, INPUTS[:6], MASK[:6])
    with pytest.raises(InputError, match=r"The tree\['x'\]\[1\] has size 15"):
        put({"x": [INPUTS, INPUTS[:15]]}, make_mesh(), 0)


def test_compiles_once():
    def update(state, batch, key):
        return {"weights": state["weights"] + batch.mean(0), "step": state["step"] + 1}, jax.random.uniform(key)

    mesh = make_mesh()
    fn = pmapped(update, mesh, (None, 0, None), (None, None), donate=(0,))
    state = put({"weights": WEIGHTS, "step": 0}, mesh)
    for step in range(4):
        state, _ = fn(state, INPUTS, jax.random.fold_in(jax.random.key(0), step))
    assert fn._cache_size() == 1
    assert int(state["step"]) == 4
    np.testing.assert_allclose(state["weights"], WEIGHTS + 4 * INPUTS.mean(0), rtol=1e-5)
    assert "sharding" in fn.lower(state, INPUTS, jax.random.key(0)).as_text()


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("axes", [None, 0])
def test_put_shares_no_memory_with_its_source(devices, axes):
    mesh = make_mesh(jax.devices()[:devices])
    double = pmapped(lambda x: 2 * x, mesh, (axes,), axes, donate=(0,))
    on_host = np.arange(1 << 16, dtype=np.float32)
    for source in (on_host, jnp.asarray(on_host), put(on_host, mesh, axes)):
        copy = put(source, mesh, axes)
        np.testing.assert_array_equal(double(copy), 2 * np.arange(1 << 16))
        assert copy.is_deleted()
        np.testing.assert_array_equal(source, np.arange(1 << 16))
    copy = put(on_host, mesh, axes)
    on_host[:] = -1
    np.testing.assert_array_equal(copy, np.arange(1 << 16))


@pytest.mark.parametrize("devices", [1, 8])
def test_put_without_a_copy_takes_what_lies_there_already(devices):
    mesh = make_mesh(jax.devices()[:devices])
    there = put(np.arange(64.0), mesh, 0)
    places = [
        [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]
        for x in (there, put(there, mesh, 0, copy=False), put(there, mesh, 0))
    ]
    assert places[0] == places[1] and not set(places[0]) & set(places[2])


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16", "uint8", "bool"])
def test_fingerprint_is_its_formula(dtype):
    values = np.asarray(50 * jax.random.normal(jax.random.key(0), (6, 8))).astype(jnp.dtype(dtype))
    bits = values.reshape(-1).view(f"uint{8 * values.dtype.itemsize}").tolist()
    expected = sum((2 * i + 1) * word for i, word in enumerate(bits)) % 2**32
    assert int(fingerprint(values)) == expected
    assert int(fingerprint(put(values.T.copy().T, make_mesh(), 1))) == expected
    for bit in range(8 * values.dtype.itemsize if dtype != "bool" else 1):
        other = values.reshape(-1).view(f"uint{8 * values.dtype.itemsize}").copy()
        other[17] ^= 1 << bit
        assert int(fingerprint(other.view(values.dtype).reshape(6, 8))) != expected
