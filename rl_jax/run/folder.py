"""A run's folder: made once, named by the user, and continued only by the run that made it."""

import dataclasses
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rl_jax.errors import InputError
from rl_jax.run import lock
from rl_jax.run.metrics import describe_device, versions
from rl_jax.run.processes import is_first, on_first

MAY_DIFFER = (
    "run",
    "resume",
    "track",
    "machine",
    *(f"{r}.{x}" for r in ("reward", "gold") for x in ("time_limit", "on_failure")),
)
BEFORE_CONFIG = {lock.FILE, "config.json.tmp"}
"""What a run that was killed as it began may have left in its folder."""


def check_run(folder: str | Path, config: Any, resume: bool, may_differ: Collection[str] = MAY_DIFFER) -> None:
    """Checks that a new run's folder is free, or that the run to be resumed is the one in it; writes nothing.

    Args:
        folder: the run's folder.
        config: its settings, a dataclass.
        resume: whether the run continues one that is there.
        may_differ: settings, or groups of them, that a resumed run may change, in dotted names ("reinforce.steps").

    Raises:
        InputError: another process writes to the folder, a new run's folder is taken, or the run to resume is missing
            or was made with other settings.
    """
    folder = Path(folder)

    def check() -> None:
        lock.check_unlocked(folder)
        if resume:
            _check_same_run(folder, jsonable(config), may_differ)
        elif folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - BEFORE_CONFIG):
            raise InputError(f"{folder} exists; give another folder, remove it, or continue it with --resume.")

    on_first(check)


def open_run(folder: str | Path, script: str, config: Any, **about: Any) -> Path:
    """Makes the folder of a run that `check_run` has accepted, writes its config.json, and returns the folder.

    It is this process's, or that of the first of several, until it ends; the same process may open it again.

    Args:
        folder: the run's folder.
        script: the script that runs, such as "experiments/pipeline.py".
        config: its settings, a dataclass.
        about: what else config.json is to say of the run.

    Raises:
        InputError: another process writes to the folder.
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)

    def make() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        lock.lock_folder(folder)
        facts = {"script": script, "config": jsonable(config), "device": describe_device(), "versions": versions()}
        write_json(folder / "config.json", facts | about)

    on_first(make)
    return folder


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as `write_text` does, in the first process alone; NaN and infinities become null."""
    if is_first():
        text = json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_text(path, text)


def write_text(path: str | Path, text: str) -> Path:
    """Writes a text so that a reader finds the old file or the new one whole, and returns its path."""
    path = Path(path)
    half = path.with_name(path.name + ".tmp")
    half.write_text(text, "utf-8", errors="replace")  # JSON can hold half a surrogate pair
    return half.replace(path)


def jsonable(value: Any) -> Any:
    """`value` as JSON reads it back: dataclasses are objects, tuples lists, paths strings, NaN and infinities null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy and JAX
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def differences(old: Any, new: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted names of the settings in which two configurations differ, with both values ("absent" where missing)."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {name: (old, new)}
    found = {}
    for key in [*old, *(key for key in new if key not in old)]:
        found |= differences(old.get(key, "absent"), new.get(key, "absent"), f"{name}.{key}" if name else key)
    return found


def describe_differences(found: dict[str, tuple[Any, Any]], limit: int = 3) -> str:
    """The first few differences in a phrase: "rl.steps was 100 and is now 200"."""
    phrases = [f"{name} was {old!r} and is now {new!r}" for name, (old, new) in list(found.items())[:limit]]
    more = len(found) - len(phrases)
    return "; ".join(phrases) + (f"; and {more} more" if more > 0 else "")


def _check_same_run(folder: Path, settings: dict[str, Any], may_differ: Collection[str]) -> None:
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"There is no run to resume in {folder}: {path} does not exist. Start it without --resume.")
    try:
        before = json.loads(path.read_text("utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error!r}); give another folder.") from error
    allowed = tuple(f"{name}." for name in may_differ)
    found = {name: pair for name, pair in differences(before, settings).items() if not f"{name}.".startswith(allowed)}
    if found:
        raise InputError(
            f"{folder} was run with other settings: {describe_differences(found)}. "
            "Resume with the settings it was started with, or give another folder."
        )
