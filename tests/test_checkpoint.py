import dataclasses
import gc
import os
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.errors import InputError
from rl_jax.run.checkpoint import (
    close_checkpoints,
    open_checkpoints,
    restore_checkpoint,
    save_checkpoint,
    wait_for_checkpoints,
)
from rl_jax.run.spmd import make_mesh, pmapped, put
from rl_jax.types import TrainState

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = {"model": {"width": 64, "layers": 2}, "seed": 0}
KEY = jax.random.key(0)


def make_state(step, size=1000):
    normal = jax.random.normal(jax.random.fold_in(KEY, step), (8, size))
    return TrainState(
        step=jnp.int32(step),
        params={"w": normal, "half": normal[:, 0].astype(jnp.bfloat16), "odd": jnp.array([jnp.nan, -0.0, jnp.inf])},
        opt_state=(jnp.arange(3), {"mask": jnp.array([True, False])}),
        baseline=jnp.float32(0.25),
        kl_coefficient=jnp.float32(0.5),
        nonfinite=jnp.int32(1),
    )


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape, np.asarray(x).tobytes()) == (y.dtype, y.shape, np.asarray(y).tobytes())


def restore(folder, config=CONFIG, like=None):
    checkpoints = open_checkpoints(folder, config)
    try:
        return restore_checkpoint(checkpoints, make_state(0) if like is None else like)
    finally:
        close_checkpoints(checkpoints)


@pytest.fixture(autouse=True)
def _collect():
    yield
    gc.collect()  # what Orbax leaves behind of failed reads, which would trouble a later test


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("written")
    checkpoints = open_checkpoints(folder, CONFIG)
    for step in (1, 2):
        save_checkpoint(checkpoints, make_state(step))
    close_checkpoints(checkpoints)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def data_file(checkpoint):
    """The file that holds the arrays."""
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def record_file(checkpoint):
    return checkpoint / "record" / "metadata"


def structure_file(checkpoint):
    return checkpoint / "state" / "_METADATA"


def flip(path, place, bit=0x10):
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= bit
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def test_restores_every_bit(folder):
    assert_same_bits(restore(folder), make_state(2))


def test_restores_onto_the_devices_that_are_asked_for(folder):
    mesh = make_mesh()
    cut = {"w": 0, "half": 0, "odd": None}
    axes = TrainState(step=None, params=cut, opt_state=None, baseline=None, kl_coefficient=None, nonfinite=None)
    like = put(make_state(0), mesh, axes)
    restored = restore(folder, like=like)
    assert_same_bits(restored, make_state(2))
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)
    assert restored.params["w"].addressable_shards[0].data.shape == (1, 1000)


def test_restores_from_eight_devices_to_one(tmp_path):
    cut = {"w": 0, "half": 0, "odd": None}
    axes = TrainState(step=None, params=cut, opt_state=None, baseline=None, kl_coefficient=None, nonfinite=None)
    checkpoints = open_checkpoints(tmp_path, CONFIG)
    save_checkpoint(checkpoints, put(make_state(2), make_mesh(), axes))
    close_checkpoints(checkpoints)
    one = make_mesh(jax.devices()[3:4])
    restored = restore(tmp_path, like=put(make_state(0), one))
    assert_same_bits(restored, make_state(2))
    assert all(leaf.devices() == {jax.devices()[3]} for leaf in jax.tree.leaves(restored))


def test_nothing_there_is_none(tmp_path):
    assert restore(tmp_path / "new") is None


def test_keeps_the_newest(tmp_path):
    checkpoints = open_checkpoints(tmp_path, CONFIG, keep=2)
    for step in (5, 10, 15, 15):  # a step that is there is left alone
        save_checkpoint(checkpoints, make_state(step))
    close_checkpoints(checkpoints)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "15"]


