"""Peak memory of an RL step against vocabulary, length and batch: of the compiled program, and of the process.

As a program it is a contender that compiles an RL step, and whose job runs it; every size has a process of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.race import Contender, own_python, run_once, start, stop

BASE = {"vocab_size": 4096, "prompts": 8, "length": 64}
AXES = {
    "vocab_size": (4096, 16384, 50257),
    "length": (64, 128, 256, 512),
    "prompts": (4, 8, 16, 32),
}
WIDTH = {"layers": 2, "width": 128, "heads": 2}


def sizes() -> list[dict[str, int]]:
    """Every size that is measured: one number at a time differs from the base."""
    along = [BASE | {axis: value} for axis, values in AXES.items() for value in values]
    return [size for number, size in enumerate(along) if size not in along[:number]]


def measure_memory(say: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """A row for each size: MiB of the program (arguments, results, temporaries) and of the process at its highest."""
    rows = []
    for size in sizes():
        contender = Contender("memory", own_python(), "memory.py", {"task": "memory", **size})
        worker = start(contender)
        about = run_once(worker).about
        stop(worker)
        rows.append(size | dict(about))
        say(f"{size}: program {about['program_mib']:.0f} MiB, process {about['peak_mib']:.0f} MiB")
    return rows


def memory(vocab_size: int, prompts: int, length: int) -> Callable[[], Mapping[str, Any]]:
    """Compiles an RL step of that size; the job runs it."""
    import jax
    import numpy as np

    from benchmarks import ours

    size, work = ours.shape_of("A", WIDTH | {"vocab_size": vocab_size}), {"prompts": prompts, "length": length}
    work, mesh = ours.work_of("A", spread=False, changes=work), ours.make_mesh()
    config = ours.model_config(size, "gpt2", "float32")
    params = ours.random_params(config)
    mapped, make_state = ours.make_rl_step(config, work, "rloo", mesh)
    state, ref_params = make_state(params), ours.put(params, mesh)
    inputs = (
        ours.put(part, mesh, axis) for part, axis in zip(ours.step_inputs(size, work, 0), (None, 0, 0), strict=True)
    )
    inputs = tuple(inputs)
    compiled = mapped.lower(state, ref_params, *inputs).compile()
    analysis = compiled.memory_analysis()
    weights = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    parts = {
        "arguments_mib": analysis.argument_size_in_bytes,
        "results_mib": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries_mib": analysis.temp_size_in_bytes,
    }
    about = {name: size / 2**20 for name, size in parts.items()}
    about |= {"program_mib": sum(about.values()), "weights_mib": 4 * weights / 2**20}

    def job() -> Mapping[str, Any]:
        nonlocal state
        state, _, _ = jax.block_until_ready(compiled(state, ref_params, *inputs))
        return about

    return job


if __name__ == "__main__":
    from benchmarks.worker import serve

    serve({"memory": memory})
