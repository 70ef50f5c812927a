"""Side by side with what people would pick instead, and with the machine's limit.

    python benchmarks/run.py                                  # everything, about 40 minutes on two cores
    python benchmarks/run.py --quick                          # under three minutes
    python benchmarks/run.py --only rl_step.A startup         # parts by the beginning of their names

Writes table.json, table.md, settings.json and figures; each part's measurements are kept in the folder `parts`, so that
a part measured anew joins the others. The parts: generation, rl_step and pretraining, each with a shape and a peer or a
dtype; startup; memory; growth along the batch, the length and the model; devices. A peer that is not installed
(`make bench-peers`) is left out.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import growth, limit, memory, report, startup  # noqa: E402
from benchmarks.race import ContenderFailed, Worker, run_once, run_rounds, start, stop, summary  # noqa: E402
from benchmarks.races import OURS, QUICK, RACES, Race, contenders, limit_contenders, limit_parts  # noqa: E402
from rl_jax.errors import InputError  # noqa: E402
from rl_jax.run.folder import write_json  # noqa: E402
from rl_jax.run.loop import run_main  # noqa: E402
from rl_jax.run.metrics import describe_device, versions  # noqa: E402
from rl_jax.run.tables import open_results, write_table  # noqa: E402

OTHERS = ("startup", "memory", *(f"growth.{axis}" for axis in growth.AXES), "devices")


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure rl_jax beside its peers and the machine's limit."""

    quick: bool = False
    """Shape A alone: generation, an RL step against TRL's RLOO, pretraining, and their limits."""
    only: tuple[str, ...] = ()
    """Parts to measure, by the beginning of their names, such as generation or rl_step.A; all when empty."""
    rounds: int = 5
    """Rounds of each race that are to count; up to twice as many are run where others use the machine."""
    out: Path | None = None
    """Folder of the results: results/benchmarks, or runs/benchmarks_quick for the quick form."""
    torch_python: Path = ROOT / "build/peers/torch/bin/python"
    """Python of the environment with torch, transformers and TRL."""
    tunix_python: Path = ROOT / "build/peers/tunix/bin/python"
    """Python of the environment with Tunix."""


def chosen(config: Config) -> list[str]:
    """Names of the parts to measure, in order."""
    names = list(QUICK) if config.quick else [*RACES, *OTHERS]
    picked = [name for name in names if not config.only or name.startswith(config.only)]
    for prefix in config.only:
        if not any(name.startswith(prefix) for name in names):
            raise InputError(f"No part's name begins with {prefix!r}; there are {', '.join(names)}.")
    return picked


def run_race(race: Race, config: Config, say: Callable[[str], None]) -> dict[str, Any]:
    """A race, and the limit of its work where it has one; who cannot start is left out, with the reason."""
    pythons = {"peer_torch.py": config.torch_python, "peer_tunix.py": config.tunix_python}
    workers: dict[str, Worker] = {}
    left_out: dict[str, str] = {}
    try:
        for contender in contenders(race, pythons):
            if not Path(contender.python).exists():
                left_out[contender.name] = "not installed; `make bench-peers` does"
                say(f"{contender.name} is left out: {contender.python} does not exist; `make bench-peers` makes it.")
                continue
            try:
                workers[contender.name] = start(contender)
                say(f"{contender.name} is ready, {workers[contender.name].prepared['prepared']:.0f} s")
            except ContenderFailed as error:
                if contender.name == OURS:
                    raise InputError(f"rl_jax's own part failed: {error}") from error
                left_out[contender.name] = str(error)
                say(f"{contender.name} is left out: {error}")
        pairs = [(OURS, name) for name in workers if name != OURS] or [(OURS, OURS)]
        rounds = run_rounds(workers, config.rounds, pairs, say)
    finally:
        for worker in workers.values():
            stop(worker)
    found = {"what": race.what, "runs": summary(rounds), "left_out": left_out}
    return found | (measure_limit(race, pythons, say) if race.limit else {})


