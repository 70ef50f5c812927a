"""The end of a run: what came out, on disk and in words."""

import contextlib
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rl_jax.run.folder import write_json
from rl_jax.run.loop import Interrupted, RewardFailed, RunFailed
from rl_jax.run.parting import parting_warning
from rl_jax.run.processes import is_first
from rl_jax.run.report import headline, write_report
from rl_jax.run.run_files import read_run


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Generator[None]:
    """Adds the time that the context takes to `seconds` under the name of the stage."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


@contextlib.contextmanager
def report_if_stopped(folder: Path) -> Generator[None]:
    """Writes the report of what there is when the run within the context is stopped or fails."""
    try:
        yield
    except (Interrupted, RewardFailed, RunFailed):
        if is_first():
            write_report(folder)
        raise


def write_results(folder: Path, summary: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]] = ()) -> None:
    """Writes summary.json, completions.json where there are pairs, and the report; prints what came out, and where."""
    if not is_first():
        return
    write_json(folder / "summary.json", summary)
    if pairs:
        write_json(folder / "completions.json", {"pairs": pairs})
    report = write_report(folder)
    run = read_run(folder)
    warning = parting_warning(run.metrics)
    told = headline(run.summary, run.metrics) + (f"\nWarning. {warning}" if warning else "")
    print(f"\n{told}\nThe report is {report}; everything else is in {folder}.")
