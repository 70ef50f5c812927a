"""A run's metrics in an experiment tracker, Weights & Biases or trackio, beside the files that hold them in any case.

The tracker has a thread of its own: no step waits for it. What goes wrong there is warned of, and the run goes on.
"""

import atexit
import contextlib
import importlib
import json
import os
import queue
import secrets
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rl_jax.errors import InputError
from rl_jax.run.processes import on_first

Tracker = Literal["wandb", "trackio"]
Row = tuple[str, int, Mapping[str, float]]
"""Stage, step and metrics."""

PLACE = "tracked.json"  # in a run's folder: what each tracker calls the run, for one that is resumed
PROJECT = "rl_jax"  # where WANDB_PROJECT or TRACKIO_PROJECT names no other
WAITING = 10_000  # rows that wait for the tracker at most
PATIENCE = 30.0  # seconds that the end of a run waits for it
WANDB = {"WANDB_CONSOLE": "off", "WANDB_FINISH_TIMEOUT": "20"}  # unless set: it leaves terminal and end alone


class Tracked(NamedTuple):
    """A run in a tracker: the rows that wait for it, None behind the last, and the thread that hands them over."""

    rows: "queue.Queue[Row | None]"
    thread: threading.Thread

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Leaves a row for the tracker, at once; without effect where that has failed."""
        if self.thread.is_alive():
            try:
                self.rows.put_nowait((stage, step, metrics))
            except queue.Full:
                warnings.warn(f"{self.thread.name} cannot keep up, and goes without some of the metrics.", stacklevel=2)

    def close(self) -> None:
        """Waits until the tracker has every row and has ended the run, but no longer than half a minute."""
        with contextlib.suppress(queue.Full):
            self.rows.put(None, timeout=PATIENCE)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            warnings.warn(f"{self.thread.name} has not taken all metrics in {PATIENCE:.0f} seconds.", stacklevel=2)


def check_tracker(tracker: Tracker | None) -> None:
    """Checks that the tracker can be used, and logs in to W&B, unless WANDB_MODE is set. All processes have to call it.

    Raises:
        InputError: its package is not installed, or nobody is logged in.
    """

    def check() -> None:
        if tracker is None:
            return
        try:
            module = _import(tracker)
        except ImportError as error:
            raise InputError(f"{error}: pip install {tracker}, or leave out track.") from error
        if tracker == "wandb" and "WANDB_MODE" not in os.environ:
            try:
                module.login(verify=False)  # which would take a network
            except module.Error as error:
                raise InputError(f"wandb: {error} Or set WANDB_MODE=offline, or leave out track.") from error

    on_first(check)


def track(tracker: Tracker, folder: Path) -> Tracked:
    """Begins to track the run of a folder, under the folder's name and with the settings in its config.json.

    A resumed run goes on in the tracked run that it began.
    """
    rows: queue.Queue[Row | None] = queue.Queue(WAITING)
    thread = threading.Thread(target=_feed, args=(tracker, folder, rows), name=tracker, daemon=True)
    thread.start()
    return Tracked(rows, thread)


class _Run(NamedTuple):
    """A run as its tracker has it."""

    id: str
    log: Callable[[str, int, dict[str, float]], None]
    finish: Callable[[], None]


def _feed(tracker: Tracker, folder: Path, rows: "queue.Queue[Row | None]") -> None:
    """Hands rows to the tracker until None comes; ends at the first that goes wrong."""
    try:
        run = _open(tracker, folder)
        atexit.register(Tracked(rows, threading.current_thread()).close)  # called before what the tracker registered
        while (row := rows.get()) is not None:
            stage, step, metrics = row
            run.log(stage, step, {f"{stage}/{name}": value for name, value in metrics.items()})
        run.finish()
    except Exception as error:  # whatever it is, it must not reach the run
        why = f"{type(error).__name__}: {error}".strip(": ")
        warnings.warn(f"{tracker} has failed ({why}). The run goes on, and {folder} has its metrics.", stacklevel=2)


def _import(tracker: Tracker) -> Any:
    if tracker == "wandb":
        for name, value in WANDB.items():
            os.environ.setdefault(name, value)
    return importlib.import_module(tracker)


def _open(tracker: Tracker, folder: Path) -> _Run:
    """Begins the run in the tracker, or goes on with the one that the folder's run has there."""
    place, path = folder / PLACE, folder / "config.json"
    known = json.loads(place.read_text("utf-8")) if place.exists() else {}
    facts = json.loads(path.read_text("utf-8")) if path.exists() else {}
    settings = facts.pop("config", {})
    about = {
        "project": os.environ.get(f"{tracker.upper()}_PROJECT", PROJECT),
        "name": folder.resolve().name,
        "config": facts | settings,
    }
    begin = {"wandb": _open_wandb, "trackio": _open_trackio}[tracker]
    run = begin(_import(tracker), folder, about, known.get(tracker))
    place.write_text(json.dumps(known | {tracker: run.id}) + "\n", "utf-8")
    return run


def _open_wandb(wandb: Any, folder: Path, about: dict[str, Any], known: str | None) -> _Run:
    name = known or secrets.token_hex(4)
    run = wandb.init(**about, id=name, resume="allow", dir=str(folder), reinit="create_new")
    stages: set[str] = set()

    def log(stage: str, step: int, metrics: dict[str, float]) -> None:
        if stage not in stages:  # W&B's own step may only grow, and that of each stage begins at 0
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            stages.add(stage)
        run.log(metrics | {f"{stage}/step": step})

    return _Run(run.id, log, run.finish)


def _open_trackio(trackio: Any, folder: Path, about: dict[str, Any], known: str | None) -> _Run:
    run = trackio.init(**about, resume="never" if known is None else "allow")
    return _Run(run.name, lambda stage, step, metrics: run.log(metrics, step), run.finish)
