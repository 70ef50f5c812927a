"""Plan a run for chips that are not there: whether it fits, what bounds it, and how fast it can be at most.

    python3 -m venv build/tpu && build/tpu/bin/pip install -r requirements-tpu.txt
    build/tpu/bin/python experiments/plan.py --topology v5e:2x4 --model 1B --mesh data=2,fsdp=2,tensor=2

compiles pretraining, the rollout and the RL update of a model ahead of time, for a named slice of TPUs or, with
`--topology cpu`, for the devices that are there. Nothing is allocated and nothing runs, without `--measure`. The
table, one row a program:

- memory of each chip, from the compiler; arguments that results take over are counted once;
- FLOPs of matrix products, counted in the program's jaxpr and shared out evenly, recomputation included; bytes moved in
  memory and sent between chips, counted in the compiled text. Each is counted as often as it runs: a rollout goes on
  for the full length of a completion, an update until all of them, at full length, are done. What XLA's own analysis
  says, which counts the body of a loop once, stands in settings.json;
- the least time, for products, memory or links, whichever is longest at the chip's published peak; the tokens a second
  that follow are of windows in pretraining, of completions in the others;
- where it does not fit, the first of some changes, each with those before, that suffices: bfloat16, recomputation,
  fewer tokens at once, more of the mesh along fsdp, then along tensor.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from experiments.planning import CHIPS, GIB, Plan, count_flops, count_work, describe, extend, fits
from experiments.programs import (
    Batch,
    Program,
    argument_bytes,
    measure_peak,
    pretraining_program,
    rollout_program,
    update_program,
)
from rl_jax.errors import InputError
from rl_jax.models.config import TransformerConfig, llama
from rl_jax.models.transformer import init_params
from rl_jax.run.loop import run_main
from rl_jax.run.spmd import AXES, batch_parts, make_mesh, parse_mesh
from rl_jax.run.tables import open_results, write_table
from rl_jax.sampling import Sampling

# Vocabulary, layers, width, heads, key-value heads, MLP, tied, RoPE: the config.json of SmolLM2-135M, Llama-3.2-1B,
# Llama-3.1-8B and Llama-3.1-70B.
MODELS = {
    "135M": (49152, 30, 576, 9, 3, 1536, True, 1e5),
    "1B": (128256, 16, 2048, 32, 8, 8192, True, 5e5),
    "8B": (128256, 32, 4096, 32, 8, 14336, False, 5e5),
    "70B": (128256, 80, 8192, 64, 8, 28672, False, 5e5),
}
PROGRAMS = ("pretraining", "rollout", "update")


@dataclasses.dataclass(frozen=True)
class Config:
    """Compile pretraining, rollout and RL update for chips that need not be there, and say whether they fit."""

    topology: str = "v5e:2x4"
    """Generation (v5e, v5p, v6e) and shape of a slice of TPUs, such as v5e:2x4 or v5p:2x2x2; or cpu, for the devices
    that are there."""
    model: str = "135M"
    """Shape of the model: 135M, 1B, 8B or 70B; or layers x width x heads, such as 2x64x4."""
    mesh: str = ""
    """Devices along each axis, such as data=2,fsdp=2,tensor=2; what is left out is 1, but data takes the rest."""
    programs: tuple[str, ...] = PROGRAMS
    """Which of pretraining, rollout and update."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What activations are computed in; parameters are float32."""
    remat: bool = False
    """Recompute blocks in the backward pass."""
    windows: int = 2
    """Windows of text in an update of pretraining, for each chip."""
    context: int = 2048
    """Tokens of a window."""
    completions: int = 16
    """Completions in an RL step, for each chip."""
    group_size: int = 8
    """Completions of each prompt."""
    prompt_length: int = 256
    """Tokens of a prompt."""
    completion_length: int = 512
    """Tokens of a completion."""
    at_once: int = 1
    """Parts that the work goes through a chip in: microbatches, turns of sequences, parts of an update."""
    layers_compiled: int = 0
    """Compile the model with so many layers and with twice as many, and extend the line to all: minutes instead of
    an hour for the largest, and a wrong memory where it is not the layers that take most yet; 0 compiles the whole."""
    advise: bool = True
    """Look for changes with which a program fits that does not."""
    measure: bool = False
    """Run each program too, with --topology cpu on Linux, and say how much memory it took."""
    folder: Path = Path("results/plan")
    """Folder that is written to."""


def named_devices(topology: str) -> list[Any]:
    """Devices of a slice, which need not be there. Raises InputError for none that there is, and without libtpu."""
    if topology == "cpu":
        return list(jax.devices())
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise InputError(
            f"The topology {topology!r} cannot be read; write cpu, or one of {', '.join(CHIPS)} and its shape: v5e:2x4."
        )
    # No virtual machine of a TPU is asked what it is, and another process may plan at the same time.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu, which compiles for a TPU, is missing: pip install -r requirements-tpu.txt")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # of libtpu, whose kinds are not written down
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(f"The topology {topology!r} is none that libtpu knows: {reason}") from error


