"""What an update learns from: completions and their rewards, on tokens within the compiled step, on text outside it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.judge import Failures, KeepFn, tell_failures, text_rewards
from experiments.mapped import make_generate, prompt_indices
from rl_jax.data.batches import shuffled_batch
from rl_jax.keys import Purpose, step_key
from rl_jax.models.config import TransformerConfig
from rl_jax.reinforce.advantages import zero_signal_groups
from rl_jax.rewards.compose import Reward
from rl_jax.rollout import refill_groups
from rl_jax.run.processes import total
from rl_jax.run.spmd import AS_IT_IS, fetch, join_rows, make_mesh, pmapped, put, rows_here
from rl_jax.sampling import Sampling, most_likely
from rl_jax.types import Array, Metrics, PyTree, Rollout

REFILLS = 1 << 64  # added to the seed: the stream of prompts that replace others, words away from any other


class Rewarded(NamedTuple):
    """A rollout, and a reward [B] for each completion."""

    rollout: Rollout
    rewards: Array


class Collected(NamedTuple):
    """Completions of N prompts, G each, and where they are asked for the greedy completion of each prompt."""

    sampled: Rewarded
    greedy: Rewarded | None


SampleFn = Callable[[PyTree, PyTree, Array, Array, Array], Collected]
"""Params, the reward's params, key, prompts [N, P], mask -> completions; their rewards are those on tokens."""

CollectFn = Callable[[PyTree, PyTree, int], tuple[Collected, Rollout, Metrics]]
"""Params, the reward's params, number of the step -> completions to learn from with all their rewards; the rollout that
was sampled first, which nothing has selected; and metrics: where groups are replaced, rounds (how many batches were
sampled), and reward and zero_signal_groups of the first; where rewards that fail are replaced, failed_rewards."""


def make_sample(
    config: TransformerConfig, sampling: Sampling, reward: Reward, needs_greedy: bool, slots: int = 0
) -> SampleFn:
    """A pure function that samples, in so many slots, and rewards what can be rewarded on tokens."""
    mesh = make_mesh()

    def sample(params: PyTree, reward_params: PyTree, key: Array, prompts: Array, mask: Array) -> Collected:
        def rewarded(sampling: Sampling) -> Rewarded:
            generate = make_generate(config, sampling, mesh, slots)
            rollout = generate(params, key, prompts, mask, prompt_indices(prompts))
            if reward.on_tokens is None:
                return Rewarded(rollout, jnp.zeros(len(rollout.completions)))
            return Rewarded(rollout, reward.on_tokens(reward_params, rollout))

        return Collected(rewarded(sampling), rewarded(most_likely(sampling)) if needs_greedy else None)

    return sample


def make_collect(
    sample: SampleFn,
    prompts: tuple[np.ndarray, np.ndarray],
    reward: Reward,
    tokenizer: Any,
    *,
    batch_size: int,
    group_size: int,
    rounds: int,
    seed: int,
    keep: KeepFn | None = None,
) -> CollectFn:
    """A function that samples, rewards tokens and text, and replaces groups whose rewards are all equal.

    Args:
        sample: from `make_sample`.
        prompts: to choose from. int32 [M, P], bool [M, P].
        reward: on tokens, on text, or both.
        tokenizer: of the policy.
        batch_size: N, prompts in a batch.
        group_size: G.
        rounds: batches sampled at most; from the second on, to replace groups.
        seed: of prompts and completions.
        keep: writes the texts of completions whose reward failed and was replaced.
    """
    mesh = make_mesh()
    mapped_sample = pmapped(sample, mesh, (AS_IT_IS, AS_IT_IS, None, 0, 0), 0)

    def refill(batch: Collected, fresh: Collected) -> Collected:
        wanting, unusable = (zero_signal_groups(part.sampled.rewards, group_size) for part in (batch, fresh))
        return refill_groups(batch, fresh, wanting, ~unusable)

    def describe(rewards: Array) -> Metrics:
        wanting = zero_signal_groups(rewards, group_size)
        return {"reward": jnp.mean(rewards), "zero_signal_groups": jnp.mean(wanting, dtype=jnp.float32)}

    own = rows_here(batch_size, mesh)
    mapped_refill, mapped_describe = pmapped(refill, mesh, (0, 0), 0), pmapped(describe, mesh, (0,), None)

    def reward_text(part: Rewarded, failures: Failures) -> Rewarded:
        if reward.on_text is None:
            return part
        rewards = fetch(part.rewards) + text_rewards(reward, tokenizer, part.rollout, failures)
        return part._replace(rewards=put(rewards, mesh, 0))  # as if the device had computed them: one program for both

    def collect(params: PyTree, reward_params: PyTree, number: int) -> tuple[Collected, Rollout, Metrics]:
        failures: Failures = []

        def complete(key: Array, stream: int, number: int) -> Collected:
            batch = join_rows(shuffled_batch(prompts, batch_size, stream, number, "prompts", own), mesh)
            sampled, greedy = mapped_sample(params, reward_params, key, *batch)
            return Collected(reward_text(sampled, failures), greedy and reward_text(greedy, failures))

        batch, first, metrics = refilled(complete, number)
        tell_failures(failures, f"rl_{number}", keep)
        counted = {} if reward.on_failure == "stop" else {"failed_rewards": jnp.asarray(total(len(failures)))}
        return batch, first, metrics | counted

    def refilled(complete: Callable[[Array, int, int], Collected], number: int) -> tuple[Collected, Rollout, Metrics]:
        batch = complete(step_key(seed, Purpose.SAMPLE, number), seed, number)
        first = batch.sampled.rollout
        if rounds == 1:
            return batch, first, {}
        metrics = now = mapped_describe(batch.sampled.rewards)
        sampled = 1
        while sampled < rounds and now["zero_signal_groups"] > 0:
            key = jax.random.fold_in(step_key(seed, Purpose.REFILL, number), sampled)
            batch = mapped_refill(batch, complete(key, seed + REFILLS, number * rounds + sampled))
            now = mapped_describe(batch.sampled.rewards)
            sampled += 1
        return batch, first, metrics | {"rounds": jnp.asarray(sampled)}

    return collect
