"""Policies on disk, in the layout that `transformers` loads: config.json, model.safetensors, tokenizer files.

No weights are unpickled, and no code that comes with a model runs.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from rl_jax.errors import InputError
from rl_jax.models.families import from_settings, to_settings
from rl_jax.models.tensors import from_tensors, to_tensors
from rl_jax.models.transformer import TransformerConfig
from rl_jax.run.processes import is_first
from rl_jax.run.spmd import fetch
from rl_jax.types import PyTree


class Policy(NamedTuple):
    """A language model: parameters, configuration, tokenizer, and ids that end a completion where they are several."""

    params: PyTree
    config: TransformerConfig
    tokenizer: Any
    eos: tuple[int, ...] = ()

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids of which each ends a completion."""
        return self.eos or (self.tokenizer.eos_token_id,)


def save_policy(folder: Path, policy: Policy) -> None:
    """Write a policy so that `transformers` and `load_policy` read it: the first process does, and all have to ask."""
    from rl_jax.data.tokenizer import save_tokenizer  # slow to import

    params = fetch(policy.params)
    if not is_first():
        return
    settings = to_settings(policy.config, policy.tokenizer.eos_token_id, policy.tokenizer.bos_token_id)
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder, policy.tokenizer)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    save_file(to_tensors(params, policy.config), folder / "model.safetensors", metadata={"format": "pt"})


def load_policy(folder: Path, dtype: Literal["float32", "bfloat16"] = "float32", remat: bool = False) -> Policy:
    """Read a policy that `save_policy` or `transformers` wrote.

    Args:
        folder: holds config.json, model.safetensors and the tokenizer.
        dtype: the compute dtype; parameters are float32.
        remat: recompute blocks in the backward pass.

    Raises:
        InputError: the folder is not a policy, or one of a kind that is not supported.
    """
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a policy: it has no {name}. Give the policy folder of a run.")
    config, tensors = read_model(folder, dtype, remat)
    tokenizer = read_tokenizer(folder, config)
    with reading(folder / "model.safetensors"):
        return Policy(from_tensors(tensors, config), config, tokenizer)


def read_model(
    folder: Path, dtype: Literal["float32", "bfloat16"] = "float32", remat: bool = False
) -> tuple[TransformerConfig, dict[str, np.ndarray]]:
    """The configuration and the named tensors in a model's folder.

    Raises:
        InputError: there is no model, one that is damaged, or one of a kind that is not supported.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a model: it has no {name}. Copy or train it again.")
    with reading(folder / "config.json"):
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        config = dataclasses.replace(from_settings(settings), dtype=dtype, remat=remat)
    with reading(folder / "model.safetensors"):
        return config, load_file(folder / "model.safetensors")


def read_tokenizer(folder: Path, config: TransformerConfig) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        InputError: there is none that can be read, it cannot end a completion, or it has tokens the model does not.
    """
    from rl_jax.data.tokenizer import load_tokenizer  # slow to import

    tokenizer = load_tokenizer(folder)
    if not isinstance(tokenizer.eos_token_id, int):
        raise InputError(
            f"The tokenizer in {folder} has no end-of-sequence token, which is what ends a completion: name one as "
            "eos_token in its tokenizer_config.json."
        )
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    if tokens > config.vocab_size:
        raise InputError(
            f"The tokenizer in {folder} has {tokens} tokens, and the model a vocabulary of {config.vocab_size}: take "
            "the tokenizer that the model was trained with."
        )
    return tokenizer


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file that is read in here is an `InputError` that names it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except MemoryError:  # no fault of the file's
        raise
    except Exception as error:  # files of others can break a reader in any way
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} cannot be read ({why}); copy or train it again.") from error
