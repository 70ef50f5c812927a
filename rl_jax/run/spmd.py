"""One way to compile a function of the global batch and map it over devices, in `jax.pmap`'s vocabulary.

The library's functions see the whole batch and name no axis. `pmapped` compiles them with shardings: arrays of
axis 0 are cut over the devices, arrays of axis None are copied to each, and XLA adds the communication. On a mesh
of one axis this is what `jax.pmap` computes; the answer does not depend on the number of devices.

A mesh has three axes. Batches are cut over "data" and "fsdp". Parameters, and what the optimizer keeps of them, are
cut over "fsdp", which gathers each where it is used, and over "tensor", which computes with its own part; `lay_out`
says how, by rules of paths.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rl_jax.errors import InputError
from rl_jax.types import Array, PyTree

AXES = ("data", "fsdp", "tensor")
BATCH = AXES[:2]
AS_IT_IS = "as it is"
"""In place of an axis's number in the `in_axes` of `pmapped`: the argument is taken as it lies on the devices."""
SUM = "sum"
"""In place of an axis's number in the `out_axes` of `each_device`: the sum over the devices, which each then has."""

Rules = Sequence[tuple[str, tuple[str | None, ...]]]
"""Patterns of the paths of arrays, such as "up/kernel$", and the mesh axis that each of their axes is cut over."""

_chosen: dict[str, int] = {}


