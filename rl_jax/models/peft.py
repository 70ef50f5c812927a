"""Adapters on disk, in the layout of PEFT: adapter_config.json and adapter_model.safetensors.

GPT-2 has queries, keys and values in one matrix there. Adapters of n of the three are one of n times the rank, each
with rows and columns of its own.
"""

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from rl_jax.errors import InputError
from rl_jax.models.config import TransformerConfig
from rl_jax.models.families import family
from rl_jax.models.lora import Layer, LoRA, adaptable_layers
from rl_jax.models.shards import read_json, reading
from rl_jax.models.tensors import FUSED, GPT2_LAYER, LLAMA_LAYER, PARTS, read_tensor
from rl_jax.run.folder import write_json
from rl_jax.run.processes import is_first
from rl_jax.run.spmd import fetch
from rl_jax.types import PyTree

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_qalora": False, "lora_bias": False}
PLAIN |= {"modules_to_save": None, "trainable_token_indices": None, "target_parameters": None}
PLAIN |= {"layer_replication": None, "alora_invocation_tokens": None}


def save_adapters(folder: Path, adapters: PyTree, settings: LoRA, config: TransformerConfig, base: str = "") -> None:
    """Write adapters so that PEFT and `load_adapters` read them: the first process does, and all have to ask.

    Args:
        folder: made if it is missing.
        adapters: as `init_adapters` makes them; what stands beside them is left out.
        settings: what they were trained with.
        config: of the model.
        base: folder or name of the model that they are beside.
    """
    flat = {path: np.asarray(x, np.float32) for path, x in flatten_dict(fetch(adapters)).items()}
    if not is_first():
        return
    tensors, widest = {}, settings.rank
    for name, layers in _modules([path[:-1] for path in flat if path[-1] == "lora_a"], config).items():
        low = np.concatenate([flat[*layer, "lora_a"].T for layer in layers])
        high = flat[*layers[0], "lora_b"].T
        if name.endswith(FUSED):
            apart = np.zeros((len(PARTS), len(high), len(layers), settings.rank), np.float32)
            for number, layer in enumerate(layers):
                apart[PARTS.index(layer[-1]), :, number] = flat[*layer, "lora_b"].T
            high = apart.reshape(-1, len(low))
        tensors |= {f"{name}.lora_A.weight": low, f"{name}.lora_B.weight": high}
        widest = max(widest, len(low))
    rank, alpha = settings.rank, settings.scale * settings.rank
    about = PLAIN | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {FUSED: widest} if widest > rank else {},
        "alpha_pattern": {FUSED: settings.scale * widest} if widest > rank else {},
        "target_modules": sorted({re.sub(r".*\.\d+\.(.*)\.lora_[AB]\.weight", r"\1", name) for name in tensors}),
        "fan_in_fan_out": family(config) == "gpt2",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    write_json(folder / SETTINGS, about)


def load_adapters(folder: Path, config: TransformerConfig) -> PyTree:
    """Read adapters that `save_adapters` or PEFT wrote, of any rank, each multiplied by its own scale already.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        config: of the model that they are for.

    Returns:
        As `init_adapters`, for `with_adapters` or `merge_adapters` with a scale of 1.

    Raises:
        InputError: the folder holds no adapters, damaged ones, some of a kind that is not supported, or some that do
            not fit the model.
    """
    settings = read_settings(folder)
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} has no {WEIGHTS}; adapters are read from safetensors alone: save them so.")
    with reading(folder / WEIGHTS):
        return _from_tensors(load_file(folder / WEIGHTS), settings, config)


def read_settings(folder: Path) -> Mapping[str, Any]:
    """What a folder's adapter_config.json holds; its base_model_name_or_path says what the adapters are beside.

    Raises:
        InputError: there is none that can be read, or one of adapters that are not supported.
    """
    path = folder / SETTINGS
    settings = read_json(path)
    with reading(path):
        for name, value in PLAIN.items():
            if (settings.get(name) or value) != value:
                shown = reprlib.repr(settings[name])
                raise InputError(f"Adapters with {name} = {shown} are not supported; only {value!r} is.")
    return settings


def _from_tensors(tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any], config: TransformerConfig) -> PyTree:
    """Named tensors of PEFT as adapters."""
    shapes, left, flat = adaptable_layers(config), dict(tensors), {}
    for name, layers in _modules(list(shapes), config).items():
        names = [f"{name}.lora_{matrix}.weight" for matrix in "AB"]
        if not set(names) & set(left):
            continue
        low, high = (left.pop(each, np.empty(0)) for each in names)
        rank = low.shape[0]
        rows, columns = shapes[layers[0]][0], sum(shapes[layer][1] for layer in layers)
        low, high = read_tensor(names[0], low, (rank, rows)), read_tensor(names[1], high, (columns, rank))
        for layer, part in zip(layers, np.split(high, len(layers)), strict=True):
            flat[*layer, "lora_a"] = np.float32(_scale(settings, name, rank)) * low.T
            flat[*layer, "lora_b"] = part.T
    if left or not flat:
        raise InputError(f"The adapters have a tensor {next(iter(left), '')!r}, which is of no layer of the model.")
    return unflatten_dict(flat)


def _modules(layers: Sequence[Layer], config: TransformerConfig) -> dict[str, list[Layer]]:
    """The names that PEFT has for layers, and which layers each is of: several in GPT-2's fused one, in their order."""
    is_gpt2, found = family(config) == "gpt2", {}
    names, prefix = (GPT2_LAYER, "transformer.h") if is_gpt2 else (LLAMA_LAYER, "model.layers")
    for layer in sorted(layers, key=lambda layer: PARTS.index(layer[-1]) if layer[-1] in PARTS else 0):
        block, *path = layer
        module = FUSED if is_gpt2 and path[-1] in PARTS else names["/".join(path)]
        found.setdefault(f"base_model.model.{prefix}.{block.removeprefix('block_')}.{module}", []).append(layer)
    return found


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """What the adapter of a module is multiplied by: alpha / r, of PEFT's settings for all or for modules of a name."""
    patterns = settings.get("alpha_pattern") or {}
    for name in patterns:
        if not re.fullmatch(r"[\w.]+", name):
            raise InputError(f"alpha_pattern has {name!r}: patterns are not supported there, only names of modules.")
    own = (alpha for name, alpha in patterns.items() if f".{module}".endswith(f".{name}"))
    alpha: Any = next(own, settings.get("lora_alpha"))
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise InputError(f"The adapters' alpha is {reprlib.repr(alpha)}; it must be a positive number.")
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)
