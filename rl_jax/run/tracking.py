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
LogFn = Callable[[str, int, dict[str, float]], None]

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


def _feed(tracker: Tracker, folder: Path, rows: "queue.Queue[Row | None]") -> None:
    """Hands rows to the tracker until None comes; ends at the first that goes wrong."""
    try:
        log, finish = _open(tracker, folder)
        atexit.register(Tracked(rows, threading.current_thread()).close)  # called before what the tracker registered
        while (row := rows.get()) is not None:
            stage, step, metrics = row
            log(stage, step, {f"{stage}/{name}": value for name, value in metrics.items()})
        finish()
    except Exception as error:  # whatever it is, it must not reach the run
        why = f"{type(error).__name__}: {error}".strip(": ")
        warnings.warn(f"{tracker} has failed ({why}). The run goes on, and {folder} has its metrics.", stacklevel=2)


def _import(tracker: Tracker) -> Any:
    if tracker == "wandb":
        for name, value in WANDB.items():
            os.environ.setdefault(name, value)
    return importlib.import_module(tracker)


def _open(tracker: Tracker, folder: Path) -> tuple[LogFn, Callable[[], None]]:
    """Begins the run in the tracker, or goes on with the one that it has there. Returns how to log, and how to end."""
    place, path = folder / PLACE, folder / "config.json"
    known = json.loads(place.read_text("utf-8")) if place.exists() else {}
    facts = json.loads(path.read_text("utf-8")) if path.exists() else {}
    settings = facts.pop("config", {})
    about = {
        "project": os.environ.get(f"{tracker.upper()}_PROJECT", PROJECT),
        "name": folder.resolve().name,
        "config": facts | settings,
    }
    module = _import(tracker)
    if tracker == "wandb":
        name = known.get(tracker) or secrets.token_hex(4)
        run = module.init(**about, id=name, resume="allow", dir=str(folder), reinit="create_new")
        log = _wandb_log(run)
    else:
        run = module.init(**about, resume="allow" if tracker in known else "never")
        name, log = run.name, lambda stage, step, metrics: run.log(metrics, step)
    place.write_text(json.dumps(known | {tracker: name}) + "\n", "utf-8")
    return log, run.finish


def _wandb_log(run: Any) -> LogFn:
    stages: set[str] = set()

    def log(stage: str, step: int, metrics: dict[str, float]) -> None:
        if stage not in stages:  # W&B's own step may only grow, and that of each stage begins at 0
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            stages.add(stage)
        run.log(metrics | {f"{stage}/step": step})

    return log