def use_mesh(text: str) -> None:
    """Makes this process's meshes, where no devices are named, of a shape such as "data=4,fsdp=2,tensor=1".

    Axes that are left out have one device, but "data" has what the others leave: all of them where the text is empty.

    Raises:
        InputError: the shape is none, or not one of the devices there are.
    """
    _chosen.update(parse_mesh(text, jax.device_count()))


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """Devices along each axis, from "data=4,fsdp=2,tensor=1". Raises InputError, as `use_mesh` does."""
    found: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        axis, _, number = part.partition("=")
        if axis not in AXES or axis in found or not number.isdigit() or int(number) < 1:
            raise InputError(f"The mesh {text!r} cannot be read at {part!r}; write it as data=4,fsdp=2,tensor=1.")
        found[axis] = int(number)
    others = math.prod(found.get(axis, 1) for axis in AXES[1:])
    shape = {axis: found.get(axis, 1) for axis in AXES} | {"data": found.get("data", max(devices // others, 1))}
    if math.prod(shape.values()) != devices:
        sizes = " x ".join(str(size) for size in shape.values())
        raise InputError(f"A mesh of {sizes} needs {math.prod(shape.values())} devices, and there are {devices}.")
    return shape


def make_mesh(devices: Sequence[jax.Device] | None = None, shape: Mapping[str, int] | None = None) -> Mesh:
    """A mesh of `devices`, all along "data" unless a shape is given; or of all there are, as `use_mesh` says."""
    if devices is None:
        devices, shape = jax.devices(), shape or _chosen
    shape = shape or {"data": len(devices)}
    sizes = tuple(shape.get(axis, 1) for axis in AXES)
    # The default axis type is Explicit, under which a Linen embedding of sharded weights fails.
    # As `jax.make_mesh`, which refuses to cut the torus of a TPU within an axis of it: 64 x 4 of 16 x 16.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_parts(mesh: Mesh) -> int:
    """Parts that a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def has_whole_models(mesh: Mesh) -> bool:
    """Whether parameters are copied to each device, not cut over some."""
    return mesh.shape["data"] == mesh.size


def lay_out(tree: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """Where each array of a tree goes, for `pmapped` and `put` to take in place of the number of an axis.

    The first rule whose pattern is found in an array's path, such as "params/block_0/mlp/up/kernel", says it; arrays
    that no rule finds are copied to each device, and so is an axis that does not divide over its devices. A rule is of
    an array's last axes, so that it finds those of an ensemble too. What an optimizer keeps of parameters is laid out
    as they are, since its paths end in theirs.
    """

    def place(path: Any, leaf: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = next((axes for pattern, axes in rules if re.search(pattern, name)), ())
        sizes = np.shape(leaf)
        if not axes:
            return PartitionSpec()
        pairs = zip((*[None] * (len(sizes) - len(axes)), *axes), sizes, strict=True)
        return PartitionSpec(*(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in pairs))

    return jax.tree_util.tree_map_with_path(place, tree)


def pmapped(
    fn: Callable[..., Any], mesh: Mesh, in_axes: tuple[PyTree, ...], out_axes: PyTree, donate: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Compiles `fn`, a function of the global batch, and maps it over the devices of `mesh`.

    Args:
        fn: takes positional arguments, pytrees of arrays, and returns a pytree of arrays.
        mesh: from `make_mesh`.
        in_axes: one entry an argument, each a pytree prefix of it with leaves None (a copy on each device), the
            number of the axis that is cut over the devices as a batch is, usually 0, what `lay_out` gives, or AS_IT_IS.
        out_axes: the same for what `fn` returns, but for AS_IT_IS.
        donate: numbers of the arguments whose memory the result may take over; the caller cannot use them again.

    Returns:
        The compiled function, with the `lower` and `_cache_size` of `jax.jit`. Calling it raises InputError where
        an axis to be cut is not a multiple of the number of devices.
    """

    @functools.wraps(fn)
    def known(*args: PyTree) -> PyTree:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for `traced_batch_parts` and what goes by it
            return fn(*args)

    compiled: Any = jax.jit(
        known,
        in_shardings=_shardings(mesh, in_axes),
        out_shardings=_shardings(mesh, out_axes),
        donate_argnums=donate,
    )
    name = getattr(fn, "__name__", "the function")

    @functools.wraps(fn)
    def checked(*args: PyTree) -> PyTree:
        for number, (axes, arg) in enumerate(zip(in_axes, args, strict=False)):  # jit counts them
            _check_divisible(axes, arg, mesh, f"Argument {number} of {name}")
        if jax.process_count() > 1:
            args = tuple(_spread(arg, axes, mesh) for arg, axes in zip(args, in_axes, strict=True))
        results = compiled(*args)
        # Gloo, between processes on CPUs, confuses programs that are under way at once, and they never end.
        in_turn = jax.process_count() > 1 and mesh.devices.flat[0].platform == "cpu"
        return jax.block_until_ready(results) if in_turn else results

    vars(checked).update(lower=compiled.lower, _cache_size=compiled._cache_size)
    return checked


def each_device(
    fn: Callable[..., Any], mesh: Mesh, in_axes: tuple[PyTree, ...], out_axes: PyTree
) -> Callable[..., Any]:
    """Maps `fn` over the devices so that each runs it on its own rows, for as long as these take.

    XLA's own partition of a function keeps the devices in step, and a loop would go on until the last row of all is
    done. Nothing is communicated but the sums, and what devices along "tensor" compute together. To be called inside a
    function that `pmapped` compiles, or by itself.

    Args:
        fn: takes the rows of one device. Arguments that are cut over "fsdp" are gathered for it.
        mesh: from `make_mesh`.
        in_axes: as for `pmapped`, without layouts.
        out_axes: as for `pmapped`, without layouts, or SUM.
    """
    if batch_parts(mesh) == 1:
        return fn

    def local(*args: PyTree) -> PyTree:
        def add_up(axis: Any, tree: PyTree) -> PyTree:
            return jax.lax.psum(tree, BATCH) if axis == SUM else tree

        return jax.tree.map(add_up, out_axes, fn(*args), is_leaf=_is_axis)

    own = set(AXES if mesh.shape["tensor"] == 1 else BATCH)
    # Gradients are taken within `fn`, so nothing needs to know which values are the same on all devices.
    return jax.shard_map(
        local, mesh=mesh, in_specs=_specs(in_axes), out_specs=_specs(out_axes), axis_names=own, check_vma=False
    )


def traced_once(fn: Callable[..., Any], static: tuple[str, ...] = ()) -> Callable[..., Any]:
    """`fn`, to be called inside what `pmapped` compiles: traced once for all calls with arguments of the same shapes.

    Args:
        fn: takes pytrees of arrays.
        static: names of the arguments that are not, and that can be hashed.
    """
    return jax.jit(fn, static_argnames=static)


def put(tree: PyTree, mesh: Mesh, axes: PyTree = None, copy: bool = True) -> PyTree:
    """Copies `tree` to the devices, laid out as `pmapped` wants an argument whose entry in `in_axes` is `axes`.

    The copy shares no memory with `tree`: it may be donated, and the original changed. Without `copy` what already lies
    so is taken as it is.

    Raises:
        InputError: an axis to be cut is not a multiple of the number of devices.
    """
    _check_divisible(axes, tree, mesh, "The tree")
    # A copy first: `device_put` may alias its source, a NumPy array or a shard, even where it is told not to.
    if copy:
        tree = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else np.array(x), tree)
    if jax.process_count() > 1:
        return _spread(tree, axes, mesh)
    return jax.device_put(tree, _shardings(mesh, axes))


def fetch(tree: PyTree) -> PyTree:
    """NumPy arrays of the whole of each array, on every process, which all have to ask for them."""

    def whole(x: Any) -> np.ndarray:
        apart = isinstance(x, jax.Array) and not x.is_fully_addressable
        return np.asarray(multihost_utils.process_allgather(x, tiled=True) if apart else x)

    return jax.device_get(tree) if jax.process_count() == 1 else jax.tree.map(whole, tree)


def rows_here(count: int, mesh: Mesh) -> np.ndarray:
    """Numbers of the rows of a batch of so many that are on this process's devices: what it has to load. [n].

    Raises:
        InputError: the devices cannot share them equally.
    """
    _check_divisible(0, np.empty(count), mesh, "The batch")
    parts = _shardings(mesh, 0).addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[index] for index in parts]))  # copies along "tensor"


