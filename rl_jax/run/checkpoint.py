"""Checkpoints: written while the device computes on, whole or not at all, and verified when they are read.

Orbax finds a missing or a shortened file, yet restores flipped bits in silence. So a fingerprint of every array is
stored with the arrays, and a checkpoint that does not match its fingerprints is passed over for the one before.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from rl_jax.errors import InputError
from rl_jax.run.folder import describe_differences, differences, jsonable
from rl_jax.run.processes import is_first, wait_for_all
from rl_jax.run.spmd import fingerprint
from rl_jax.types import PyTree, TrainState

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

ASIDE = "unreadable-"  # before the name of a checkpoint that was passed over


class Checkpoints(NamedTuple):
    """A folder of checkpoints, and the settings that those written to it belong to."""

    manager: "CheckpointManager"
    config: dict[str, Any]


def open_checkpoints(folder: str | Path, config: dict[str, Any], keep: int = 2) -> Checkpoints:
    """Opens a folder of checkpoints, made if it is missing.

    Args:
        folder: where they are.
        config: the settings that the arrays depend on (those of the model, of the training). Each checkpoint holds
            a copy, and is restored under the same settings only.
        keep: how many of the newest are kept.
    """
    import orbax.checkpoint as ocp

    for name in ("absl", "asyncio"):  # Orbax's: what goes wrong is raised, or warned of below
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    return Checkpoints(ocp.CheckpointManager(Path(folder).absolute(), options=options), jsonable(config))


def save_checkpoint(checkpoints: Checkpoints, state: TrainState) -> None:
    """Starts to write the checkpoint of step `state.step`, and waits for the device, not for the disk.

    On return `state` may be donated: what is written are the values that it held. A step that is there already is
    not written again.

    Raises:
        OSError: this checkpoint, or the one that was being written, cannot be; those before it are as they were.
    """
    import orbax.checkpoint as ocp

    step = int(state.step)
    if step in checkpoints.manager.all_steps():
        return
    record = {"config": checkpoints.config, "fingerprints": _fingerprints(state, checkpoints.config)}
    with _writing(checkpoints):
        checkpoints.manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)),
            force=True,
        )


def restore_checkpoint(checkpoints: Checkpoints, like: TrainState) -> TrainState | None:
    """Restores the newest checkpoint that reads back as it was written.

    Newer ones that do not are warned of, and renamed so that training can write those steps again.

    Args:
        checkpoints: from `open_checkpoints`.
        like: a state with the shapes, types and shardings to restore to, of arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        The state, or None if there is no checkpoint.

    Raises:
        InputError: the checkpoint was written under other settings, or there are some and none can be read.
    """
    manager = checkpoints.manager
    unreadable: dict[int, str] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state = _read(checkpoints, step, like)
        except (InputError, MemoryError):
            raise
        except Exception as error:  # reading a damaged file may raise anything
            unreadable[step] = " ".join(str(error).split())[:120] or type(error).__name__
            continue
        for other, reason in unreadable.items():
            warnings.warn(
                f"Checkpoint {manager.directory / str(other)} cannot be read ({reason}). It is set aside as "
                f"{ASIDE}{other}, and the one of step {step} is restored.",
                stacklevel=2,
            )
            _set_aside(manager, other)
        return state
    if unreadable:
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in unreadable.items())
        raise InputError(
            f"No checkpoint in {manager.directory} can be read ({reasons}). Bring the folder back from a copy, or "
            "remove it to start from the beginning."
        )
    return None


def wait_for_checkpoints(checkpoints: Checkpoints) -> None:
    """Waits until what is being written is on disk. Raises OSError if it cannot be written."""
    with _writing(checkpoints):
        checkpoints.manager.wait_until_finished()


def close_checkpoints(checkpoints: Checkpoints) -> None:
    """Waits until what is being written is on disk, and lets go of the folder."""
    checkpoints.manager.close()


@contextlib.contextmanager
def _writing(checkpoints: Checkpoints) -> Generator[None]:
    """Within the context, what the operating system refuses is an OSError that names the folder."""
    try:
        yield
    except (OSError, ValueError) as error:  # TensorStore gives a ValueError, with the system's code in its words
        said = re.search(r"os_error_code='(\d+)'", str(error))
        if said is not None:
            reason = os.strerror(int(said.group(1)))
        elif isinstance(error, OSError):
            reason = error.strerror or str(error)
        else:
            raise
        raise OSError(
            f"A checkpoint in {checkpoints.manager.directory} cannot be written: {reason.rstrip('.')}"
        ) from error


def _fingerprints(state: PyTree, config: dict[str, Any]) -> dict[str, int]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    # One at a time, as `pmapped` has it between processes.
    arrays = {jax.tree_util.keystr(path): int(fingerprint(leaf)) for path, leaf in leaves}
    settings = {"config": zlib.crc32(json.dumps(config, sort_keys=True).encode())}
    return settings | arrays


def _read(checkpoints: Checkpoints, step: int, like: TrainState) -> TrainState:
    import orbax.checkpoint as ocp

    manager = checkpoints.manager
    record = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
    if _fingerprints((), record["config"])["config"] != record["fingerprints"]["config"]:
        raise ValueError("its settings are damaged")
    if found := differences(record["config"], checkpoints.config):
        raise InputError(
            f"{manager.directory / str(step)} was written under other settings: {describe_differences(found)}. "
            "Resume under the settings it was written under, or start another run."
        )
    state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]
    if damaged := differences(record["fingerprints"], _fingerprints(state, record["config"])):
        raise ValueError(f"{next(iter(damaged))} is damaged")
    return state


def _set_aside(manager: "CheckpointManager", step: int) -> None:
    if is_first():
        aside = manager.directory / f"{ASIDE}{step}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(manager.directory / str(step), aside)
    wait_for_all("a checkpoint is set aside")
    manager.reload()