def test_values_are_those_before_a_donation(tmp_path):
    mesh = make_mesh()
    update = pmapped(lambda state: jax.tree.map(lambda x: x + x.dtype.type(1), state), mesh, (None,), None, donate=(0,))
    checkpoints = open_checkpoints(tmp_path, CONFIG, keep=6)
    state = put({"step": 0, "w": np.zeros((1 << 20,), np.float32)}, mesh)

    def as_train_state(state):
        return TrainState(state["step"], {"w": state["w"]}, (), jnp.float32(0), jnp.float32(0), jnp.int32(0))

    for _ in range(5):
        save_checkpoint(checkpoints, as_train_state(state))
        state = update(update(state))
    wait_for_checkpoints(checkpoints)
    like = as_train_state(state)
    for step in (8, 6, 4, 2, 0):
        restored = restore_checkpoint(checkpoints, like)
        assert restored is not None
        assert int(restored.step) == step
        np.testing.assert_array_equal(restored.params["w"], step)
        checkpoints.manager.delete(step)
    close_checkpoints(checkpoints)


@pytest.mark.parametrize("damage", [cut, os.remove, lambda path: flip(path, path.stat().st_size // 3)])
@pytest.mark.parametrize("find", [data_file, record_file, structure_file])
def test_a_damaged_checkpoint_is_passed_over(folder, damage, find):
    damage(find(folder / "2"))
    with pytest.warns(UserWarning, match=r"checkpoints/2 cannot be read .* step 1 is restored"):
        assert_same_bits(restore(folder), make_state(1))
    assert sorted(path.name for path in folder.iterdir()) == ["1", "unreadable-2"]


def test_no_flipped_bit_is_restored(written, tmp_path):
    seen = 0
    for place in range(1_000, 26_000, 2_000):
        folder = shutil.copytree(written, tmp_path / str(place))
        flip(data_file(folder / "2"), place, bit=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            restored = restore(folder)
        assert_same_bits(restored, make_state(1 if caught else 2))  # some bytes of the file mean nothing
        seen += any("params['w'] is damaged" in str(warning.message) for warning in caught)
    assert seen > 6  # or the flips missed the arrays


@pytest.mark.parametrize(
    "damage", [lambda path: os.truncate(path, 0), lambda path: flip(path, path.stat().st_size // 2)]
)
def test_whichever_file_is_damaged_a_whole_state_comes_back(written, tmp_path, damage):
    names = sorted(path.relative_to(written) for path in (written / "2").rglob("*") if path.is_file())
    passed_over = 0
    for number, name in enumerate(names):
        folder = shutil.copytree(written, tmp_path / str(number))
        if (folder / name).stat().st_size:
            damage(folder / name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            restored = restore(folder)
        seen = any("2 cannot be read" in str(warning.message) for warning in caught)
        assert_same_bits(restored, make_state(1 if seen else 2))  # some files mean nothing
        passed_over += seen
    assert passed_over > 3


def test_damaged_settings_are_not_taken_for_other_settings(folder):
    record = record_file(folder / "2")
    record.write_text(record.read_text().replace('"width": 64', '"width": 65'))
    with pytest.warns(UserWarning, match="its settings are damaged"):
        assert_same_bits(restore(folder), make_state(1))


def test_a_step_passed_over_is_written_again(folder):
    cut(data_file(folder / "2"))
    checkpoints = open_checkpoints(folder, CONFIG)
    with pytest.warns(UserWarning):
        restore_checkpoint(checkpoints, make_state(0))
    again = dataclasses.replace(make_state(2), baseline=jnp.float32(7))
    save_checkpoint(checkpoints, again)
    close_checkpoints(checkpoints)
    assert_same_bits(restore(folder), again)


def test_none_readable_is_an_error_that_leaves_them(folder):
    for step in ("1", "2"):
        cut(data_file(folder / step))
    with pytest.raises(InputError, match=r"No checkpoint in .* can be read \(step 2: .*; step 1: "):
        restore(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_a_half_written_checkpoint_is_none(folder):
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
    cut(data_file(folder / "3.orbax-checkpoint-tmp"))
    (folder / "4.orbax-checkpoint-tmp-17").mkdir()
    assert_same_bits(restore(folder), make_state(2))
    (folder / "5").mkdir()
    shutil.copytree(folder / "2" / "record", folder / "5" / "record")
    with pytest.warns(UserWarning, match="checkpoints/5 cannot be read"):
        assert_same_bits(restore(folder), make_state(2))


def test_other_settings_are_named(folder):
    with pytest.raises(InputError, match=r"2 was written under other settings: model.width was 64 and is now 32\."):
        restore(folder, {"model": {"width": 32, "layers": 2}, "seed": 0})
    assert_same_bits(restore(folder), make_state(2))
