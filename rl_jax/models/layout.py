"""How the parameters of a Transformer are cut over a mesh: rules of their paths, which are data.

Along "tensor" each device has some heads, some of the MLP's inner features and some of the vocabulary, so that a block
adds up over these devices twice (Shoeybi 2019, Megatron-LM). Along "fsdp" the other axis of each matrix is cut, and
gathered where it is used (Rajbhandari 2020, ZeRO-3).
"""

import jax
import numpy as np

from rl_jax.run.spmd import Mesh, Rules, batch_parts, has_whole_models, lay_out, put
from rl_jax.types import Array, PyTree

RULES: Rules = (
    (r"position_embedding/embedding$", (None, "fsdp")),
    (r"embedding/embedding$", ("tensor", "fsdp")),
    (r"(query|key|value|up|gate|output)/kernel$", ("fsdp", "tensor")),
    (r"(query|key|value|up|gate)/bias$", ("tensor",)),
    (r"(out|down)/kernel$", ("tensor", "fsdp")),
)


def model_axes(tree: PyTree, mesh: Mesh) -> PyTree:
    """How parameters, or a state with them, are laid out: for `pmapped` to return them so."""
    return lay_out(tree, RULES, mesh)


def put_model(tree: PyTree, mesh: Mesh, copy: bool = True) -> PyTree:
    """Copies parameters, or a state with them, to the devices, so laid out; see `put`."""
    return put(tree, mesh, model_axes(tree, mesh), copy)


def put_unchanged(tree: PyTree, mesh: Mesh) -> PyTree:
    """Parameters that are only read, so laid out; those that already are so are not copied."""
    return put_model(tree, mesh, copy=False)


def put_shared(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies parameters that are only read to the devices, each of which keeps a part: XLA gathers them for their use.

    Where models are whole each array is cut along its longest axis that divides over the devices; elsewhere the devices
    share them already.
    """
    if not has_whole_models(mesh):
        return put_unchanged(tree, mesh)
    parts = batch_parts(mesh)

    def longest_axis(x: Array) -> int | None:
        sizes = np.shape(x)
        return max((axis for axis, size in enumerate(sizes) if size % parts == 0), key=sizes.__getitem__, default=None)

    return put(tree, mesh, jax.tree.map(longest_axis, tree), copy=False)