def own_rows(tree: PyTree, mesh: Mesh) -> PyTree:
    """NumPy arrays of the rows of a batch, NumPy's or the devices', that are on this process's devices, in order."""

    def rows(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)[rows_here(len(x), mesh)]
        parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    return jax.device_get(tree) if jax.process_count() == 1 else jax.tree.map(rows, tree)


def join_rows(tree: PyTree, mesh: Mesh, axis: int = 0) -> PyTree:
    """A batch, whose rows lie along an axis, of those that each process has for its own. The inverse of `own_rows`."""
    if jax.process_count() == 1:
        return tree
    sharding = _shardings(mesh, axis)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def traced_batch_parts() -> int:
    """Parts that a batch is cut into in what `pmapped` is compiling; 1 in `each_device`, and where nothing is mapped.

    A function that is traced inside needs this to know how much of a batch a device holds, and for nothing else.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return math.prod(mesh.shape[axis] for axis in BATCH if kinds.get(axis) == AxisType.Auto)


def traced_platform() -> str:
    """The platform, such as "cpu" or "tpu", of the devices that `pmapped` is compiling for; otherwise the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def laid_as_batch(x: Array) -> Array:
    """`x`, its first axis cut over the devices as a batch's is, where parameters are cut over "fsdp"; else as it is.

    XLA lays out a value as those that it is made of suggest. Between parameters that are cut over the devices which
    the batch is cut over too, it would lay states now along their tokens and now along their width.
    """
    if not _cuts_models() or len(x) % traced_batch_parts():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH, *[None] * (x.ndim - 1)))


def laid_whole(x: Array) -> Array:
    """`x`, its last axis cut over no devices, where parameters are cut over "fsdp"; else as it is.

    So a table is gathered before rows are looked up in it, instead of parts of all rows on all devices.
    """
    if not _cuts_models():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1), None))


@jax.jit
def fingerprint(values: Array) -> Array:
    """A number that tells an array from a damaged copy: sum_i (2 i + 1) bits_i modulo 2^32. uint32 [].

    An odd factor is invertible modulo 2^32, so a change within one element never goes unseen; other changes do
    with a chance of about 2^-32. The sum is one of integers, so it is the same however the array is laid over devices.
    """
    values = values.astype(jnp.uint8) if values.dtype == jnp.bool_ else values
    words = jax.lax.bitcast_convert_type(values, jnp.dtype(f"uint{8 * min(values.dtype.itemsize, 4)}"))
    places = jax.lax.iota(jnp.uint32, math.prod(words.shape)).reshape(words.shape)
    return jnp.sum(words.astype(jnp.uint32) * (2 * places + 1), dtype=jnp.uint32)


def _cuts_models() -> bool:
    """Whether what is traced is mapped, and its parameters are cut over "fsdp"."""
    return traced_batch_parts() > 1 and jax.sharding.get_abstract_mesh().shape["fsdp"] > 1


def _spread(tree: PyTree, axes: PyTree, mesh: Mesh) -> PyTree:
    """Arrays over the devices of all processes, of which each process has the whole and keeps its part."""

    def place(axis: Any, subtree: PyTree) -> PyTree:
        sharding = _shardings(mesh, None if axis == AS_IT_IS else axis)
        return jax.tree.map(lambda x: _spread_array(x, sharding), subtree)

    return jax.tree.map(place, axes, tree, is_leaf=_is_axis)


def _spread_array(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return x
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_spread_array(jax.random.key_data(x), sharding))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _shardings(mesh: Mesh, axes: PyTree) -> PyTree:
    def sharding(spec: Any) -> NamedSharding | None:
        return None if spec == AS_IT_IS else NamedSharding(mesh, spec)

    return jax.tree.map(sharding, _specs(axes), is_leaf=_is_axis)


def _specs(axes: PyTree) -> PyTree:
    def spec(axis: Any) -> Any:
        if isinstance(axis, PartitionSpec) or axis == AS_IT_IS:
            return axis
        return PartitionSpec(*[None] * axis, BATCH) if isinstance(axis, int) else PartitionSpec()

    return jax.tree.map(spec, axes, is_leaf=_is_axis)


def _is_axis(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec)


def _check_divisible(axes: PyTree, tree: PyTree, mesh: Mesh, name: str) -> None:
    parts = batch_parts(mesh)

    def check(axis: Any, subtree: PyTree) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(subtree) if isinstance(axis, int) else ():
            size = np.shape(leaf)[axis]
            if size % parts:
                raise InputError(
                    f"{name}{jax.tree_util.keystr(path)} has size {size} on axis {axis}, which {parts} devices "
                    f"cannot share equally; make it a multiple of {parts}."
                )

    jax.tree.map(check, axes, tree, is_leaf=_is_axis)
