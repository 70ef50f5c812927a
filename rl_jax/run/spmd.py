"""One way to compile a function of the global batch and map it over devices, in `jax.pmap`'s vocabulary.

The library's functions see the whole batch and name no axis. `pmapped` compiles them with shardings: arrays of
axis 0 are cut over the devices, arrays of axis None are copied to each, and XLA adds the communication. On a mesh
of one axis this is what `jax.pmap` computes; the answer does not depend on the number of devices.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rl_jax.errors import InputError
from rl_jax.types import Array, PyTree

AXIS = "data"
SUM = "sum"
"""In place of an axis's number in the `out_axes` of `each_device`: the sum over the devices, which each then has."""


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, "data", over `devices`, or over every device there is."""
    devices = jax.devices() if devices is None else devices
    # The default axis type is Explicit, under which a Linen embedding of sharded weights fails.
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def pmapped(
    fn: Callable[..., Any], mesh: Mesh, in_axes: tuple[PyTree, ...], out_axes: PyTree, donate: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Compiles `fn`, a function of the global batch, and maps it over the devices of `mesh`.

    Args:
        fn: takes positional arguments, pytrees of arrays, and returns a pytree of arrays.
        mesh: from `make_mesh`.
        in_axes: one entry an argument, each a pytree prefix of it with leaves None (a copy on each device) or the
            number of the axis that is cut over the devices, usually 0.
        out_axes: the same for what `fn` returns.
        donate: numbers of the arguments whose memory the result may take over; the caller cannot use them again.

    Returns:
        The compiled function, with the `lower` and `_cache_size` of `jax.jit`. Calling it raises InputError where
        an axis to be cut is not a multiple of the number of devices.
    """
    compiled: Any = jax.jit(
        fn, in_shardings=_shardings(mesh, in_axes), out_shardings=_shardings(mesh, out_axes), donate_argnums=donate
    )
    name = getattr(fn, "__name__", "the function")

    @functools.wraps(fn)
    def checked(*args: PyTree) -> PyTree:
        for number, (axes, arg) in enumerate(zip(in_axes, args, strict=False)):  # jit counts them
            _check_divisible(axes, arg, mesh, f"Argument {number} of {name}")
        return compiled(*args)

    vars(checked).update(lower=compiled.lower, _cache_size=compiled._cache_size)
    return checked


def each_device(
    fn: Callable[..., Any], mesh: Mesh, in_axes: tuple[PyTree, ...], out_axes: PyTree
) -> Callable[..., Any]:
    """Maps `fn` over the devices so that each runs it on its own rows, for as long as these take.

    XLA's own partition of a function keeps the devices in step, and a loop would go on until the last row of all is
    done. Nothing is communicated but the sums. To be called inside a function that `pmapped` compiles, or by itself.

    Args:
        fn: takes the rows of one device.
        mesh: from `make_mesh`.
        in_axes: as for `pmapped`.
        out_axes: as for `pmapped`, or SUM.
    """
    if mesh.size == 1:
        return fn

    def local(*args: PyTree) -> PyTree:
        def add_up(axis: Any, tree: PyTree) -> PyTree:
            return jax.lax.psum(tree, AXIS) if axis == SUM else tree

        return jax.tree.map(add_up, out_axes, fn(*args), is_leaf=lambda x: x is None)

    specs = (_specs(axes) for axes in (in_axes, out_axes))
    # Gradients are taken within `fn`, so nothing needs to know which values are the same on all devices.
    return jax.shard_map(local, mesh=mesh, in_specs=next(specs), out_specs=next(specs), check_vma=False)


def traced_once(fn: Callable[..., Any], static: tuple[str, ...] = ()) -> Callable[..., Any]:
    """`fn`, to be called inside what `pmapped` compiles: traced once for all calls with arguments of the same shapes.

    Args:
        fn: takes pytrees of arrays.
        static: names of the arguments that are not, and that can be hashed.
    """
    return jax.jit(fn, static_argnames=static)


def put(tree: PyTree, mesh: Mesh, axes: PyTree = None) -> PyTree:
    """Copies `tree` to the devices, laid out as `pmapped` wants an argument whose entry in `in_axes` is `axes`.

    The copy shares no memory with `tree`: it may be donated, and the original changed.

    Raises:
        InputError: an axis to be cut is not a multiple of the number of devices.
    """
    _check_divisible(axes, tree, mesh, "The tree")
    # A copy first: `device_put` may alias its source, a NumPy array or a shard, even where it is told not to.
    copies = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else np.array(x), tree)
    return jax.device_put(copies, _shardings(mesh, axes))


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


def _shardings(mesh: Mesh, axes: PyTree) -> PyTree:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs(axes))


def _specs(axes: PyTree) -> PyTree:
    def spec(axis: int | str | None) -> PartitionSpec:
        return PartitionSpec(*[None] * axis, AXIS) if isinstance(axis, int) else PartitionSpec()

    return jax.tree.map(spec, axes, is_leaf=lambda x: x is None)


def _check_divisible(axes: PyTree, tree: PyTree, mesh: Mesh, name: str) -> None:
    def check(axis: int | None, subtree: PyTree) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(subtree) if axis is not None else ():
            size = np.shape(leaf)[axis]
            if size % mesh.size:
                raise InputError(
                    f"{name}{jax.tree_util.keystr(path)} has size {size} on axis {axis}, which {mesh.size} devices "
                    f"cannot share equally; make it a multiple of {mesh.size}."
                )

    jax.tree.map(check, axes, tree, is_leaf=lambda x: x is None)
