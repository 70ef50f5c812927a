"""Policies on disk, in the layout that `transformers` loads: config.json, safetensors, tokenizer files.

No weights are unpickled, and no code that comes with a model runs.
"""

import dataclasses
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rl_jax.errors import InputError
from rl_jax.models.config import Dtype, TransformerConfig
from rl_jax.models.families import from_settings, to_settings
from rl_jax.models.gguf import gguf_tokenizer, read_gguf
from rl_jax.models.layout import put_model
from rl_jax.models.lora import merge_adapters
from rl_jax.models.peft import SETTINGS, load_adapters, read_settings
from rl_jax.models.places import find_model
from rl_jax.models.shards import SHARD_BYTES, Stored, has_tensors, open_tensors, read_json, reading, save_tensors
from rl_jax.models.tensors import from_tensors, to_tensors
from rl_jax.run.folder import write_json
from rl_jax.run.processes import is_first
from rl_jax.run.spmd import Mesh, fetch, make_mesh
from rl_jax.types import Array, PyTree


class Policy(NamedTuple):
    """A language model.

    Attributes:
        params: its parameters.
        config: its configuration.
        tokenizer: its tokenizer.
        eos: ids that end a completion, where they are several.
        place: where it was read, which is what adapters say they are beside.
    """

    params: PyTree
    config: TransformerConfig
    tokenizer: Any
    eos: tuple[int, ...] = ()
    place: str = ""

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids of which each ends a completion; the tokenizer's own is the first."""
        return self.eos or (self.tokenizer.eos_token_id,)


def save_policy(folder: Path, policy: Policy, shard_bytes: int = SHARD_BYTES) -> str:
    """Write a policy so that `transformers` and `load_policy` read it: the first process does, and all have to ask.

    Args:
        folder: made where it is missing.
        policy: what is written.
        shard_bytes: size of a file of weights beyond which there are several.

    Returns:
        The folder, for `Policy.place`.
    """
    from rl_jax.data.tokenizer import save_tokenizer  # slow to import

    params = fetch(policy.params)
    if not is_first():
        return str(folder)
    tokenizer = policy.tokenizer
    settings = to_settings(policy.config, policy.ends, tokenizer.bos_token_id)
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids |= {"eos_token_id": settings["eos_token_id"]}
    generation = {name: id for name, id in ids.items() if id is not None}
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder, tokenizer)
    write_json(folder / "config.json", settings)
    write_json(folder / "generation_config.json", generation)
    save_tensors(folder, to_tensors(params, policy.config), shard_bytes)
    return str(folder)


def load_policy(
    place: Path | str,
    dtype: Dtype = "float32",
    remat: bool = False,
    params_dtype: Dtype = "float32",
    mesh: Mesh | None = None,
) -> Policy:
    """Read a policy, tensor by tensor, onto the devices, laid out as `put_model` does.

    Args:
        place: of which `find_model` says what it stands for: a folder that `save_policy` or `transformers` wrote, a
            GGUF file, or a model's name; or a folder of PEFT's adapters, which are added to the model they name.
        dtype: the compute dtype.
        remat: recompute blocks in the backward pass.
        params_dtype: of the matrices, bfloat16 for parameters that are not learned; vectors are float32.
        mesh: default `make_mesh()`.

    Raises:
        InputError: there is no such policy, it is damaged, or of a kind that is not supported.
    """
    path, mesh = find_model(place), mesh or make_mesh()
    if (path / SETTINGS).is_file():
        return _load_adapted(path, dtype, remat, params_dtype, mesh)
    settings, tensors, tokenizer, eos = _open_gguf(path) if path.is_file() else _open_folder(path)
    with reading(path if path.is_file() else path / "config.json"):
        config = dataclasses.replace(from_settings(settings), dtype=dtype, remat=remat)
    tokenizer, eos = check_tokenizer(tokenizer, eos, config, path)

    def put(name: str, value: np.ndarray) -> Array:
        value = value.astype(jnp.dtype(params_dtype)) if value.ndim > 1 else value
        return put_model({name: value}, mesh)[name]

    with reading(path):
        return Policy(from_tensors(tensors, config, put), config, tokenizer, eos, str(place))


