"""Growth: tokens a second against batch, length and size of the model, and the collectives that more devices need.

As a program it is a contender that compiles an RL step for the devices that there are, and counts the collectives in
the compiled program; devices of one machine share its cores, so that their speed would say nothing.
"""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.race import Contender, kept_pairs, own_python, run_once, run_rounds, start, stop
from benchmarks.work import SHAPES

OURS = "rl_jax"
AXES = ("batch", "length", "model")
GROUP = 4
BASE = {"prompts": 8, "length": 64}  # 32 completions
BATCHES, LENGTHS = (8, 16, 32, 64, 128, 256), (32, 64, 128, 256)
MODELS = {"2 x 128": {"layers": 2, "width": 128, "heads": 2}, "A, 4 x 256": {}, "B, 6 x 384": vars(SHAPES["B"])}
DEVICES = (1, 2, 4, 8)
NUMBER_BYTES = {
    "pred": 1,
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
    "u8": 1,
    "s8": 1,
}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"


def cases(axis: str) -> list[tuple[str, dict[str, Any]]]:
    """Along "batch", "length" or "model": the value as the table has it, and how the case differs from shape A's."""
    if axis == "batch":
        return [(str(batch), {"work_changes": BASE | {"prompts": batch // GROUP}}) for batch in BATCHES]
    if axis == "length":
        return [(str(length), {"work_changes": BASE | {"length": length}}) for length in LENGTHS]
    return [(name, {"work_changes": BASE, "shape_changes": dict(changes)}) for name, changes in MODELS.items()]


def measure_growth(axis: str, rounds: int, say: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """A row for each case of generation and of the RL step: median seconds of the runs that count, tokens a second."""
    rows = []
    for task, others in (("generate", {}), ("rl_step", {"algorithm": "rloo"})):
        for value, changes in cases(axis):
            worker = start(Contender(OURS, own_python(), "ours.py", {"task": task, "shape": "A", **others, **changes}))
            runs = run_rounds({OURS: worker}, rounds, [(OURS, OURS)])
            stop(worker)
            kept = [run for run, _ in kept_pairs(runs, OURS, OURS)]
            seconds = statistics.median(run.seconds for run in kept) if kept else None
            speed = runs[0][OURS].about["tokens"] / seconds if seconds else None
            row = {"task": task, "varied": axis, "value": value, "seconds": seconds, "tokens/s": speed}
            rows.append(row | {"runs": len(kept), "spoilt": len(runs) - len(kept)})
            say(f"{task}, {value}: " + (f"{speed:,.0f} tokens/s" if speed else "every run was spoilt"))
    return rows


def measure_devices(say: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """A row for each number of devices: collectives of the compiled RL step, and the bytes that they result in."""
    rows = []
    for devices in DEVICES:
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        worker = start(Contender(OURS, own_python(), "growth.py", {"task": "collectives", "shape": "A"}, flags))
        about = run_once(worker).about
        stop(worker)
        rows.append({"devices": about["devices"]} | about["collectives"] | {"MiB": about["bytes"] / 2**20})
        rows[-1] |= {"in loops": about["in_loops"], "gradient, MiB": about["gradient_bytes"] / 2**20}
        say(f"{devices} devices: {about['collectives'] or 'no collectives'}, {about['bytes'] / 2**20:.1f} MiB")
    return rows


def count_collectives(program: str) -> tuple[dict[str, int], int, int]:
    """Collectives in a compiled program's text, by kind; bytes of their results; how many stand outside its entry.

    One inside a loop counts once. `start` and `done` of an asynchronous one count together.
    """
    counts: dict[str, int] = {}
    total = outside = 0
    entry = False
    for line in program.splitlines():
        if line and not line.startswith((" ", "}")):
            entry = line.startswith("ENTRY")
        found = re.search(rf"= (\(.*?\)|\S+) ({COLLECTIVES})(?:-start)?\(", line)
        if found:
            counts[found[2]] = counts.get(found[2], 0) + 1
            total += result_bytes(found[1])
            outside += not entry
    return counts, total, outside


def result_bytes(shapes: str) -> int:
    """Bytes of a result as HLO writes it, such as "f32[64,256]{1,0}" or a tuple of these."""
    found: Sequence[tuple[str, str]] = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    return sum(NUMBER_BYTES[kind] * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in found)


def collectives(shape: str) -> Callable[[], Mapping[str, Any]]:
    """Compiles an RL step for the devices there are; the job reports what it holds."""
    import jax
    import numpy as np

    from benchmarks import ours

    size, work, mesh = ours.shape_of(shape), ours.work_of(shape, spread=False), ours.make_mesh()
    config = ours.model_config(size, "gpt2", "float32")
    params = ours.random_params(config)
    mapped, make_state = ours.make_rl_step(config, work, "rloo", mesh)
    lowered = mapped.lower(make_state(params), params, *ours.step_inputs(size, work, 0))
    counts, total, outside = count_collectives(lowered.compile().as_text())
    gradient = 4 * sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    about = {"devices": jax.device_count(), "collectives": counts, "bytes": total, "in_loops": outside}
    return lambda: about | {"gradient_bytes": gradient}


if __name__ == "__main__":
    from benchmarks.worker import serve

    serve({"collectives": collectives})
