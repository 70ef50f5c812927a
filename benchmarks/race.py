"""Contenders against each other: interleaved rounds, with what other processes used told apart, and ratios of pairs."""

import dataclasses
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).parents[1]
LOAD_LIMIT = 0.05  # share of the machine's processor time that others may have used in a run that counts
PATIENCE = 600.0  # seconds that a contender may take for anything
TICKS = os.sysconf("SC_CLK_TCK")


class ContenderFailed(Exception):
    """A contender ended, or did not answer in time. The message holds the end of what it said."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """Who runs, and what.

    Attributes:
        name: as the table calls it.
        python: the interpreter.
        script: in `benchmarks/`, a program that `worker.serve` runs.
        case: the task and its arguments.
        environment: variables beside those of this process.
    """

    name: str
    python: str
    script: str
    case: Mapping[str, Any]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Worker(NamedTuple):
    """A contender that is ready: its process, what it said when it was, and the file that its messages go to."""

    process: subprocess.Popen
    prepared: Mapping[str, Any]
    messages: IO[str]


class Run(NamedTuple):
    """One run of a contender's job.

    Attributes:
        seconds: by its own clock.
        load: share of the machine's processor time that other processes used meanwhile.
        about: what the job said.
    """

    seconds: float
    load: float
    about: Mapping[str, Any]


Round = Mapping[str, Run]
"""A run of each contender, by name."""


class Comparison(NamedTuple):
    """Contenders `ours` and `peer` over the pairs that count.

    Attributes:
        ratio: median of the peer's seconds over ours, and its quartiles; None where no pair counts.
        extremes: the least and the greatest ratio.
        ours: median seconds.
        peer: median seconds.
        kept: pairs that count.
        spoilt: pairs left out, because others used the machine.
    """

    ratio: tuple[float, float, float] | None
    extremes: tuple[float, float] | None
    ours: float | None
    peer: float | None
    kept: int
    spoilt: int


def start(contender: Contender, patience: float = PATIENCE) -> Worker:
    """Starts a contender and waits until its job is prepared.

    Raises:
        ContenderFailed: it ended before, or took too long.
    """
    messages = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, closed by `stop`
    process = subprocess.Popen(
        [contender.python, str(ROOT / "benchmarks" / contender.script), json.dumps(contender.case)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=messages,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | contender.environment,
    )
    try:
        return Worker(process, _read(process, messages, patience), messages)
    except BaseException:
        process.kill()
        raise


def stop(worker: Worker) -> None:
    """Ends a contender and waits for it."""
    if worker.process.stdin:
        worker.process.stdin.close()
    try:
        worker.process.wait(5)
    except subprocess.TimeoutExpired:
        worker.process.kill()
        worker.process.wait()
    worker.messages.close()


def run_once(worker: Worker, patience: float = PATIENCE) -> Run:
    """Runs a contender's job once, and watches who else used the machine."""
    assert worker.process.stdin is not None
    machine, own, begun = busy_seconds(), process_seconds(worker.process.pid), time.perf_counter()
    try:
        worker.process.stdin.write("\n")
        worker.process.stdin.flush()
    except BrokenPipeError:  # reading says why
        pass
    about = dict(_read(worker.process, worker.messages, patience))
    wall = time.perf_counter() - begun
    used, by_it = busy_seconds() - machine, process_seconds(worker.process.pid) - own
    return Run(about.pop("seconds"), others_load(used, by_it, wall, os.cpu_count() or 1), about)


def run_rounds(
    workers: Mapping[str, Worker],
    rounds: int,
    pairs: Sequence[tuple[str, str]],
    say: Callable[[str], None] = lambda _: None,
) -> list[Round]:
    """Rounds in which every contender runs once, in turns of the order, until every pair has counted often enough.

    Args:
        workers: ready ones, by name.
        rounds: that are asked for; at most twice as many are run, to make up for spoilt pairs.
        pairs: of names, to be compared; a name with itself where one is measured alone.
        say: is told of the progress.
    """
    done: list[Round] = []
    names = list(workers)
    while len(done) < 2 * rounds and any(len(kept_pairs(done, *pair)) < rounds for pair in pairs):
        order = names if len(done) % 2 == 0 else names[::-1]
        runs = {name: run_once(workers[name]) for name in order}
        done.append({name: runs[name] for name in names})
        times = ", ".join(f"{name} {run.seconds:.3f} s" for name, run in done[-1].items())
        load = max(run.load for run in runs.values())
        say(f"round {len(done)}: {times}" + (f" (others used {load:.0%}: spoilt)" if load > LOAD_LIMIT else ""))
    return done


def kept_pairs(rounds: Sequence[Round], ours: str, peer: str) -> list[tuple[Run, Run]]:
    """Both runs of each round in which others used little of the machine."""
    pairs = [(done[ours], done[peer]) for done in rounds]
    return [pair for pair in pairs if max(run.load for run in pair) <= LOAD_LIMIT]


def compare(rounds: Sequence[Round], ours: str, peer: str) -> Comparison:
    """How many times as long the peer takes: the median over rounds of the ratio within one."""
    kept = kept_pairs(rounds, ours, peer)
    spoilt = len(rounds) - len(kept)
    if not kept:
        return Comparison(None, None, None, None, 0, spoilt)
    ratios = [theirs.seconds / own.seconds for own, theirs in kept]
    medians = (statistics.median(runs) for runs in zip(*((a.seconds, b.seconds) for a, b in kept), strict=True))
    return Comparison(spread(ratios), (min(ratios), max(ratios)), *medians, len(kept), spoilt)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the quartiles (of one value, itself three times)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def others_load(machine: float, own: float, wall: float, cores: int) -> float:
    """Share of the machine-seconds that others used: of `machine` busy seconds in `wall`, all but its `own`.

    The machine's clock ticks for each core, so that a tick a core may be nobody's.
    """
    return max(machine - own - cores / TICKS, 0.0) / (cores * wall)


def busy_seconds(line: str | None = None) -> float:
    """Processor time that the whole machine has spent at work, seconds; what a hypervisor took away counts as work.

    Args:
        line: the first one of /proc/stat.
    """
    line = line or Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS


def process_seconds(pid: int) -> float:
    """Processor time that a process with all its threads has used, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def summary(rounds: Sequence[Round]) -> dict[str, list[dict[str, Any]]]:
    """Every run of every contender, as JSON has it."""
    names = rounds[0] if rounds else ()
    return {
        name: [{"seconds": r.seconds, "load": r.load} | dict(r.about) for r in _runs(rounds, name)] for name in names
    }


def rounds_of(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Round]:
    """The rounds that `summary` was made of."""
    parsed = {
        name: [
            Run(run["seconds"], run["load"], {k: v for k, v in run.items() if k not in ("seconds", "load")})
            for run in of
        ]
        for name, of in runs.items()
    }
    return [dict(zip(parsed, together, strict=True)) for together in zip(*parsed.values(), strict=True)]


def _runs(rounds: Sequence[Round], name: str) -> list[Run]:
    return [done[name] for done in rounds]


def _read(process: subprocess.Popen, messages: IO[str], patience: float) -> Mapping[str, Any]:
    """The next answer of a contender."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], patience)
    line = process.stdout.readline() if ready else ""
    if line:
        return json.loads(line)
    process.kill()
    process.wait()
    messages.seek(0)
    last = [text for text in messages.read().splitlines() if text.strip()][-1:] or ["it said nothing"]
    raise ContenderFailed(last[0] if ready else f"no answer in {patience:.0f} s; its last message: {last[0]}")


def own_python() -> str:
    """The interpreter of rl_jax's environment."""
    return sys.executable