def read_model(folder: Path, dtype: Dtype) -> tuple[TransformerConfig, Stored]:
    """The configuration and the named tensors in a model's folder, each of which is read when it is asked for.

    Raises:
        InputError: there is no model, one that is damaged, or one of a kind that is not supported.
    """
    _require_files(folder, "model", ("config.json",))
    settings = read_json(folder / "config.json")
    with reading(folder / "config.json"):
        config = dataclasses.replace(from_settings(settings), dtype=dtype)
    return config, open_tensors(folder)


def check_tokenizer(
    tokenizer: Any, eos: tuple[int, ...], config: TransformerConfig, path: Path
) -> tuple[Any, tuple[int, ...]]:
    """A model's tokenizer with an end-of-sequence token, and the ids that end a completion: that token's, then others.

    Args:
        tokenizer: where it names no such token, the first of `eos` becomes it.
        eos: ids that end a completion by what the model's files say.
        config: the model's configuration.
        path: where the tokenizer was read.

    Raises:
        InputError: it cannot end a completion, or it has tokens the model does not.
    """
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    if tokens > config.vocab_size:
        raise InputError(
            f"The tokenizer in {path} has {tokens} tokens, and the model a vocabulary of {config.vocab_size}: take "
            "the tokenizer that the model was trained with."
        )
    eos = tuple(sorted({id for id in eos if id < tokens}))
    if not isinstance(tokenizer.eos_token_id, int):
        if not eos:
            raise InputError(
                f"The tokenizer in {path} has no end-of-sequence token, which is what ends a completion: name one as "
                "eos_token in its tokenizer_config.json."
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos[0])
    own = tokenizer.eos_token_id
    return tokenizer, (own, *(id for id in eos if id != own))


def _load_adapted(folder: Path, dtype: Dtype, remat: bool, params_dtype: Dtype, mesh: Mesh) -> Policy:
    """The model that a folder of PEFT's adapters names, with these in its matrices."""
    base = read_settings(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or (Path(base) / SETTINGS).is_file():
        raise InputError(f"{folder / SETTINGS} must name a model as base_model_name_or_path, not {reprlib.repr(base)}.")
    policy = load_policy(base, dtype, remat, params_dtype, mesh)
    return policy._replace(params=merge_adapters(policy.params, load_adapters(folder, policy.config), 1.0))


def _open_folder(folder: Path) -> tuple[Any, Stored, Any, tuple[int, ...]]:
    """Settings, tensors, tokenizer and ids that end a completion."""
    from rl_jax.data.tokenizer import load_tokenizer  # slow to import

    _require_files(folder, "policy", ("config.json", "tokenizer.json"))
    settings, generation = read_json(folder / "config.json"), folder / "generation_config.json"
    values, source = settings, folder / "config.json"
    if generation.is_file() and (said := read_json(generation)).get("eos_token_id") is not None:
        values, source = said, generation
    with reading(source):
        eos = _ids(values.get("eos_token_id"))
    return settings, open_tensors(folder), load_tokenizer(folder), eos


def _open_gguf(path: Path) -> tuple[Any, Stored, Any, tuple[int, ...]]:
    """Settings, tensors, tokenizer and ids that end a completion."""
    with reading(path):
        settings, tensors, metadata = read_gguf(path)
        ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
        return settings, tensors, gguf_tokenizer(metadata), _ids([id for id in ids if id is not None])


def _require_files(folder: Path, kind: str, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing and not has_tensors(folder):
        missing = ["model.safetensors"]
    if missing:
        mend = "Give the policy folder of a run." if kind == "policy" else "Copy or train it again."
        raise InputError(f"{folder} is not a {kind}: it has no {missing[0]}. {mend}")


def _ids(value: Any) -> tuple[int, ...]:
    """Ids of tokens, of the value of an `eos_token_id`: none, one, or a list."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int and id >= 0 for id in ids):
        raise InputError(f"It has eos_token_id = {reprlib.repr(value)}, which are no ids of tokens: copy it again.")
    return tuple(ids)
