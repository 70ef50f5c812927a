"""Completions of prompts by a policy, block by block, their rewards and their divergence from another policy."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.judge import JudgeFn
from experiments.mapped import make_generate
from rl_jax.data.prompts import decode_completions
from rl_jax.models.config import TransformerConfig
from rl_jax.models.huggingface import Policy
from rl_jax.models.layout import put_unchanged
from rl_jax.run.progress import show_progress
from rl_jax.run.spmd import AS_IT_IS, batch_parts, fetch, make_mesh, pmapped
from rl_jax.sampling import Sampling, untruncated
from rl_jax.scoring import Reference, completion_logprobs, completion_states, score_completions
from rl_jax.types import Array, PyTree, Rollout

SEQUENCES = 256  # completions that go through the devices at once, rounded to what these can share


class Sampled(NamedTuple):
    """What a policy did with N prompts, G completions of each. On the host.

    Attributes:
        rollout: its completions. B = N * G sequences.
        texts: the same as text. B of them.
        rewards: of each, by the reward's name. [N, G].
        kl: from the reference, exact at each token and summed over the completion, nats; None without one. [N, G].
        log_ratio: log-probability of each completion less that under the reference, nats; None without one. [N, G].
    """

    rollout: Rollout
    texts: list[str]
    rewards: dict[str, np.ndarray]
    kl: np.ndarray | None
    log_ratio: np.ndarray | None


def alike(policy: Policy, other: Policy) -> bool:
    """Whether two policies have the same shape and vocabulary, so that a divergence between them can be worked out."""
    same_words = policy.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    return policy.config == other.config and same_words and policy.tokenizer.eos_token == other.tokenizer.eos_token


@functools.cache
def make_block_sampler(config: TransformerConfig, sampling: Sampling, compared: bool) -> Callable[..., Any]:
    """Compiled: params, reference params, key, index [n], prompts [n, P], mask [n, P] -> completions of n prompts.

    It returns a rollout, and where it is compared with a reference, the exact KL and the log-ratio of each of its
    completions [n * G], at the sampling temperature with every token kept; else None and None.
    """
    mesh, tempered = make_mesh(), untruncated(sampling)
    generate = make_generate(config, sampling, mesh)

    def sample(params: PyTree, ref: PyTree, key: Array, index: Array, prompts: Array, mask: Array):
        rollout = generate(params, key, prompts, mask, index)
        if not compared:
            return rollout, None, None
        reference = Reference(ref, completion_states(ref, rollout, config))
        scores = score_completions(params, rollout, config, tempered, reference)
        log_ratio = scores.logprobs - completion_logprobs(ref, rollout, config, tempered)
        return rollout, jnp.sum(scores.kl, axis=1), jnp.sum(log_ratio, axis=1)

    return pmapped(sample, mesh, (AS_IT_IS, AS_IT_IS, None, 0, 0, 0), 0)


def in_blocks(fn: Callable[[np.ndarray, Any], PyTree], batch: PyTree, size: int, stage: str) -> PyTree:
    """Calls a function on blocks of one shape, that all devices can share, and joins what it gives.

    Args:
        fn: number of each row int32 [n], block of the batch [n, ...] -> a pytree of arrays [n * G, ...], G of each row.
        batch: a pytree of NumPy arrays [N, ...].
        size: n at most, rounded to what the devices can share; the last row fills up the last block.
        stage: what the progress is called.

    Returns:
        NumPy arrays [N * G, ...].
    """
    devices, count = batch_parts(make_mesh()), len(jax.tree.leaves(batch)[0])
    size = max(min(size, count) // devices, 1) * devices
    starts, parts = range(0, count, size), []
    with show_progress(stage, 0, len(starts)) as progress:
        for done, start in enumerate(starts, 1):
            index = np.minimum(np.arange(start, start + size), count - 1)
            parts.append(fetch(fn(index, jax.tree.map(lambda x, index=index: x[index], batch))))
            progress.show(done, {})
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    filled = len(starts) * size
    return jax.tree.map(lambda x: x[: len(x) // filled * count], joined)


def complete(
    policy: Policy,
    reference: Policy | None,
    prompts: tuple[np.ndarray, np.ndarray],
    rewards: Mapping[str, JudgeFn],
    sampling: Sampling,
    key: Array,
    stage: str,
) -> Sampled:
    """Sample every prompt, in blocks of one shape, and reward what was sampled.

    Args:
        policy: samples.
        reference: of the same shape and vocabulary; None where no divergence is to be worked out.
        prompts: left-padded, int32 [N, P], and their mask.
        rewards: functions of a rollout, by name.
        sampling: how many completions of each prompt, and how.
        key: of all of them; a completion depends on its prompt and its number, not on the block it is in.
        stage: what the progress is called.
    """
    mesh, shape = make_mesh(), (len(prompts[0]), sampling.group_size)
    sample = make_block_sampler(policy.config, sampling, reference is not None)
    params, ref_params = (put_unchanged(model.params, mesh) if model else () for model in (policy, reference))

    def block(index: np.ndarray, prompts: tuple[np.ndarray, np.ndarray]) -> PyTree:
        rollout, *divergences = sample(params, ref_params, key, index, *prompts)
        return rollout, {name: reward(rollout) for name, reward in rewards.items()}, divergences

    rollout, rewarded, divergences = in_blocks(block, prompts, SEQUENCES // sampling.group_size, stage)
    kl, log_ratio = (None if x is None else x.reshape(shape) for x in divergences)
    return Sampled(
        rollout=rollout,
        texts=decode_completions(policy.tokenizer, rollout.completions, rollout.completion_mask),
        rewards={name: rewarded[name].reshape(shape) for name in rewards},
        kl=kl,
        log_ratio=log_ratio,
    )
