"""A gold reward beside the one that is optimised, so that its being optimised too far is seen."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.judge import Failures, KeepFn, make_late_judge, tell_failures
from rl_jax.rewards.compose import Reward
from rl_jax.run.processes import total
from rl_jax.types import Array, Rollout

GoldMetrics = Callable[[int, Rollout, Array], Mapping[str, Any]]
"""A step's number, completions and their mean reward [] -> metrics: gold (its mean); reward_gain and gold_gain, how far
either lies above its mean on the reference policy's completions of the held-out prompts, in their standard deviations;
and where failures are replaced, failed_gold_rewards."""


def make_gold_metrics(
    gold: Reward, tokenizer: Any, golden: np.ndarray, rewards: np.ndarray, keep: KeepFn | None = None
) -> GoldMetrics:
    """A function that measures what a step's completions are worth to a reward that is not optimised.

    Args:
        gold: that reward.
        tokenizer: the policy's.
        golden: what it gives to completions of the reference policy. [M].
        rewards: what the reward that is optimised gives to them. [M].
        keep: writes the texts of completions whose gold reward failed and was replaced.
    """
    judge = make_late_judge(gold, tokenizer)
    reward_mean, reward_std, gold_mean, gold_std = (
        float(x) for x in (rewards.mean(), rewards.std() or 1.0, golden.mean(), golden.std() or 1.0)
    )

    def measure(number: int, rollout: Rollout, reward: Array) -> Mapping[str, Any]:
        failures: Failures = []
        finish = judge(rollout, failures)

        @functools.cache
        def mean() -> float:  # called a step later, when the device has its next work
            value = float(np.mean(finish()))
            tell_failures(failures, f"gold_{number}", keep)
            return value

        def failed() -> int:
            mean()
            return total(len(failures))

        counted = {} if gold.on_failure == "stop" else {"failed_gold_rewards": failed}
        return counted | {
            "gold": mean,
            "gold_gain": lambda: (mean() - gold_mean) / gold_std,
            "reward_gain": (jnp.asarray(reward) - reward_mean) / reward_std,
        }

    return measure
