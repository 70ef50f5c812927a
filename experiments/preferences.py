"""Preferences in the pipeline: what a reward model is trained from in each round, and the models that come of it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.complete import Sampled, complete
from experiments.judge import make_judge
from experiments.judgements import HELD_OUT, Judgements, judge_pairs, load_judgements, read_pairs, write_pairs
from experiments.pretrain import check_counts
from experiments.reinforce import Prompts
from experiments.train_reward import Learning, check, train_reward
from rl_jax.errors import InputError
from rl_jax.keys import Purpose, step_key
from rl_jax.models.huggingface import Policy
from rl_jax.models.reward_model import RewardModel, save_reward_model
from rl_jax.models.transformer import TransformerConfig
from rl_jax.rewards.compose import Reward
from rl_jax.run.metrics import MetricsWriter
from rl_jax.run.spmd import make_mesh, put
from rl_jax.sampling import Sampling
from rl_jax.types import PreferenceBatch, PyTree

NORMALIZING = 256  # prompts that the reference policy completes to normalise the reward, twice each


@dataclasses.dataclass(frozen=True)
class Preferring:
    """Preferences: what the reward learned is learned from."""

    file: Path | None = None
    """Judgements, as for train_reward.py; without it, the gold reward judges pairs of the policy's own completions."""
    held_out: Path | None = None
    """File of judgements to measure on; without it, a tenth of the others."""
    pairs: int = 1024
    """Pairs that the gold reward judges in a round."""
    noise: float = 0.25
    """Standard deviations of the gold reward in which the odds of its judgement gain a factor of e; 0 for none."""
    rounds: int = 1
    """Times that pairs are judged, of the policy as it then is, and the reward model is trained anew from all of them;
    at equal intervals of RL."""


class Learned(NamedTuple):
    """The reward model of a round, and what is measured of it."""

    model: RewardModel
    summary: dict[str, Any]


LearnFn = Callable[[PyTree, int], Learned]
"""The policy's params, number of the round, from 1 -> what is learned in it."""


def check_preferring(
    settings: Preferring, learning: Learning, config: TransformerConfig, gold: Reward | None, steps: int, seed: int
) -> None:
    """Raise InputError for settings that cannot work, before anything is trained. `steps`: updates of RL."""
    check_counts({"pairs": settings.pairs, "rounds": settings.rounds})
    if settings.file is None and gold is None:
        raise InputError("A reward is learned from preferences: give preferences.file, or gold to judge by.")
    if settings.file is not None and settings.rounds > 1:
        raise InputError("Later rounds need a judge for new pairs: give gold in place of preferences.file, or 1 round.")
    if settings.file is None and settings.held_out is not None:
        raise InputError("held_out has no effect without preferences.file; leave it out.")
    if settings.rounds > steps:
        raise InputError(f"{settings.rounds} rounds do not divide {steps} updates of RL: give more updates.")
    if not 0 <= settings.noise < np.inf:
        raise InputError(f"noise is {settings.noise}; it must be a number of at least 0.")
    if settings.file is None:
        check(learning, config, "pairs", settings.pairs - round(HELD_OUT * settings.pairs), seed)


def make_learn(
    settings: Preferring,
    learning: Learning,
    policy: Policy,
    gold: Reward | None,
    prompts: Prompts,
    sampling: Sampling,
    seed: int,
    run: Path,
    writer: MetricsWriter,
) -> LearnFn:
    """A function that makes the reward model of a round.

    It collects the round's judgements, unless the run's folder has them, and trains from those of all rounds so far.

    Args:
        settings: which preferences.
        learning: how the reward model is trained.
        policy: whose backbone it begins with, and on whose completions it is normalised.
        gold: who judges, where there is no file.
        prompts: those to learn from are completed.
        sampling: as in RL.
        seed: of everything random.
        run: the run's folder.
        writer: of metrics.
    """
    judges = {} if gold is None else {"gold": make_judge(gold, policy.tokenizer)}
    in_pairs = dataclasses.replace(sampling, group_size=2)

    def pairs(params: PyTree, key: jax.Array, number: int, count: int) -> Sampled:
        order = np.random.default_rng([seed, Purpose.PREFERENCE, number]).permutation(len(prompts.train[0]))
        rows, (asked, mask) = np.resize(order, count), prompts.train
        chosen = asked[rows], mask[rows]
        return complete(policy._replace(params=params), None, chosen, judges, in_pairs, key, "preferences")

    reference = pairs(policy.params, step_key(seed, Purpose.REFERENCE, 1), 0, NORMALIZING).rollout

    def judgements(params: PyTree, number: int) -> Judgements:
        if settings.file is not None:
            return load_judgements(settings.file, settings.held_out, policy.tokenizer, policy.config.context)
        path = run / f"preferences_{number}.safetensors"
        if not path.exists():
            sampled = pairs(params, step_key(seed, Purpose.PREFERENCE, number), number, settings.pairs)
            judged = judge_pairs(sampled.rollout, sampled.rewards["gold"], settings.noise, seed + number)
            write_pairs(path, *judged, policy.tokenizer)
        kept = settings.pairs - round(HELD_OUT * settings.pairs)
        rounds = [read_pairs(run / f"preferences_{n}.safetensors") for n in range(1, number + 1)]
        train, held_out = (_join(rounds, part) for part in (slice(kept), slice(kept, None)))
        return Judgements(*train[:1], *held_out, votes=np.zeros((len(held_out[1]), 0)))

    def learn(params: PyTree, number: int) -> Learned:
        data, stage = judgements(params, number), "reward" if number == 1 else f"reward_{number}"
        model, summary = train_reward(learning, policy, data, reference, seed, run, writer, stage)
        save_reward_model(run / stage, model)
        return Learned(model, summary)

    return learn


def _join(rounds: list[tuple[PreferenceBatch, np.ndarray]], part: slice) -> tuple[PreferenceBatch, np.ndarray]:
    """The same part of the pairs of every round, and of their gaps."""
    return jax.tree.map(lambda *rows: np.concatenate([x[part] for x in rows]), *rounds)


def make_refresh(learn: LearnFn, models: list[Learned], rounds: int, steps: int) -> Callable[[PyTree, int], PyTree]:
    """The reward's params for each step of RL: those of its round, which is learned when RL comes to it.

    Args:
        learn: makes the reward model of a round.
        models: of the rounds so far, the first at least; those that are learned are added to it.
        rounds: how many.
        steps: updates of RL.
    """
    mesh = make_mesh()
    placed = {1: put(models[0].model.params, mesh)}

    def refresh(params: PyTree, step: int) -> PyTree:
        number = 1 + step * rounds // steps
        if number not in placed:
            models.append(learn(params, number))
            placed.clear()
            placed[number] = put(models[-1].model.params, mesh)
        return placed[number]

    return refresh