def model_config(config: Config) -> TransformerConfig:
    """A model by its name. Raises InputError."""
    context = max(config.context, config.prompt_length + config.completion_length)
    compute: dict[str, Any] = {"dtype": config.dtype, "remat": config.remat}
    if config.model in MODELS:
        vocabulary, layers, width, heads, kv_heads, mlp, tied, theta = MODELS[config.model]
        compute |= {"kv_heads": kv_heads, "mlp_width": mlp, "tied": tied, "rope_theta": theta}
        return llama(vocabulary, context, layers, width, heads, **compute)
    if not re.fullmatch(r"\d+x\d+x\d+", config.model):
        raise InputError(f"There is no model {config.model!r}: take {', '.join(MODELS)}, or layers x width x heads.")
    layers, width, heads = map(int, config.model.split("x"))
    return llama(2048, context, layers, width, heads, **compute)


def check(config: Config, mesh: Mesh) -> None:
    """Raise InputError for settings that cannot be."""
    names = ("windows", "context", "completions", "group_size", "prompt_length", "completion_length", "at_once")
    for name in names:
        if getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}; it must be at least 1.")
    for program in config.programs:
        if program not in PROGRAMS:
            raise InputError(f"There is no program {program!r}: take some of {', '.join(PROGRAMS)}.")
    parts = batch_parts(mesh)
    if config.completions * mesh.size % (config.group_size * parts):
        raise InputError(
            f"{config.completions * mesh.size} completions do not divide into groups of {config.group_size} over "
            f"{parts} devices: give another number of completions."
        )


def make_program(name: str, config: Config, model: TransformerConfig, mesh: Mesh) -> Program:
    """A program by its name, as large as the settings say for each chip."""
    if name == "pretraining":
        return pretraining_program(model, mesh, config.windows * mesh.size, config.context, config.at_once)
    sampling = Sampling(config.completion_length, group_size=config.group_size, eos=(0,), ignore_eos=True)
    batch = Batch(config.completions * mesh.size, config.prompt_length, sampling)
    make = {"rollout": rollout_program, "update": update_program}[name]
    return make(model, mesh, batch, config.at_once)


def refused_bytes(message: str, arguments: float) -> float | None:
    """Memory that a program would need, as a TPU's compiler says that refuses it; None where it says another reason.

    It says the whole, or, where they alone are too large, its temporaries.
    """
    whole = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    temporaries = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT])\)", message)
    found = whole or temporaries
    if not found:
        return None
    size = float(found[1]) * 2 ** (10 * " KMGT".index(found[2]))
    return size if whole else size + arguments


def compile_program(program: Program, chips: int) -> Plan:
    """Compiles a program, and reads off what it takes; a TPU's compiler refuses one that does not fit."""
    arguments = argument_bytes(program)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.args)  # `pmapped` lays them out
    try:
        compiled = program.mapped.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = refused_bytes(str(error), arguments)
        if needed is None:
            reason = str(error).strip().splitlines()[0][:300]
            raise InputError(f"The compiler refuses the program, and not for its memory: {reason}") from error
        return Plan(arguments, 0, needed - arguments, needed)
    memory: Any = compiled.memory_analysis()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    xla = compiled.cost_analysis() or {}
    return Plan(
        arguments,
        outputs,
        memory.temp_size_in_bytes,
        arguments + outputs + memory.temp_size_in_bytes,
        count_flops(jax.make_jaxpr(program.mapped)(*args), program.trips) / chips,
        count_work(compiled.as_text(), program.trips),
        {name: xla.get(name, 0.0) for name in ("flops", "bytes accessed")},
    )


