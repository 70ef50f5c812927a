"""The whole of a reward, on tokens and on text, of completions that exist already."""

from collections.abc import Callable
from typing import Any

import numpy as np

from rl_jax.data.prompts import decode_completions
from rl_jax.errors import InputError
from rl_jax.models.layout import put_model
from rl_jax.rewards.compose import Reward
from rl_jax.rewards.text import TextReward, score_texts
from rl_jax.run.loop import RewardFailed
from rl_jax.run.spmd import AS_IT_IS, make_mesh, pmapped
from rl_jax.types import Rollout

JudgeFn = Callable[[Rollout], np.ndarray]
"""Rollout -> reward of each completion, on the host. float32 [B]."""


def text_rewards(on_text: TextReward, tokenizer: Any, rollout: Rollout) -> np.ndarray:
    """A reward on text, of each completion. float32 [B]. Raises RewardFailed, with all the texts."""
    texts = decode_completions(tokenizer, rollout.completions, rollout.completion_mask)
    asked = decode_completions(tokenizer, rollout.prompts, rollout.prompt_mask)
    try:
        return score_texts(on_text, asked, texts)
    except InputError as error:
        pairs = zip(asked, texts, strict=True)
        raise RewardFailed(str(error), [{"prompt": prompt, "completion": text} for prompt, text in pairs]) from error


def make_judge(reward: Reward, tokenizer: Any) -> JudgeFn:
    """A function that rewards rollouts of a policy with that tokenizer."""
    start = make_late_judge(reward, tokenizer)
    return lambda rollout: start(rollout)()


def make_late_judge(reward: Reward, tokenizer: Any) -> Callable[[Rollout], Callable[[], np.ndarray]]:
    """As `make_judge`, but what it gives is called for the rewards: until then only the device is at work."""
    mesh = make_mesh()
    on_tokens = None if reward.on_tokens is None else pmapped(reward.on_tokens, mesh, (AS_IT_IS, 0), 0)
    params = put_model(reward.params, mesh)

    def start(rollout: Rollout) -> Callable[[], np.ndarray]:
        rewards = 0.0 if on_tokens is None else on_tokens(params, rollout)

        def finish() -> np.ndarray:
            total = np.zeros(len(rollout.completions), np.float32) + np.asarray(rewards)
            if reward.on_text is not None:
                total += text_rewards(reward.on_text, tokenizer, rollout)
            return total

        return finish

    return start
