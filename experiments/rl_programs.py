"""The programs of reinforcement as they are compiled: to sample, to learn from what was rewarded, and both in one."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax

from experiments.collect import Collected, SampleFn, make_sample
from experiments.mapped import UpdateFn, make_learning, make_update
from experiments.reinforcing import Reinforcing
from rl_jax.microbatch import sum_over_whole
from rl_jax.models.config import TransformerConfig
from rl_jax.models.layout import model_axes
from rl_jax.models.lora import Tuning
from rl_jax.reinforce.composition import Estimator
from rl_jax.rewards.compose import Reward
from rl_jax.run.spmd import AS_IT_IS, batch_parts, make_mesh, pmapped
from rl_jax.sampling import Sampling
from rl_jax.scoring import make_score_fn
from rl_jax.types import Array, Metrics, PyTree, Rollout, TrainState

LearnFn = Callable[[TrainState, PyTree, Array, Collected], tuple[TrainState, Metrics]]
"""State, the reference's params, key, completions and their rewards -> state, metrics. The state is donated."""

StepFn = Callable[[TrainState, PyTree, PyTree, Array, Array, Array], tuple[TrainState, Metrics, Rollout]]
"""State, the reference's params, the reward's, keys [2] to sample and to shuffle by, prompts [N, P], mask -> state,
metrics, completions. The state is donated."""


class Programs(NamedTuple):
    """One step of reinforcement, in parts and as a whole.

    Attributes:
        sample: whose params are the reference's and the state's; not yet mapped.
        learn: the update alone, where the host has rewarded text or chosen groups.
        learn_and_measure: the same, with the gradient's noise.
        sample_and_learn: all of it, where the reward is on tokens.
    """

    sample: SampleFn
    learn: LearnFn
    learn_and_measure: LearnFn
    sample_and_learn: StepFn


def make_programs(
    settings: Reinforcing,
    config: TransformerConfig,
    sampling: Sampling,
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    tuning: Tuning,
    reward: Reward,
    state: TrainState,
) -> Programs:
    """Compose and map one step.

    Args:
        settings: of RL.
        config: of the policy.
        sampling: how it is sampled from.
        estimator: the algorithm.
        optimizer: of the params that are trained.
        rate: its learning rate by the update, which is among the metrics.
        tuning: how trained and reference params make the policy.
        reward: what is optimised.
        state: as it is laid out on the devices.
    """
    mesh = make_mesh()
    sample_whole = make_sample(config, sampling, reward, estimator.greedy, settings.slots)
    learning = make_learning(config, sampling, mesh, settings.prompt_length, settings.tokens_at_once)
    by_prompt = learning._replace(  # a gradient's noise is between those of one prompt each
        make_score_fn=lambda ref_params: make_score_fn(ref_params, config, sampling), sum_parts=sum_over_whole
    )
    update = make_update(learning, estimator, optimizer, settings.group_size, whole=tuning.whole)
    update_and_measure = make_update(
        by_prompt, estimator, optimizer, settings.group_size, batch_parts(mesh), tuning.whole
    )

    def sample(
        parts: tuple[PyTree, PyTree], reward_params: PyTree, key: Array, prompts: Array, mask: Array
    ) -> Collected:
        return sample_whole(tuning.sampled(*parts), reward_params, key, prompts, mask)

    def learn(
        state: TrainState, ref_params: PyTree, key: Array, collected: Collected, update: UpdateFn = update
    ) -> tuple[TrainState, Metrics]:
        (rollout, rewards), greedy = collected
        learning_rate = jnp.asarray(rate(state.step))
        greedy_rewards = None if greedy is None else jnp.repeat(greedy.rewards, settings.group_size)
        state, metrics = update(state, ref_params, key, rollout, rewards, greedy_rewards)
        return state, metrics | {"learning_rate": learning_rate}

    def learn_and_measure(
        state: TrainState, ref_params: PyTree, key: Array, collected: Collected
    ) -> tuple[TrainState, Metrics]:
        return learn(state, ref_params, key, collected, update_and_measure)

    def sample_and_learn(
        state: TrainState, ref_params: PyTree, reward_params: PyTree, keys: Array, prompts: Array, mask: Array
    ) -> tuple[TrainState, Metrics, Rollout]:
        collected = sample((ref_params, state.params), reward_params, keys[0], prompts, mask)
        return *learn(state, ref_params, keys[1], collected), collected.sampled.rollout

    axes = model_axes(state, mesh)
    mapped_learn, mapped_measure = (
        pmapped(fn, mesh, (AS_IT_IS, AS_IT_IS, None, 0), (axes, None), donate=(0,)) for fn in (learn, learn_and_measure)
    )
    mapped_step = pmapped(
        sample_and_learn, mesh, (AS_IT_IS, AS_IT_IS, AS_IT_IS, None, 0, 0), (axes, None, 0), donate=(0,)
    )
    return Programs(sample, mapped_learn, mapped_measure, mapped_step)