def changes(config: Config, shape: dict[str, int]) -> Iterator[tuple[str, Config]]:
    """Settings that take less memory, each with the changes before it, and what the last change was."""
    if config.dtype != "bfloat16":
        config = dataclasses.replace(config, dtype="bfloat16")
        yield "dtype bfloat16", config
    if not config.remat:
        config = dataclasses.replace(config, remat=True)
        yield "remat", config
    for _ in range(2):
        config = dataclasses.replace(config, at_once=4 * config.at_once)
        yield f"at-once {config.at_once}", config
    if shape["data"] > 1:
        shape = shape | {"data": 1, "fsdp": shape["data"] * shape["fsdp"]}
        config = dataclasses.replace(config, mesh=mesh_text(shape))
        yield f"mesh {config.mesh}", config
    if shape["fsdp"] % 4 == 0 and shape["tensor"] < 4:
        shape = shape | {"fsdp": shape["fsdp"] // 4, "tensor": 4 * shape["tensor"]}
        config = dataclasses.replace(config, mesh=mesh_text(shape))
        yield f"mesh {config.mesh}", config


def mesh_text(shape: dict[str, int]) -> str:
    return ",".join(f"{axis}={shape[axis]}" for axis in AXES)


def depths(config: Config, layers: int) -> tuple[int, ...]:
    """Layers of the models that are compiled: all, or two numbers that a line to all goes through."""
    few = config.layers_compiled
    return (layers,) if not few or layers <= 2 * few else (few, 2 * few)


def plan_program(name: str, config: Config, mesh: Mesh) -> Plan:
    """What a program takes, of the whole model or along the line through two with fewer layers."""
    model = model_config(config)
    layers = depths(config, model.layers)
    models = [dataclasses.replace(model, layers=each) for each in layers]
    plans = [compile_program(make_program(name, config, each, mesh), mesh.size) for each in models]
    if len(plans) == 1:
        return plans[0]
    refused = [plan for plan in plans if plan.work is None]
    if refused:  # and so is the whole, which needs at least what these layers need beside all arguments
        arguments = argument_bytes(make_program(name, config, model, mesh))
        return refused[-1]._replace(arguments=arguments, needed=arguments + refused[-1].temporaries)
    return extend(plans[0], plans[1], (model.layers - layers[0]) / layers[0])


def advice(name: str, config: Config, devices: list[Any], memory: float, say: Callable[[str], None]) -> str:
    """The first of the changes with which a program fits; or what is largest with all of them."""
    shape = parse_mesh(config.mesh, len(devices))
    plan, done = None, []
    for change, changed in changes(config, shape):
        done = [*(each for each in done if each.split()[0] != change.split()[0]), change]
        mesh = make_mesh(devices, parse_mesh(changed.mesh, len(devices)))
        try:
            check(changed, mesh)
        except InputError:
            continue
        if argument_bytes(make_program(name, changed, model_config(changed), mesh)) > memory:
            continue  # nothing of it would change that, so it need not be compiled
        say(f"{name}: trying {', '.join(done)}")
        plan = plan_program(name, changed, mesh)
        if fits(plan, memory):
            return ", ".join(done)
    if plan is None:
        return "none of these: parameters, and what is kept of them, are larger than the memory; take more chips"
    return f"none of these: {'temporaries' if plan.temporaries > plan.arguments else 'arguments'} remain the largest"


def plan_row(
    name: str, config: Config, devices: list[Any], say: Callable[[str], None]
) -> tuple[dict[str, Any], Mapping[str, float]]:
    """A program's row of the table, and XLA's own counts of it. Raises InputError, as `check` does."""
    mesh = make_mesh(devices, parse_mesh(config.mesh, len(devices)))
    check(config, mesh)
    model, chip = model_config(config), CHIPS.get(config.topology.partition(":")[0])
    memory = chip.memory if chip else (devices[0].memory_stats() or {}).get("bytes_limit")
    start = time.perf_counter()
    say(f"{name}: compiling")
    plan = plan_program(name, config, mesh)
    tokens = make_program(name, config, dataclasses.replace(model, layers=1), mesh).tokens
    row = describe(name, plan, chip, memory, tokens) | {"compiled in, s": time.perf_counter() - start}
    layers = depths(config, model.layers)
    row["layers compiled"] = " and ".join(map(str, layers)) if len(layers) > 1 else "all"
    if memory is not None and not fits(plan, memory) and config.advise:
        row["would fit with"] = advice(name, config, devices, memory, say)
    if config.measure:
        say(f"{name}: running")
        measured = measure_peak(make_program(name, config, model, mesh), mesh)
        row |= {"measured, GiB": measured / GIB, "measured / needed": measured / plan.needed}
    return row, plan.xla


def choose_devices(topology: str) -> list[Any]:
    """As `named_devices`; where they are not there, nothing runs, and no TPU is looked for."""
    if topology != "cpu":
        jax.config.update("jax_platforms", "cpu")
    return named_devices(topology)


def main(config: Config) -> None:
    devices = choose_devices(config.topology)
    mesh = make_mesh(devices, parse_mesh(config.mesh, len(devices)))
    check(config, mesh)
    model = model_config(config)
    folder = open_results(config.folder)
    print(f"{config.model} on {len(devices)} of {devices[0].device_kind}, {mesh_text(dict(mesh.shape))}", flush=True)
    say = functools.partial(print, flush=True)
    planned = {name: plan_row(name, config, devices, say) for name in config.programs}
    about = {"xla_counts": {name: xla for name, (_, xla) in planned.items()}, "parameters": count(model)}
    write_table(folder, [row for row, _ in planned.values()], dataclasses.asdict(config) | about)


def count(model: TransformerConfig) -> int:
    """Parameters of a model."""
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init_params(jax.random.key(0), model))))


if __name__ == "__main__":
    run_main(main, Config)
