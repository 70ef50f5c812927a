"""A gold reward beside the one that is optimised, so that its being optimised too far is seen."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.judge import make_late_judge
from rl_jax.rewards.compose import Reward
from rl_jax.types import Array, Rollout

GoldMetrics = Callable[[Rollout, Array], Mapping[str, Any]]
"""A step's completions and their mean reward [] -> metrics: gold (its mean); reward_gain and gold_gain, how far either
lies above its mean on the reference policy's completions of the held-out prompts, in their standard deviations."""


def make_gold_metrics(gold: Reward, tokenizer: Any, golden: np.ndarray, rewards: np.ndarray) -> GoldMetrics:
    """A function that measures what a step's completions are worth to a reward that is not optimised.

    Args:
        gold: that reward.
        tokenizer: the policy's.
        golden: what it gives to completions of the reference policy. [M].
        rewards: what the reward that is optimised gives to them. [M].
    """
    judge = make_late_judge(gold, tokenizer)
    reward_mean, reward_std, gold_mean, gold_std = (
        float(x) for x in (rewards.mean(), rewards.std() or 1.0, golden.mean(), golden.std() or 1.0)
    )

    def measure(rollout: Rollout, reward: Array) -> Mapping[str, Any]:
        finish = judge(rollout)

        @functools.cache
        def mean() -> float:  # called a step later, when the device has its next work
            return float(np.mean(finish()))

        return {
            "gold": mean,
            "gold_gain": lambda: (mean() - gold_mean) / gold_std,
            "reward_gain": (jnp.asarray(reward) - reward_mean) / reward_std,
        }

    return measure
