"""Named tensors in files, read one at a time: a model need not fit in memory twice to be loaded."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from rl_jax.errors import InputError
from rl_jax.run.folder import write_json

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_BYTES = 5 * 10**9  # as `transformers` cuts


class Stored(Mapping[str, np.ndarray]):
    """Tensors by name, each read from its file whenever it is asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], np.ndarray]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> np.ndarray:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def has_tensors(folder: Path) -> bool:
    """Whether a folder has the weights of a model, in one file or in shards."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def open_tensors(folder: Path) -> Stored:
    """The tensors of a model's folder: of model.safetensors, else of the shards that the index names.

    Raises:
        InputError: a file is missing or damaged, or the index names a tensor that is not in its shard.
    """
    if (folder / WEIGHTS).is_file():
        return Stored(_readers(folder / WEIGHTS))
    index = folder / INDEX
    with reading(index):
        places = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        for name in names:
            if name != Path(name).name or not name.endswith(".safetensors"):
                raise InputError(f"It names {name!r}, which is no safetensors file beside it: copy it again.")
    shards = {}
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}, which {INDEX} names, is missing: copy the model again.")
        shards[name] = _readers(folder / name)
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise InputError(f"{folder / name} lacks the tensor {tensor}, which {INDEX} says it has: copy it again.")
    return Stored({tensor: shards[name][tensor] for tensor, name in places.items()})


def _readers(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    with reading(path):
        file = safe_open(path, framework="numpy")

        def read(name: str) -> np.ndarray:
            with reading(path):
                return file.get_tensor(name)

        return {name: lambda name=name: read(name) for name in file.keys()}  # noqa: SIM118, no mapping


def save_tensors(folder: Path, tensors: Mapping[str, np.ndarray], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as `open_tensors` and `transformers` read them: in one file, or in shards of at most so many bytes.

    A tensor that is larger has a shard of its own.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    room = shard_bytes
    for name, value in tensors.items():
        if shards[-1] and value.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = value
        room -= value.nbytes
    stale = {*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS, folder / INDEX}
    places = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
        stale.discard(folder / file)
    if len(shards) > 1:
        total = sum(value.nbytes for value in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        stale.discard(folder / INDEX)
    for path in stale:  # of a model that was saved here before
        path.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError where it holds none."""
    with reading(path):
        values = json.loads(path.read_text("utf-8"))
        if not isinstance(values, dict):
            raise InputError("It holds no JSON object; copy or train it again.")
        return values


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file that is read in here is an `InputError` that names it."""
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path}: {error}") from error
    except MemoryError:  # no fault of the file's
        raise
    except Exception as error:  # files of others can break a reader in any way
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} cannot be read ({why}); copy or train it again.") from error
