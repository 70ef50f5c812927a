"""One process at a time writes to a run's folder: the kernel frees the lock when the process ends, however it ends."""

import fcntl
import os
import socket
import warnings
from pathlib import Path

from rl_jax.errors import InputError

FILE = ".lock"
"""The file in the folder that is locked, and that says by whom; it stays there, and means nothing when nobody is."""

_held: dict[Path, int] = {}  # folders that this process has, and the open file that it has each by


def lock_folder(folder: Path) -> None:
    """Takes a folder for this process, until it ends; taking it again changes nothing.

    The lock is advisory, by `flock`: a process that is killed leaves none behind. Where the file system knows no locks
    there is a warning instead.

    Raises:
        InputError: another process has it.
    """
    folder = folder.resolve()
    if _is_held(folder):
        return
    file = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise InputError(_taken(folder)) from error
    except OSError as error:
        os.close(file)
        warnings.warn(f"{folder} cannot be locked ({error}): see to it that no other run writes to it.", stacklevel=2)
        return
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held[folder] = file


def check_unlocked(folder: Path) -> None:
    """Raises InputError if another process has the folder; leaves the folder as it is."""
    folder = folder.resolve()
    if _is_held(folder) or not (folder / FILE).is_file():
        return
    file = os.open(folder / FILE, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(_taken(folder)) from error
    except OSError:  # no locks there, as `lock_folder` will say
        pass
    finally:
        os.close(file)


def _is_held(folder: Path) -> bool:
    """Whether this process has the folder that is there now, which may be another than that which it once took."""
    file = _held.get(folder)
    if file is None:
        return False
    try:
        if os.path.samestat(os.fstat(file), os.stat(folder / FILE)):
            return True
    except FileNotFoundError:
        pass
    os.close(_held.pop(folder))
    return False


def _taken(folder: Path) -> str:
    who = (folder / FILE).read_text("utf-8", errors="replace").strip() or "another process"
    return f"{folder} is in use: {who} writes to it. Wait until that has ended, or give another folder."
