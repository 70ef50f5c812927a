"""Several processes that share a run: how they start, what the first alone does, and how they agree.

All run the same script with the same settings, and call the same programs in the same order, each on its own devices.
The first of them, number 0, alone speaks and writes files, but that each writes its own part of a checkpoint.
"""

import functools
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from rl_jax.errors import InputError
from rl_jax.run.spmd import Mesh, join_rows, make_mesh, pmapped
from rl_jax.types import Array

FROM_ENVIRONMENT = "auto"
HEARTBEAT = 30  # seconds without a sign of life after which JAX's runtime takes a process for lost
PATIENCE = 10  # seconds that a process which fails waits for the others to fail as well
MESSAGE = 1000  # bytes of a message that all are to hear

# What watches a process must outlive it, so it is another; it hears one byte before its pipe is closed if all is well.
WATCH = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if not sys.stdin.buffer.read():
    sys.stderr.write(sys.argv[1])
"""

_watcher: "subprocess.Popen[bytes] | None" = None


def start_processes(coordinator: str, processes: int, process: int) -> None:
    """Joins this process with the others of its run. To be called before JAX looks for devices.

    Args:
        coordinator: where the first process listens for the others, host:port; "auto" takes this and the numbers from
            the environment (SLURM, Open MPI, Kubernetes, a slice of TPUs); "" for a process by itself.
        processes: how many there are.
        process: number of this one, from 0.

    Raises:
        InputError: the arguments contradict each other, or the others cannot be reached in five minutes.
    """
    named = processes > 0 or process >= 0
    host, _, port = coordinator.rpartition(":")
    if not coordinator and not named:
        return
    if coordinator == FROM_ENVIRONMENT:
        if named:
            raise InputError(f"coordinator {coordinator} finds out processes and process by itself: leave them out.")
        found: dict[str, Any] = {}
    elif not host or not port.isdigit():
        raise InputError(
            f"coordinator is {coordinator!r}: give the address of process 0, such as node1:12345, or "
            f"{FROM_ENVIRONMENT}."
        )
    elif not 0 <= process < processes:
        raise InputError(f"This is process {process} of {processes}: number them 0 to processes - 1.")
    else:
        found = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    try:
        jax.distributed.initialize(**found, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        mend = f"Start as many as there should be, and check that each can reach the coordinator, {coordinator}."
        if coordinator == FROM_ENVIRONMENT:
            mend = "Start them by a scheduler that JAX knows (SLURM, Open MPI), or give coordinator host:port."
        raise InputError(f"The processes of this run do not find each other ({reason}). {mend}") from error
    if are_several():
        _watch()
    if not is_first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what C++ says there is not wanted either
        warnings.simplefilter("ignore")


def are_several() -> bool:
    """Whether this process shares its run with others. Until they are joined this looks for no devices."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process speaks and writes files."""
    return not are_several() or jax.process_index() == 0


def number() -> str:
    """What to call this process by: "process 2 of 4", or nothing where it is the only one."""
    return f"process {jax.process_index()} of {jax.process_count()}" if are_several() else ""


def on_first(fn: Callable[[], Any]) -> None:
    """Calls `fn` in the first process. Where it fails, so does every process; all have to call this.

    Raises:
        InputError: `fn` did.
        OSError: `fn` did, in the first process; in the others it is an InputError.
    """
    if not are_several():
        return fn()
    failure: Exception | None = None
    if is_first():
        try:
            fn()
        except (InputError, OSError) as error:
            failure = error
    said = str(failure or "").encode()[:MESSAGE].ljust(MESSAGE, b"\0")
    heard = bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(said, np.uint8))).rstrip(b"\0")
    if heard:
        raise failure or InputError(heard.decode(errors="replace"))


def anywhere(flag: bool) -> Any:
    """Whether it is true in any process: a bool, or an array of one on the device, of the same value in all.

    All have to call this. Reading the array waits for the device.
    """
    if not are_several():
        return flag
    mesh = make_mesh(jax.devices())
    return _any(mesh)(join_rows(np.full(jax.local_device_count(), flag), mesh))


def total(count: int) -> int:
    """The sum of a number over the processes, on the host. All have to call this."""
    return int(np.sum(multihost_utils.process_allgather(np.int32(count))))


def agreed(event: threading.Event) -> Callable[[], bool]:
    """A function that says whether an event has happened in any process, to be called once a step, by all.

    What it says is the same in each, and of the step before, so that none waits for the device; of a process by itself
    it is what the event says now.
    """
    if not are_several():
        return event.is_set
    before: Any = False

    def ask() -> bool:
        nonlocal before
        said, before = before, anywhere(event.is_set())
        return bool(said)

    return ask


def wait_for_all(name: str) -> None:
    """Waits until every process has come to the point of that name."""
    if are_several():
        multihost_utils.sync_global_devices(name)


def leave(code: int) -> None:
    """Tells the others, before this process exits with a code, that it goes on purpose; after 0 all leave together."""
    sys.stderr.flush()
    if not are_several():
        return
    if code == 0:
        wait_for_all("the end")
    if _watcher is not None and _watcher.stdin is not None:
        _watcher.stdin.write(b".")
        _watcher.stdin.close()


@functools.cache
def _any(mesh: Mesh) -> Callable[[Array], Array]:
    return pmapped(jnp.any, mesh, (0,), None)


def _watch() -> None:
    """Has another process say in words what happened, should this one be ended from without Python.

    That is how JAX's runtime ends a process when it has lost another one of the run.
    """
    global _watcher
    message = (
        f"error: {number()} was ended: it was killed, or it has lost another one, as JAX says above. The checkpoints "
        "are whole: start all processes again, with --resume.\n"
    )
    command = [sys.executable, "-I", "-S", "-c", WATCH, message]
    _watcher = subprocess.Popen(command, stdin=subprocess.PIPE)
