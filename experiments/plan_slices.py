"""Which model trains on which slice of TPUs: the table of docs/plan.md, made without one of them.

    build/tpu/bin/python experiments/plan_slices.py --folder results/slices

plans the three programs of each case below with `experiments/plan.py` and joins their rows. Of the largest models a few
layers are compiled, and twice as many, and the line through them extended. What is in the folder already is not
compiled again, so that the command can be stopped; a whole table takes hours on a few cores.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments import plan
from rl_jax.errors import InputError
from rl_jax.run.folder import jsonable, write_json
from rl_jax.run.loop import run_main
from rl_jax.run.tables import open_results, write_table

# Topology, model, mesh. Blocks are recomputed.
CASES = (
    ("v5e:2x4", "135M", "data=8"),
    ("v5e:2x4", "1B", "fsdp=8"),
    ("v6e:2x4", "1B", "fsdp=8"),
    ("v5e:8x8", "8B", "fsdp=16,tensor=4"),
    ("v5p:2x2x4", "8B", "fsdp=16"),
    ("v6e:4x8", "8B", "fsdp=32"),
    ("v5p:4x4x4", "70B", "fsdp=64"),
    ("v5e:16x16", "70B", "fsdp=64,tensor=4"),
)
LAYERS = {"8B": 2, "70B": 2}  # compiled, and twice as many; of other models all
SHOWN = (
    *("slice", "chips", "model", "mesh", "program", "layers compiled", "needed, GiB", "of, GiB", "fits"),
    *("bound by", "tokens/s a chip at most", "would fit with"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Plan the common models for the common slices of TPUs."""

    only: tuple[str, ...] = ()
    """Models, or topologies, to plan for; none for all."""
    programs: tuple[str, ...] = plan.PROGRAMS
    """Which of pretraining, rollout and update."""
    seconds: float = 0
    """Begin no program after so many seconds, but join those that are there; 0 for no end."""
    folder: Path = Path("results/slices")
    """Folder that is written to."""


def case_configs(only: tuple[str, ...]) -> Iterator[plan.Config]:
    """The settings of each case that is asked for."""
    for topology, model, mesh in CASES:
        if not only or model in only or topology in only:
            yield plan.Config(topology, model, mesh, remat=True, layers_compiled=LAYERS.get(model, 0))


def kept_row(path: Path, settings: Any) -> dict[str, Any] | None:
    """A program's row as the folder has it, if it is of the same settings."""
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return kept["row"] if kept.get("settings") == settings else None


def new_row(name: str, config: plan.Config, say: Callable[[str], None]) -> dict[str, Any]:
    """A program's row, by chip."""
    devices = plan.choose_devices(config.topology)
    row, _ = plan.plan_row(name, config, devices, say)
    about = {"slice": config.topology, "chips": len(devices), "model": config.model, "mesh": config.mesh} | row
    if "tokens/s at most" in row:
        about |= {"tokens/s a chip at most": round(row["tokens/s at most"] / len(devices))}
    return about


def main(config: Config) -> None:
    configs = list(case_configs(config.only))
    if not configs:
        cases = ", ".join(dict.fromkeys(name for case in CASES for name in case[:2]))
        raise InputError(f"No case is of {', '.join(config.only)}: take some of {cases}.")
    folder, start, rows = open_results(config.folder), time.perf_counter(), []
    for case, name in itertools.product(configs, config.programs):
        path = folder / f"{case.topology}_{case.model}_{case.mesh}_{name}.json".replace(":", "-")
        settings = jsonable(case)
        row = kept_row(path, settings)
        if row is None and config.seconds and time.perf_counter() - start > config.seconds:
            continue
        if row is None:
            row = new_row(
                name, case, lambda text, case=case: print(f"{case.topology}, {case.model}, {text}", flush=True)
            )
            write_json(path, {"settings": settings, "row": row})
        rows.append({name: row[name] for name in SHOWN if name in row})
    if rows:
        write_table(folder, rows, config)


if __name__ == "__main__":
    run_main(main, Config)
