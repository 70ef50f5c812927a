"""What is measured of a reward model on judgements that it has not learned from, and the guard of its sign."""

from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.complete import SEQUENCES, in_blocks
from experiments.judge import make_judge
from experiments.judgements import Judgements, kind_of
from rl_jax.models.reward_model import RewardModel, candidates_rollout, ensemble_rewards
from rl_jax.preferences.diagnostics import pair_diagnostics, ranking_diagnostics, rating_diagnostics
from rl_jax.preferences.learning import concordance
from rl_jax.rewards.compose import RewardConfig, make_reward
from rl_jax.run.spmd import AS_IT_IS, make_mesh, pmapped
from rl_jax.sign_check import check_preferred
from rl_jax.types import Array, PreferenceBatch, Rollout

CHECKED = 256  # held-out pairs that must show which way the reward points


def judge_all(model: RewardModel, rollout: Rollout) -> np.ndarray:
    """The rewards of every member, of completions that there are. [K, B]."""
    judge = pmapped(partial(ensemble_rewards, config=model.config), make_mesh(), (AS_IT_IS, 0), 1)

    def block(index: np.ndarray, part: Rollout) -> Array:
        return judge(model.params, part).T

    return in_blocks(block, rollout, SEQUENCES, "normalise").T


def held_out_metrics(rewards: np.ndarray, losses: np.ndarray, data: PreferenceBatch) -> dict[str, Any]:
    """Loss and accuracy of the members [K, M, K'], their means, and the standard deviation between them."""
    metrics = {"held_out_loss": np.mean(losses)}
    if data.labels.shape[1] > 1:
        there = data.completion_mask.any(axis=2)
        metrics["held_out_accuracy"] = np.mean([concordance(each, data.labels, there) for each in rewards])
    if len(rewards) > 1:
        centred = rewards - (rewards.mean(axis=2, keepdims=True) if data.labels.shape[1] > 1 else 0.0)
        metrics["spread"] = np.mean(np.std(centred, axis=0))
    return metrics


def diagnostics(rewards: np.ndarray, data: Judgements) -> dict[str, Any]:
    """What is measured of rewards [M', K'] of the held-out candidates."""
    labels, there = np.asarray(data.held_out.labels), np.any(np.asarray(data.held_out.completion_mask), axis=2)
    match kind_of(data.held_out):
        case "pairs":
            return pair_diagnostics(rewards, labels, data.gaps, data.votes)
        case "rankings":
            return ranking_diagnostics(rewards, labels, there)
        case "ratings":
            return rating_diagnostics(rewards[:, 0], labels[:, 0])


def check_direction(model: RewardModel, held_out: PreferenceBatch) -> None:
    """Guard against a reward with the wrong sign: normalised and combined, it must not prefer what judges rejected."""
    decided = np.flatnonzero(held_out.labels[:, 0] != held_out.labels[:, 1])[:CHECKED]
    if not len(decided):
        return
    pairs = jax.tree.map(lambda x: x[decided], held_out)
    judge = make_judge(make_reward(RewardConfig(("learned",)), model.tokenizer, model), model.tokenizer)
    candidates = jax.device_get(candidates_rollout(pairs))
    rewards = in_blocks(lambda index, part: judge(part), candidates, SEQUENCES, "check the sign").reshape(-1, 2)
    first = pairs.labels[:, 0] > pairs.labels[:, 1]
    preferred, rejected = np.where(first, rewards.T, rewards.T[::-1])
    if warning := check_preferred(preferred, rejected):
        print(f"warning: {warning}")
