"""Plan a run for chips that are not there: whether it fits, what bounds it, and how fast it can be at most.

    pip install -r requirements-tpu.txt
    python experiments/plan.py --topology v5e:2x4 --model 1B --mesh data=2,fsdp=2,tensor=2

compiles pretraining, the rollout and the RL update of a model ahead of time, for a named slice of TPUs or, with
`--topology cpu`, for the devices that are there. Nothing is allocated and nothing runs. The table, one row a program:

- memory of each chip, from the compiler; arguments that results take over are counted once;
- FLOPs of matrix products, counted in the program's jaxpr and shared out evenly, recomputation included; bytes moved in
  memory and sent between chips, counted in the compiled text. Each is counted as often as it runs: a rollout goes on
  for the full length of a completion, an update until all of them, at full length, are done. What XLA's own analysis
  says, which counts the body of a loop once, stands in settings.json;
- the least time, for products, memory or links, whichever is longest at the chip's published peak; the tokens a second
  that follow are of windows in pretraining, of completions in the others. No program reaches them;
- where it does not fit, the first of some changes, each with those before, that suffices: bfloat16, recomputation,
  fewer tokens at once, more of the mesh along fsdp, then along tensor.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.mapped import make_generate, make_learning, prompt_indices
from experiments.options import EstimatorOptions, chosen_estimator
from experiments.planning import CHIPS, Plan, count_flops, count_work, describe, extend, fits
from rl_jax.errors import InputError
from rl_jax.learner import apply_gradients, init_state, make_optimizer, policy_gradient_update
from rl_jax.models.layout import model_axes
from rl_jax.models.transformer import TransformerConfig, init_params, llama
from rl_jax.packing import choose_packing
from rl_jax.pretraining import pretrain_gradient
from rl_jax.run.loop import run_main
from rl_jax.run.spmd import AXES, BATCH, batch_parts, make_mesh, parse_mesh, pmapped
from rl_jax.run.tables import open_results, write_table
from rl_jax.sampling import Sampling
from rl_jax.types import Array, Metrics, PyTree, Rollout, TrainState

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
    hours for the largest; 0 compiles the whole."""
    advise: bool = True
    """Look for changes with which a program fits that does not."""
    folder: Path = Path("results/plan")
    """Folder that is written to."""


class Program(NamedTuple):
    """A program, not yet compiled.

    Attributes:
        mapped: from `pmapped`.
        args: abstract arrays with shardings.
        trips: as for `planning.count_work`.
        tokens: that one run makes or learns from.
    """

    mapped: Any
    args: tuple[PyTree, ...]
    trips: tuple[int, ...]
    tokens: int


def named_devices(topology: str) -> list[Any]:
    """Devices of a slice, which need not be there. Raises InputError for none that there is, and without libtpu."""
    if topology == "cpu":
        return list(jax.devices())
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise InputError(
            f"The topology {topology!r} cannot be read; write cpu, or one of {', '.join(CHIPS)} and its shape: v5e:2x4."
        )
    # No virtual machine of a TPU is asked what it is.
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost")):
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


def abstract(tree: PyTree, axes: PyTree, mesh: Mesh) -> PyTree:
    """Arrays without contents, laid out over a mesh; `axes` is a PartitionSpec for all, or a tree of them."""
    if isinstance(axes, PartitionSpec):
        axes = jax.tree.map(lambda _: axes, tree)
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree, axes
    )


