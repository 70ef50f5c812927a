"""rl_jax's contender: generation, a whole RL step and a pretraining step, compiled as the experiments compile them.

    python benchmarks/ours.py '{"task": "rl_step", "shape": "A", "algorithm": "rloo"}'

Each job ends when its results are there. A case may replace parts of its shape and of its work, as `growth` does.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.work import EOS, FIXED, FIXED_G, SHAPES, SPREAD, Shape, Work, random_prompts, random_windows
from benchmarks.worker import Job, serve
from experiments.mapped import make_generate, make_learning, make_update, prompt_indices
from experiments.options import EstimatorOptions, chosen_estimator
from rl_jax.keys import Purpose, step_key
from rl_jax.learner import apply_gradients, init_state, make_optimizer
from rl_jax.microbatch import sum_over_microbatches
from rl_jax.models.config import TransformerConfig, gpt2, llama
from rl_jax.models.transformer import init_params
from rl_jax.pretraining import pretrain_gradient
from rl_jax.rollout import generate as sample
from rl_jax.run.memory import keep_freed_memory
from rl_jax.run.spmd import make_mesh, pmapped, put
from rl_jax.sampling import Sampling
from rl_jax.scoring import completion_logprobs
from rl_jax.types import Array, Metrics, PyTree, Rollout, TrainState

Family = Literal["gpt2", "llama"]
Changes = Mapping[str, int] | None
BETAS = (0.9, 0.95)
MICROBATCHES = 8  # of pretraining: 512 tokens at once fit the caches of a CPU, and their logits need no second pass


def work_of(shape: str, spread: bool, changes: Changes = None) -> Work:
    """What the cases of a shape do."""
    return dataclasses.replace(SPREAD if spread else FIXED_G if shape == "G" else FIXED, **(changes or {}))


def shape_of(name: str, changes: Changes = None) -> Shape:
    """A shape by its name, with other numbers where they are given."""
    return dataclasses.replace(SHAPES[name], **(changes or {}))


def model_config(shape: Shape, family: Family, dtype: Any) -> TransformerConfig:
    """rl_jax's configuration of a shape."""
    make = {"gpt2": gpt2, "llama": llama}[family]
    return make(shape.vocab_size, shape.context, shape.layers, shape.width, shape.heads, dtype=dtype)


def make_sampling(work: Work) -> Sampling:
    """Temperature 1 and no filter; every completion has the full length, unless lengths are spread."""
    return Sampling(work.length, group_size=work.group_size, eos=(EOS,), ignore_eos=work.mean_length is None)


def random_params(config: TransformerConfig, spread: bool = False) -> PyTree:
    """Random weights, drawn on the host so that nothing is compiled for them: matrices normal, LayerNorm's identity.

    With `spread` a GPT-2 that ends a completion with probability 1/64 at each step. What LayerNorm gives before its
    bias has mean 0 over the features, so that a bias of u = (1, ..., 1) / sqrt(D) is orthogonal to it, and a row of b u
    in the tied embedding has the logit b whatever the context. The other logits are normal, of variance
    .02^2 (D + 1): exp(b) is to be (V - 1) exp(variance / 2) / 63.
    """
    rng = np.random.default_rng(0)

    def draw(path: Any, like: jax.ShapeDtypeStruct) -> np.ndarray:
        if len(like.shape) > 1:
            return rng.normal(0, 0.02, like.shape).astype(np.float32)
        return np.full(like.shape, 1.0 if path[-1].key == "scale" else 0.0, np.float32)

    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    if spread:
        logit = math.log((config.vocab_size - 1) / 63) + 0.5 * 0.02**2 * (config.width + 1)
        params["final_norm"]["bias"][:] = config.width**-0.5
        params["embedding"]["embedding"][EOS] = logit * config.width**-0.5
    return params


def even_share(rollout: Rollout) -> Array:
    """The trivial reward: the share of even tokens in each completion. [B]."""
    even = jnp.sum(rollout.completion_mask & (rollout.completions % 2 == 0), axis=1)
    return even / jnp.sum(rollout.completion_mask, axis=1)


def make_rl_step(
    config: TransformerConfig, work: Work, algorithm: str, mesh: jax.sharding.Mesh
) -> tuple[Callable[..., tuple[TrainState, Metrics, Array]], Callable[[PyTree], TrainState]]:
    """Compiled (state, ref_params, keys, prompts, mask) -> (state, metrics, lengths), and params -> the first state."""
    sampling = make_sampling(work)
    options = EstimatorOptions(kl_coefficient=work.kl_coefficient)
    estimator = chosen_estimator(algorithm, options, work.group_size)
    optimizer = make_optimizer(work.learning_rate, 0.0, 1.0, BETAS)
    sample, learning = make_generate(config, sampling, mesh), make_learning(config, sampling, mesh, work.prompt_length)
    update = make_update(learning, estimator, optimizer, work.group_size)

    def rl_step(
        state: TrainState, ref_params: PyTree, keys: Array, prompts: Array, mask: Array
    ) -> tuple[TrainState, Metrics, Array]:
        rollout = sample(state.params, keys[0], prompts, mask, prompt_indices(prompts))
        state, metrics = update(state, ref_params, keys[1], rollout, even_share(rollout))
        return state, metrics, jnp.sum(rollout.completion_mask, axis=1)

    compiled = pmapped(rl_step, mesh, (None, None, None, 0, 0), (None, None, 0), donate=(0,))
    return compiled, lambda params: put(init_state(params, optimizer, work.kl_coefficient), mesh)


