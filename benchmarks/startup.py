"""Start-up: from a fresh process, imports and all, to the end of its first RL step, and what was compiled for it.

As a program it is a contender whose preparation is the first step and whose job is the next one; `measure_startup`
starts it several times, without JAX's persistent compilation cache and with a filled one.
"""

import collections
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.race import (
    LOAD_LIMIT,
    Contender,
    busy_seconds,
    others_load,
    own_python,
    process_seconds,
    run_once,
    start,
    stop,
)

COMPILED, FOUND = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"


def cache_environment(folder: str) -> dict[str, str]:
    """Variables with which JAX keeps every program that it compiles."""
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def measure_startup(shape: str, repeats: int, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """First steps of fresh processes, those that others disturbed left out and made up for, up to as many again.

    Returns:
        For "cold" and "cached": seconds of each start that counts, the spoilt ones' number, programs that the first
        step asked for (`programs`) and that were compiled for it (`compiled`), and those of the two steps after it.
    """
    about: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rl_jax_startup_") as folder:
        for name, environment in (("cold", {}), ("cached", cache_environment(folder))):
            if environment:
                first_step_of_process(shape, environment)
                say("cache filled")
            starts: list[Mapping[str, Any]] = []
            while len(starts) < 2 * repeats and sum(s["load"] <= LOAD_LIMIT for s in starts) < repeats:
                starts.append(first_step_of_process(shape, environment))
                say(f"{name}: {starts[-1]['seconds']:.2f} s, {starts[-1]['compiled']} programs compiled")
            kept = [found for found in starts if found["load"] <= LOAD_LIMIT]
            about[name] = {
                "seconds": [found["seconds"] for found in kept],
                "median": statistics.median(found["seconds"] for found in kept) if kept else None,
                "spoilt": len(starts) - len(kept),
            } | {key: starts[-1][key] for key in ("programs", "compiled", "later_programs", "second_step")}
    return about


def first_step_of_process(shape: str, environment: dict[str, str]) -> dict[str, Any]:
    """Starts a process, and waits for its first step and for two more."""
    case = {"task": "first_step", "shape": shape}
    contender = Contender(
        "first step", own_python(), "startup.py", case, {"JAX_COMPILATION_CACHE_DIR": ""} | environment
    )
    machine, begun = busy_seconds(), time.perf_counter()
    worker = start(contender)
    seconds = time.perf_counter() - begun
    own = process_seconds(worker.process.pid)
    load = others_load(busy_seconds() - machine, own, seconds, os.cpu_count() or 1)
    second, third = run_once(worker), run_once(worker)
    stop(worker)
    later = second.about["programs_now"] + third.about["programs_now"]
    first = {name: second.about[name] for name in ("programs", "compiled")}
    return {"seconds": seconds, "load": load, "later_programs": later, "second_step": second.seconds} | first


def first_step(shape: str, algorithm: str = "rloo") -> Callable[[], Mapping[str, Any]]:
    """Prepares and runs a first step; the job runs the next, and says what was compiled before and now."""
    import jax

    from benchmarks import ours

    events: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_listener(lambda name, **_: events.update([name]))
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.update([name]))
    size, work, mesh = ours.shape_of(shape), ours.work_of(shape, spread=False), ours.make_mesh()
    config = ours.model_config(size, "gpt2", "float32")
    params = ours.random_params(config)
    compiled, make_state = ours.make_rl_step(config, work, algorithm, mesh)
    state, ref_params = make_state(params), ours.put(params, mesh)
    seeds = itertools.count()

    def step() -> None:
        nonlocal state
        state, _, _ = jax.block_until_ready(compiled(state, ref_params, *ours.step_inputs(size, work, next(seeds))))

    step()
    first = {"programs": events[COMPILED], "compiled": events[COMPILED] - events[FOUND]}

    def job() -> Mapping[str, Any]:
        before = events[COMPILED]
        step()
        return first | {"programs_now": events[COMPILED] - before}

    return job


if __name__ == "__main__":
    from benchmarks.worker import serve

    serve({"first_step": first_step})