def make_program(name: str, config: Config, model: TransformerConfig, mesh: Mesh) -> Program:
    """A program as the experiments compose it."""
    chips, parts = mesh.size, batch_parts(mesh)
    optimizer = make_optimizer(3e-4, 0.0, 1.0, (0.9, 0.95))
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    state = jax.eval_shape(lambda: init_state(init_params(jax.random.key(0), model), optimizer, 0.05))
    axes, rows = model_axes(state, mesh), PartitionSpec(BATCH)
    param_axes = model_axes(params, mesh)
    state, params = abstract(state, axes, mesh), abstract(params, param_axes, mesh)
    key = abstract(jax.eval_shape(lambda: jax.random.key(0)), PartitionSpec(), mesh)

    if name == "pretraining":

        def pretraining(state: TrainState, tokens: Array) -> tuple[TrainState, Metrics]:
            grads, metrics = pretrain_gradient(state.params, tokens, model, config.at_once)
            state, applied = apply_gradients(state, grads, optimizer)
            return state, metrics | applied

        windows = config.windows * chips
        tokens = abstract(jax.ShapeDtypeStruct((windows, config.context + 1), jnp.int32), rows, mesh)
        mapped = pmapped(pretraining, mesh, (axes, 0), (axes, None), donate=(0,))
        return Program(mapped, (state, tokens), (), windows * config.context)

    sampling = Sampling(config.completion_length, group_size=config.group_size, eos=(0,), ignore_eos=True)
    count = config.completions * chips
    prompts = (count // config.group_size, config.prompt_length)
    slots = -(-count // config.at_once)
    sample = make_generate(model, sampling, mesh, slots)

    def rollout(params: PyTree, key: Array, prompts: Array, mask: Array) -> Rollout:
        return sample(params, key, prompts, mask, prompt_indices(prompts))

    tokens = abstract(jax.ShapeDtypeStruct(prompts, jnp.int32), rows, mesh)
    mask = abstract(jax.ShapeDtypeStruct(prompts, jnp.bool_), rows, mesh)
    mapped = pmapped(rollout, mesh, (param_axes, None, 0, 0), 0)
    sampled = Program(
        mapped, (params, key, tokens, mask), (config.at_once, config.completion_length - 1), count * sampling.length
    )
    if name == "rollout":
        return sampled

    total = (config.prompt_length + config.completion_length) * count // parts
    at_once = max(min(16384, total) // config.at_once, 1)
    learning = make_learning(model, sampling, mesh, config.prompt_length, at_once)
    estimator = chosen_estimator("rloo", EstimatorOptions(), config.group_size)

    def update(
        state: TrainState, ref_params: PyTree, key: Array, rollout: Rollout, rewards: Array
    ) -> tuple[TrainState, Metrics]:
        ref_logprobs, ref_states = learning.reference_scores(ref_params, rollout)
        return policy_gradient_update(
            state,
            rollout,
            rewards,
            estimator=estimator,
            score_fn=learning.make_score_fn(ref_params),
            sum_parts=learning.sum_parts,
            optimizer=optimizer,
            group_size=config.group_size,
            ref_logprobs=ref_logprobs,
            context=ref_states,
            key=key,
        )

    made = abstract(jax.eval_shape(sampled.mapped, *sampled.args), rows, mesh)
    rewards = abstract(jax.ShapeDtypeStruct((count,), jnp.float32), rows, mesh)
    packing = choose_packing(config.prompt_length, sampling.length, config.group_size, model.width, at_once)
    in_a_row = (packing.width - config.prompt_length + 1) // sampling.length
    turns = -(-count // parts // (packing.rows * in_a_row)) if count // parts >= packing.rows * in_a_row else 1
    mapped = pmapped(update, mesh, (axes, param_axes, None, 0, 0), (axes, None), donate=(0,))
    return Program(mapped, (state, params, key, made, rewards), (turns,), count * sampling.length)


def argument_bytes(program: Program) -> float:
    """What the arguments take of one chip, at least."""
    leaves = jax.tree.leaves(program.args)
    return float(sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves))


def compile_program(program: Program, chips: int) -> Plan:
    """Compiles a program, and reads off what it takes; a TPU's compiler refuses one that does not fit."""
    arguments = argument_bytes(program)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.args)  # `pmapped` lays them out
    try:
        compiled = program.mapped.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", str(error))
        if not found:
            raise
        needed = float(found[1]) * 2 ** (10 * (" KMGT".index(found[2])))
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


def plan_program(name: str, config: Config, mesh: Mesh) -> Plan:
    """What a program takes, of the whole model or along the line through two with fewer layers."""
    model, few = model_config(config), config.layers_compiled
    if not few or model.layers <= 2 * few:
        return compile_program(make_program(name, config, model, mesh), mesh.size)
    models = [dataclasses.replace(model, layers=layers) for layers in (few, 2 * few)]
    one, two = (compile_program(make_program(name, config, each, mesh), mesh.size) for each in models)
    if one.work is None or two.work is None:
        more = two if two.work is None else one
        return more._replace(arguments=argument_bytes(make_program(name, config, model, mesh)))
    return extend(one, two, (model.layers - few) / few)


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


def main(config: Config) -> None:
    if config.topology != "cpu":
        jax.config.update("jax_platforms", "cpu")  # nothing runs, and no TPU is looked for
    devices = named_devices(config.topology)
    mesh = make_mesh(devices, parse_mesh(config.mesh, len(devices)))
    check(config, mesh)
    model = model_config(config)
    folder = open_results(config.folder)
    chip = CHIPS.get(config.topology.partition(":")[0])
    memory = chip.memory if chip else (devices[0].memory_stats() or {}).get("bytes_limit")
    print(f"{config.model} on {len(devices)} of {devices[0].device_kind}, {mesh_text(dict(mesh.shape))}", flush=True)
    rows, about = [], {}

    def say(text: str) -> None:
        print(text, flush=True)

    for name in config.programs:
        start = time.perf_counter()
        say(f"{name}: compiling")
        plan = plan_program(name, config, mesh)
        tokens = make_program(name, config, model, mesh).tokens
        rows.append(describe(name, plan, chip, memory, tokens) | {"compiled in, s": time.perf_counter() - start})
        about[name] = plan.xla
        if memory is not None and not fits(plan, memory) and config.advise:
            rows[-1]["would fit with"] = advice(name, config, devices, memory, say)
    write_table(folder, rows, dataclasses.asdict(config) | {"xla_counts": about, "parameters": count(model)})


def count(model: TransformerConfig) -> int:
    """Parameters of a model."""
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init_params(jax.random.key(0), model))))


if __name__ == "__main__":
    run_main(main, Config)