def step_inputs(shape: Shape, work: Work, seed: int) -> tuple[Array, np.ndarray, np.ndarray]:
    """Keys, prompts and their mask of one RL step."""
    prompts = random_prompts(shape, work, seed)
    keys = jnp.stack([step_key(0, purpose, seed) for purpose in (Purpose.SAMPLE, Purpose.SHUFFLE)])
    return keys, prompts, np.ones(prompts.shape, bool)


def generate(
    shape: str,
    dtype: Any = "float32",
    spread: bool = False,
    family: Family = "gpt2",
    shape_changes: Changes = None,
    work_changes: Changes = None,
    padded: bool = False,
) -> Job:
    """Samples a batch of completions, in slots or padded to the longest.

    `gap` is how far the sampler's log-probabilities are from float32's, in nats.
    """
    size, work, mesh = shape_of(shape, shape_changes), work_of(shape, spread, work_changes), make_mesh()
    config, sampling = model_config(size, family, dtype), make_sampling(work)
    exact = dataclasses.replace(config, dtype="float32")
    params = put(random_params(config, spread), mesh)

    in_slots = make_generate(config, sampling, mesh)

    def rollout(params: PyTree, key: Array, prompts: Array, mask: Array) -> Rollout:
        if padded:
            return sample(params, key, prompts, mask, config, sampling)
        return in_slots(params, key, prompts, mask, prompt_indices(prompts))

    def gap(params: PyTree, rollout: Rollout) -> Array:
        differences = rollout.behavior_logprobs - completion_logprobs(params, rollout, exact, sampling)
        return jnp.sum(jnp.abs(differences)) / jnp.sum(rollout.completion_mask)

    compiled = pmapped(rollout, mesh, (None, None, 0, 0), 0)
    seeds = itertools.count()

    def run() -> Rollout:
        seed = next(seeds)
        prompts = random_prompts(size, work, seed)
        key = step_key(0, Purpose.SAMPLE, seed)
        return jax.block_until_ready(compiled(params, key, prompts, np.ones(prompts.shape, bool)))

    first, _ = run(), run()
    about = {"gap": float(pmapped(gap, mesh, (None, 0), None)(params, first))} if dtype != "float32" else {}

    def job() -> Mapping[str, Any]:
        lengths = np.sum(np.asarray(run().completion_mask), axis=1)
        return {"tokens": int(lengths.sum()), "longest": int(lengths.max())} | about

    return job


def rl_step(
    shape: str,
    algorithm: str,
    dtype: Any = "float32",
    spread: bool = False,
    family: Family = "gpt2",
    shape_changes: Changes = None,
    work_changes: Changes = None,
) -> Job:
    """Generates, rewards, scores under the reference, and updates, in one compiled program."""
    size, work, mesh = shape_of(shape, shape_changes), work_of(shape, spread, work_changes), make_mesh()
    config = model_config(size, family, dtype)
    params = random_params(config, spread)
    compiled, make_state = make_rl_step(config, work, algorithm, mesh)
    state, ref_params = make_state(params), put(params, mesh)
    seeds = itertools.count()

    def job() -> Mapping[str, Any]:
        nonlocal state
        state, _, lengths = jax.block_until_ready(compiled(state, ref_params, *step_inputs(size, work, next(seeds))))
        return {"tokens": int(np.sum(lengths)), "longest": int(np.max(lengths))}

    job(), job()
    return job


def pretrain(shape: str, dtype: Any = "float32", compiled: bool = True, family: Family = "gpt2") -> Job:
    """One update on windows of tokens; it is always compiled, whatever the peer does."""
    size, mesh = SHAPES[shape], make_mesh()
    config = model_config(size, family, dtype)
    optimizer = make_optimizer(6e-4, 0.1, 1.0, BETAS)
    sum_parts = functools.partial(sum_over_microbatches, microbatches=MICROBATCHES)

    def update(state: TrainState, tokens: Array) -> tuple[TrainState, Metrics]:
        grads, metrics = pretrain_gradient(state.params, tokens, config, sum_parts)
        state, applied = apply_gradients(state, grads, optimizer)
        return state, metrics | applied

    mapped = pmapped(update, mesh, (None, 0), (None, None), donate=(0,))
    state = put(init_state(random_params(config), optimizer, 0.0), mesh)
    seeds = itertools.count()

    def job() -> Mapping[str, Any]:
        nonlocal state
        windows = random_windows(size, next(seeds))
        state, _ = jax.block_until_ready(mapped(state, windows))
        return {"tokens": windows[:, 1:].size}

    job(), job()
    return job


if __name__ == "__main__":
    keep_freed_memory()
    serve({"generate": generate, "rl_step": rl_step, "pretrain": pretrain})