def measure_limit(race: Race, pythons: Mapping[str, Path], say: Callable[[str], None]) -> dict[str, Any]:
    """The limit of a race's work, from the better of JAX and, if it is there, PyTorch."""
    answers = {}
    for contender in limit_contenders(race, pythons):
        if Path(contender.python).exists():
            worker = start(contender)
            answers[contender.name] = run_once(worker).about
            stop(worker)
    rates, bandwidth = limit.best_rates(list(answers.values()))
    floor = limit.floor(limit_parts(race), rates, bandwidth)
    say(f"the limit: {floor['total']:.3f} s, at {bandwidth / 1e9:.0f} GB/s")
    measured = [[*gemm, rate / 1e9] for gemm, rate in sorted(rates.items())]
    return {"floor": floor, "gflops": measured, "bandwidth": bandwidth, "measured_by": list(answers)}


def measure(name: str, config: Config, say: Callable[[str], None]) -> Any:
    """What a part finds, as JSON has it."""
    if name in RACES:
        return run_race((QUICK if config.quick else RACES)[name], config, say)
    few = max(1, min(3, config.rounds))
    parts: dict[str, Callable[[], Any]] = {
        "startup": lambda: startup.measure_startup("A", few, say),
        "memory": lambda: memory.measure_memory(say),
        **{f"growth.{axis}": partial(growth.measure_growth, axis, few, say) for axis in growth.AXES},
        "devices": lambda: growth.measure_devices(say),
    }
    return parts[name]()


def write_report(folder: Path, config: Config) -> None:
    """Tables and figures of every part that the folder holds."""
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in (folder / "parts").glob("*.json")}
    parts = {name: found[name] for name in (*RACES, *OTHERS) if name in found}
    settings = dataclasses.asdict(config) | {"cores": os.cpu_count()}
    settings |= {"parts": {name: part["settings"] for name, part in parts.items()}}
    data = {name: part["found"] for name, part in parts.items()}
    grown = [row for axis in growth.AXES for row in data.get(f"growth.{axis}", ())]
    tables = {"memory": data.get("memory"), "growth": grown, "devices": data.get("devices")}
    for name, table in tables.items():
        if table:
            about = {part: text for part, text in settings["parts"].items() if part.split(".")[0] == name}
            write_table(folder / name, table, about)
    rows = [row for name in RACES if name in data for row in report.race_rows(name, data[name])]
    rows += report.startup_rows(data["startup"]) if "startup" in data else []
    report.draw_ratios(folder / "ratios.png", rows)
    if grown:
        report.draw_growth(folder / "growth.png", grown)
    if "memory" in data:
        report.draw_memory(folder / "memory.png", data["memory"], memory.AXES, memory.BASE)
    if rows:
        write_table(folder, rows, settings)


def main(config: Config) -> None:
    if config.rounds < 1:
        raise InputError(f"rounds is {config.rounds}; it must be at least 1.")
    config = dataclasses.replace(config, rounds=min(config.rounds, 4)) if config.quick else config
    names = chosen(config)
    folder = open_results(config.out or ROOT / ("runs/benchmarks_quick" if config.quick else "results/benchmarks"))
    open_results(folder / "parts")
    begun = time.perf_counter()
    try:
        for number, name in enumerate(names, 1):

            def say(text: str, head: str = f"[{number}/{len(names)}] {name}: ") -> None:
                print(f"{(time.perf_counter() - begun) / 60:5.1f} min {head}{text}", flush=True)

            part_begun = time.perf_counter()
            found = measure(name, config, say)
            settings = {"rounds": config.rounds, "quick": config.quick, "seconds": time.perf_counter() - part_begun}
            settings |= {"device": describe_device(), "versions": versions()}
            write_json(folder / "parts" / f"{name}.json", {"settings": settings, "found": found})
    finally:  # what was measured is told, also where the rest was stopped
        write_report(folder, config)


if __name__ == "__main__":
    run_main(main, Config)
