"""Every metric of every step: a row of metrics.jsonl, and the same in TensorBoard's event files and a tracker."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

import jax

from rl_jax.run.processes import is_first
from rl_jax.run.tracking import Tracked, Tracker, track

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "rl_jax")
SYNC_EVERY = 50  # steps after which what TensorBoard reads is sure to be on disk


class MetricsWriter(NamedTuple):
    """Open files of a run's metrics, in its folder; without events it writes nothing."""

    folder: Path
    rows: TextIO
    events: "EventsWriter | None"
    tracked: Tracked | None = None

    def write(self, stage: str, step: int, metrics: Mapping[str, float | None]) -> None:
        """Writes one row, and flushes it: a killed run loses none. NaN, infinities and None become null.

        Of several processes the first alone does.

        Raises:
            OSError: a file cannot be written; it is named.
        """
        if self.events is None:
            return
        from tensorboardX.proto.event_pb2 import Event  # pyrefly: ignore[missing-module-attribute]
        from tensorboardX.summary import Summary

        known = {name: float(value) for name, value in metrics.items() if value is not None}
        finite = {name: known[name] if math.isfinite(known.get(name, math.nan)) else None for name in metrics}
        with _naming(self.folder / "metrics.jsonl"):
            self.rows.write(json.dumps({"stage": stage, "step": step, **finite}) + "\n")
            self.rows.flush()
        with _naming(self.folder / "tensorboard"):
            values = [Summary.Value(tag=f"{stage}/{name}", simple_value=value) for name, value in known.items()]
            self.events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            if step % SYNC_EVERY == 0:
                self.events.flush()
        if self.tracked is not None:
            self.tracked.write(stage, step, known)

    def keep(self, name: str, rows: Iterable[Mapping[str, str]]) -> Path:
        """Writes rows to a .jsonl of that name in the folder, and returns its path; each process has its own."""
        path = self.folder / f"{name}{'' if is_first() else f'_process_{jax.process_index()}'}.jsonl"
        with _naming(path):
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return path

    def close(self) -> None:
        """Writes what is buffered."""
        with _naming(self.folder / "metrics.jsonl"):
            self.rows.close()
        with _naming(self.folder / "tensorboard"):
            if self.events is not None:
                self.events.close()
        if self.tracked is not None:
            self.tracked.close()


def open_metrics(folder: str | Path, tracker: Tracker | None = None) -> MetricsWriter:
    """Opens `folder`/metrics.jsonl and `folder`/tensorboard to append to them, and the run's place in a tracker.

    A resumed run may write the row of a step again; readers take the later one.
    """
    from tensorboardX.event_file_writer import EventsWriter

    folder = Path(folder)
    if not is_first():
        return MetricsWriter(folder, open(os.devnull, "w"), None)
    path = folder / "metrics.jsonl"
    if path.exists():  # a killed run may have left half a row, which its resumption writes again
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    (folder / "tensorboard").mkdir(exist_ok=True)
    events = EventsWriter(str(folder / "tensorboard" / "events"))
    tracked = None if tracker is None else track(tracker, folder)
    return MetricsWriter(folder, path.open("a", encoding="utf-8"), events, tracked)


@contextlib.contextmanager
def _naming(path: Path) -> Generator[None]:
    """Within the context, an OSError names the path."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def describe_device() -> str:
    """What the run computes on, such as "gpu x 8 (NVIDIA H100 80GB HBM3)" or "cpu x 1 (AMD EPYC 7B13, 2 cores)"."""
    device = jax.devices()[0]
    kind = f"{_processor()}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return f"{device.platform} x {jax.device_count()} ({kind})"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose arithmetic a result depends on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
