"""Completions of many prompts by a policy that stays as it is, a block of prompts at a time."""

from collections.abc import Callable

import jax
import numpy as np

from rl_jax.models.transformer import TransformerConfig
from rl_jax.rollout import generate
from rl_jax.run.progress import show_progress
from rl_jax.run.spmd import Mesh, make_mesh, pmapped
from rl_jax.sampling import Sampling
from rl_jax.types import Array, PyTree, Rollout

BLOCK = 32  # prompts that go through the devices at once, rounded to what they can share

SampleAll = Callable[[PyTree, Array, np.ndarray, np.ndarray], Rollout]
"""Params, key, prompts int32 [N, P], mask -> their completions, as NumPy arrays of B = N * G sequences."""


def blocks(prompts: int, mesh: Mesh) -> list[np.ndarray]:
    """Indices of the prompts of each block; N is a multiple of the number of devices."""
    size = max(BLOCK // mesh.size, 1) * mesh.size
    return np.split(np.arange(prompts), range(size, prompts, size))


def join(parts: list[PyTree]) -> PyTree:
    """Blocks of arrays [b, ...] as arrays [B, ...]."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def make_sampler(config: TransformerConfig, sampling: Sampling, stage: str) -> SampleAll:
    """A compiled function that completes prompts; what it samples depends on the key and a prompt's place alone."""
    mesh = make_mesh()

    def sample(params: PyTree, key: Array, index: Array, prompts: Array, mask: Array) -> Rollout:
        return generate(params, key, prompts, mask, config, sampling, index)

    mapped = pmapped(sample, mesh, (None, None, 0, 0, 0), 0)

    def sample_all(params: PyTree, key: Array, prompts: np.ndarray, mask: np.ndarray) -> Rollout:
        parts, every = [], blocks(len(prompts), mesh)
        with show_progress(stage, 0, len(every)) as progress:
            for number, index in enumerate(every, 1):
                parts.append(jax.device_get(mapped(params, key, index, prompts[index], mask[index])))
                progress.show(number, {})
        return join(parts)

    return sample_all
