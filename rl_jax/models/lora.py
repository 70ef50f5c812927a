"""Low-rank adapters (LoRA, Hu 2021): what is trained are a few numbers beside a model's matrices, which stay.

An adapted layer computes x W + scale (x A) B. A is random and B is 0 to begin with, so that the model begins as it was.
Adapters are a pytree with the paths of the layers that they adapt: {"block_0": {"mlp": {"up": {"lora_a", "lora_b"}}}},
and whatever else is trained, such as a critic, stands beside them. Letters: I and O features of a layer, r rank.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import Partial

from rl_jax.errors import InputError
from rl_jax.models.config import Dtype, TransformerConfig
from rl_jax.models.transformer import parameter_shapes
from rl_jax.types import Array, PyTree

ALL = "all"

Layer = tuple[str, ...]
"""The path of a layer's parameters, such as ("block_0", "mlp", "up")."""


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (LoRA, Hu 2021), trained instead of the model's own parameters."""

    rank: int = 0
    """Rank of the adapters, such as 8; 0 trains the model's own parameters. Adapters want about ten times the learning
    rate."""
    alpha: float | None = None
    """The product of an adapter's matrices is multiplied by alpha / rank; None is twice the rank."""
    targets: tuple[str, ...] = (ALL,)
    """Layers that get adapters: query, key, value, out, gate, up, down, or all of them."""

    @property
    def scale(self) -> float:
        """What the product of an adapter's matrices is multiplied by."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def kept_in(self, dtype: Dtype) -> Dtype:
        """What the model's own matrices are kept in: the compute dtype, where they are not trained."""
        return dtype if self.rank else "float32"


WholeFn = Callable[[PyTree], PyTree]
"""What is trained of a model -> its parameters. A `Partial`, so that it is a pytree of what stays."""

itself: WholeFn = Partial(lambda trained: trained)
"""The whole model is trained."""


class Tuning(NamedTuple):
    """What is trained of a model, and how its parameters are got from that and from the base, which stays.

    Attributes:
        base: the model's parameters -> the base.
        begin: key, the model's parameters -> what is trained, before the first update.
        whole: base, what is trained -> parameters to learn with.
        sampled: base, what is trained -> parameters to sample with.
        merged: base, what is trained -> parameters without adapters, float32.
    """

    base: Callable[[PyTree], PyTree]
    begin: Callable[[Array, PyTree], PyTree]
    whole: Callable[[PyTree, PyTree], PyTree]
    sampled: Callable[[PyTree, PyTree], PyTree]
    merged: Callable[[PyTree, PyTree], PyTree]


def make_tuning(settings: LoRA, config: TransformerConfig) -> Tuning:
    """All of a model is trained, or adapters are.

    Sampling goes through the matrices once a token, so adapters are added to them first, once for a whole batch; but in
    bfloat16, whose rounding would swallow them.
    """

    def trained_alone(base: PyTree, trained: PyTree) -> PyTree:
        return trained

    if settings.rank == 0:
        return Tuning(lambda _: (), lambda _, params: params, trained_alone, trained_alone, trained_alone)
    whole, merged = (functools.partial(put, scale=settings.scale) for put in (with_adapters, merge_adapters))
    return Tuning(
        base=lambda params: params,
        begin=lambda key, _: init_adapters(key, config, settings.rank, settings.targets),
        whole=whole,
        sampled=merged if config.dtype == "float32" else whole,
        merged=merged,
    )


def check_lora(settings: LoRA, config: TransformerConfig) -> None:
    """Raise InputError for adapters that cannot be, and for settings of adapters where there are none."""
    if settings.rank < 0:
        raise InputError(f"lora.rank is {settings.rank}; it must be at least 1, or 0 for no adapters.")
    for name in ("alpha", "targets"):
        if settings.rank == 0 and getattr(settings, name) != getattr(LoRA, name):
            raise InputError(f"lora.{name} has no effect without adapters: give lora.rank too, or leave it out.")
    if settings.alpha is not None and not 0 < settings.alpha < math.inf:
        raise InputError(f"lora.alpha is {settings.alpha}; it must be a positive number.")
    _chosen(config, settings.targets)


def init_adapters(key: Array, config: TransformerConfig, rank: int, targets: Sequence[str] = (ALL,)) -> PyTree:
    """Adapters of a model that change nothing yet: A uniform within 1 / sqrt(I), as PEFT has it, and B 0.

    Args:
        key: of A.
        config: of the model.
        rank: r.
        targets: names of the layers to adapt in each block, or "all".

    Returns:
        "lora_a" [I, r] and "lora_b" [r, O] at the path of each layer. float32.

    Raises:
        InputError: there is no layer of that name.
    """
    layers = _chosen(config, targets)
    flat: dict[Layer, Array] = {}
    for own, (layer, (rows, columns)) in zip(jax.random.split(key, len(layers)), layers.items(), strict=True):
        bound = rows**-0.5
        flat[*layer, "lora_a"] = jax.random.uniform(own, (rows, rank), minval=-bound, maxval=bound)
        flat[*layer, "lora_b"] = jnp.zeros((rank, columns))
    return unflatten_dict(flat)


def with_adapters(base: PyTree, adapters: PyTree, scale: float) -> PyTree:
    """Parameters of the model with adapters beside its kernels, A times `scale`; what else is given, beside them."""
    flat: dict[Layer, Any] = flatten_dict(adapters)
    scaled = {path: scale * x if path[-1] == "lora_a" else x for path, x in flat.items()}
    return unflatten_dict(flatten_dict(base) | scaled)


def merge_adapters(base: PyTree, adapters: PyTree, scale: float) -> PyTree:
    """Parameters of the model with adapters added to its kernels, W + scale A B; what else is given, beside them."""
    flat: dict[Layer, Any] = flatten_dict(base)
    others: dict[Layer, Any] = flatten_dict(adapters)
    for layer in [path[:-1] for path in others if path[-1] == "lora_a"]:
        low, high = (others.pop((*layer, name)) for name in ("lora_a", "lora_b"))
        flat[*layer, "kernel"] += scale * jnp.matmul(low, high, precision="highest")
    return unflatten_dict(flat | others)


def adaptable_layers(config: TransformerConfig) -> dict[Layer, tuple[int, int]]:
    """The layers that can have adapters, those of the blocks, and the I and O of each."""
    kernels = ((path[:-1], shape) for path, shape in parameter_shapes(config) if path[-1] == "kernel")
    return {layer: (rows, columns) for layer, (rows, columns) in kernels if layer[0].startswith("block_")}


def _chosen(config: TransformerConfig, targets: Sequence[str]) -> dict[Layer, tuple[int, int]]:
    """Those of them that are named. Raises InputError for a name that none has."""
    layers = adaptable_layers(config)
    names = sorted({layer[-1] for layer in layers})
    for name in targets or ("",):
        if name not in (*names, ALL):
            raise InputError(f"There is no layer {name!r} to adapt; there are {', '.join(names)}, or {ALL} of them.")
    return {layer: shape for layer, shape in layers.items() if ALL in targets or layer[-1] in targets}
