"""Pretraining, rollout and update as the experiments compose them, of arrays that need not be there."""

import ctypes
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.mapped import (
    MANY_TOKENS,
    make_generate,
    make_learning,
    make_sum_microbatches,
    make_update,
    prompt_indices,
)
from experiments.options import EstimatorOptions, chosen_estimator
from rl_jax.errors import InputError
from rl_jax.learner import apply_gradients, init_state, make_optimizer
from rl_jax.models.config import TransformerConfig
from rl_jax.models.layout import model_axes
from rl_jax.models.transformer import init_params
from rl_jax.packing import Packing, choose_packing
from rl_jax.pretraining import pretrain_gradient
from rl_jax.run.spmd import BATCH, batch_parts, pmapped
from rl_jax.sampling import Sampling
from rl_jax.types import Array, Metrics, PyTree, Rollout, TrainState

OPTIMIZER = make_optimizer(3e-4, 0.0, 1.0, (0.9, 0.95))
ROWS = PartitionSpec(BATCH)
COPIES = PartitionSpec()


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


class Batch(NamedTuple):
    """Completions of an RL step: how many in all, of prompts of how many tokens, and how they are sampled."""

    completions: int
    prompt_length: int
    sampling: Sampling


def abstract(tree: PyTree, axes: PyTree, mesh: Mesh) -> PyTree:
    """Arrays without contents, laid out over a mesh; `axes` is a PartitionSpec for all, or a tree of them."""
    if isinstance(axes, PartitionSpec):
        axes = jax.tree.map(lambda _: axes, tree)
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree, axes
    )


def abstract_params(model: TransformerConfig, mesh: Mesh) -> PyTree:
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    return abstract(params, model_axes(params, mesh), mesh)


def abstract_state(model: TransformerConfig, mesh: Mesh) -> PyTree:
    state = jax.eval_shape(lambda: init_state(init_params(jax.random.key(0), model), OPTIMIZER, 0.05))
    return abstract(state, model_axes(state, mesh), mesh)


def layout(tree: PyTree) -> PyTree:
    """The PartitionSpec of each abstract array."""
    return jax.tree.map(lambda x: x.sharding.spec, tree)


def pretraining_program(model: TransformerConfig, mesh: Mesh, windows: int, context: int, microbatches: int) -> Program:
    """An update from so many windows in all, `context` tokens each."""

    sum_parts = make_sum_microbatches(mesh, microbatches)

    def pretraining(state: TrainState, tokens: Array) -> tuple[TrainState, Metrics]:
        grads, metrics = pretrain_gradient(state.params, tokens, model, sum_parts)
        state, applied = apply_gradients(state, grads, OPTIMIZER)
        return state, metrics | applied

    state = abstract_state(model, mesh)
    tokens = abstract(jax.ShapeDtypeStruct((windows, context + 1), jnp.int32), ROWS, mesh)
    axes = layout(state)
    mapped = pmapped(pretraining, mesh, (axes, 0), (axes, None), donate=(0,))
    return Program(mapped, (state, tokens), (), windows * context)


def rollout_program(model: TransformerConfig, mesh: Mesh, batch: Batch, turns: int) -> Program:
    """Completions of full length, a part of them at once, the others in so many turns."""
    sampling, params = batch.sampling, abstract_params(model, mesh)
    sample = make_generate(model, sampling, mesh, -(-batch.completions // turns))

    def rollout(params: PyTree, key: Array, prompts: Array, mask: Array) -> Rollout:
        return sample(params, key, prompts, mask, prompt_indices(prompts))

    shape = (batch.completions // sampling.group_size, batch.prompt_length)
    prompts, mask = (abstract(jax.ShapeDtypeStruct(shape, dtype), ROWS, mesh) for dtype in (jnp.int32, jnp.bool_))
    mapped = pmapped(rollout, mesh, (layout(params), None, 0, 0), 0)
    args = (params, _abstract_key(mesh), prompts, mask)
    return Program(mapped, args, (turns, sampling.length - 1), batch.completions * sampling.length)


def update_program(model: TransformerConfig, mesh: Mesh, batch: Batch, parts: int) -> Program:
    """An RL update from completions of full length, so many parts of what a chip would take at once one by one."""
    sampling, own = batch.sampling, batch.completions // batch_parts(mesh)
    tokens_at_once = max(min(MANY_TOKENS, (batch.prompt_length + sampling.length) * own) // parts, 1)
    learning = make_learning(model, sampling, mesh, batch.prompt_length, tokens_at_once)
    estimator = chosen_estimator("rloo", EstimatorOptions(), sampling.group_size)

    update = make_update(learning, estimator, OPTIMIZER, sampling.group_size)
    state, params = abstract_state(model, mesh), abstract_params(model, mesh)
    made = rollout_program(model, mesh, batch, 1)
    rollout = abstract(jax.eval_shape(made.mapped, *made.args), ROWS, mesh)
    rewards = abstract(jax.ShapeDtypeStruct((batch.completions,), jnp.float32), ROWS, mesh)
    axes = layout(state)
    mapped = pmapped(update, mesh, (axes, layout(params), None, 0, 0), (axes, None), donate=(0,))
    packing = choose_packing(batch.prompt_length, sampling.length, sampling.group_size, model.width, tokens_at_once)
    args = (state, params, _abstract_key(mesh), rollout, rewards)
    return Program(mapped, args, (_rounds(packing, batch, own),), made.tokens)


def _rounds(packing: Packing, batch: Batch, own: int) -> int:
    """Parts that the sequences of one device, all of full length, go through an update in."""
    in_a_row = (packing.width - batch.prompt_length + 1) // batch.sampling.length
    return max(-(-own // (packing.rows * in_a_row)), 1)


def _abstract_key(mesh: Mesh) -> PyTree:
    return abstract(jax.eval_shape(lambda: jax.random.key(0)), COPIES, mesh)


def argument_bytes(program: Program) -> float:
    """What the arguments take of one chip, at least."""
    leaves = jax.tree.leaves(program.args)
    return float(sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves))


def measure_peak(program: Program, mesh: Mesh) -> float:
    """Runs a program on the CPUs of this process and reads how much memory it takes there, bytes of one device.

    Every argument is ones: what a program takes does not depend on them.

    Raises:
        InputError: the devices are no CPUs, or the system is not Linux, which alone says what a process holds.
    """
    status = Path("/proc/self/status")
    if mesh.devices.flat[0].platform != "cpu" or not status.exists():
        raise InputError("A program's memory is measured on the CPUs of Linux alone: leave out measure.")

    def held(kind: str) -> int:
        found = re.search(rf"{kind}:\s+(\d+) kB", status.read_text())
        return 1024 * int(found[1]) if found else 0

    def content(x: Any) -> Array:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key(1) if is_key else jnp.ones(x.shape, x.dtype)

    make_args: Any = pmapped(lambda: jax.tree.map(content, program.args), mesh, (), layout(program.args))
    make_args = make_args.lower().compile()
    run = program.mapped.lower(*jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.args)).compile()
    ctypes.CDLL(None).malloc_trim(0)  # what the compiler is done with goes back
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    jax.block_until_ready(run(*make_args()))
    return (held("VmHWM") - before) / mesh.size
