"""Every metric of every step: a row of metrics.jsonl, and the same in TensorBoard's event files."""

import importlib.metadata
import json
import logging
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

import jax

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "rl_jax")


class MetricsWriter(NamedTuple):
    """Open files of a run's metrics."""

    rows: TextIO
    events: "SummaryWriter"

    def write(self, stage: str, step: int, metrics: Mapping[str, float | None]) -> None:
        """Writes one row, and flushes it: a killed run loses none. NaN, infinities and None become null."""
        known = {name: float(value) for name, value in metrics.items() if value is not None}
        finite = {name: known[name] if math.isfinite(known.get(name, math.nan)) else None for name in metrics}
        self.rows.write(json.dumps({"stage": stage, "step": step, **finite}) + "\n")
        self.rows.flush()
        for name, value in known.items():
            self.events.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        """Writes what is buffered."""
        self.rows.close()
        self.events.close()


def open_metrics(folder: str | Path) -> MetricsWriter:
    """Opens `folder`/metrics.jsonl and `folder`/tensorboard to append to them.

    A resumed run may write the row of a step again; readers take the later one.
    """
    from tensorboardX import SummaryWriter

    logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # it would warn of each NaN
    path = Path(folder) / "metrics.jsonl"
    _drop_half_written_row(path)
    return MetricsWriter(path.open("a", encoding="utf-8"), SummaryWriter(str(Path(folder) / "tensorboard")))


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


def _drop_half_written_row(path: Path) -> None:
    """Cuts a last line without its newline, which a killed run left, and which its resumption writes again."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
