"""A reward that is learned in rounds, within the pipeline: the judgements of each round, and the models they make."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.complete import Sampled, complete
from experiments.judge import Failures, failures_kept, make_judge
from experiments.judgements import HELD_OUT, Judgements, judge_pairs, kind_of, load_judgements, read_pairs, write_pairs
from experiments.pretrain import check_counts
from experiments.reinforcing import Prompts
from experiments.train_reward import Learning, check, train_reward
from rl_jax.errors import InputError
from rl_jax.keys import Purpose, step_key
from rl_jax.models.config import TransformerConfig
from rl_jax.models.huggingface import Policy
from rl_jax.models.reward_model import RewardModel, save_reward_model
from rl_jax.rewards.compose import Reward
from rl_jax.run.metrics import MetricsWriter
from rl_jax.run.processes import is_first, wait_for_all
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
    pairs: int = 4096
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
"""The policy's params, number of the round, from 1 -> what is learned in it; asked again, the same."""


def prepare(
    settings: Preferring,
    learning: Learning,
    config: TransformerConfig,
    tokenizer: Any,
    gold: Reward | None,
    steps: int,
    seed: int,
) -> Judgements | None:
    """The judgements of the file, None without one; InputError for what cannot work, before anything is trained.

    Args:
        settings: which preferences.
        learning: how the reward model is trained.
        config: of the policy.
        tokenizer: of the policy.
        gold: who judges, where there is no file.
        steps: updates of RL.
        seed: of everything random.
    """
    check_counts({"pairs": settings.pairs, "rounds": settings.rounds})
    if settings.rounds > steps:
        raise InputError(f"{settings.rounds} rounds do not divide {steps} updates of RL: give more updates.")
    if not 0 <= settings.noise < np.inf:
        raise InputError(f"noise is {settings.noise}; it must be a number of at least 0.")
    if settings.file is None:
        if gold is None:
            raise InputError("A reward is learned from preferences: give preferences.file, or gold to judge by.")
        if settings.held_out is not None:
            raise InputError("held_out has no effect without preferences.file; leave it out.")
        check(learning, config, "pairs", settings.pairs - held_out_pairs(settings), seed)
        return None
    if dataclasses.replace(settings, file=None, held_out=None) != Preferring():
        raise InputError(
            "pairs, noise and rounds are of a gold reward's judgements: leave them out with a file of them."
        )
    data = load_judgements(settings.file, settings.held_out, tokenizer, config.context)
    check(learning, config, kind_of(data.train), len(data.train.labels), seed)
    return data


def held_out_pairs(settings: Preferring) -> int:
    """How many pairs of a round are not learned from."""
    return round(HELD_OUT * settings.pairs)


def make_learn(
    settings: Preferring,
    learning: Learning,
    given: Judgements | None,
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
        given: the judgements of a file, if there is one.
        policy: whose backbone it begins with, and on whose completions it is normalised.
        gold: who judges, where there is no file.
        prompts: those to learn from are completed; a tenth of them is for held-out pairs alone.
        sampling: as in RL.
        seed: of everything random.
        run: the run's folder.
        writer: of metrics.
    """
    failures: Failures = []
    judges = {} if gold is None else {"gold": make_judge(gold, policy.tokenizer, failures)}
    in_pairs = dataclasses.replace(sampling, group_size=2)
    order = np.random.default_rng(0).permutation(np.unique(prompts.train[0], axis=0, return_index=True)[1])
    apart = max(round(HELD_OUT * len(order)), 1)

    def sample(params: PyTree, key: jax.Array, rows: np.ndarray, stage: str) -> Sampled:
        asked, mask = prompts.train
        chosen = policy._replace(params=params)
        return complete(chosen, None, (asked[rows], mask[rows]), judges, in_pairs, key, stage)

    key = step_key(seed, Purpose.REFERENCE, 1)
    with failures_kept("normalizing", writer.keep, failures):
        reference = sample(policy.params, key, np.resize(order, NORMALIZING), "reference").rollout

    def judgements(params: PyTree, number: int) -> Judgements:
        if given is not None:
            return given
        path, kept = run / f"preferences_{number}.safetensors", settings.pairs - held_out_pairs(settings)
        if not path.exists():
            shuffled = np.random.default_rng([seed, 1, Purpose.PREFERENCE, number]).permutation(order[apart:])
            rows = np.concatenate([np.resize(shuffled, kept), np.resize(order[:apart], settings.pairs - kept)])
            with failures_kept(f"preferences_{number}", writer.keep, failures):
                sampled = sample(params, step_key(seed, Purpose.PREFERENCE, number), rows, "preferences")
            noise = [seed, 2, Purpose.PREFERENCE, number]
            judged = judge_pairs(sampled.rollout, sampled.rewards["gold"], settings.noise, noise)
            if is_first():
                write_pairs(path, *judged, policy.tokenizer)
            wait_for_all("pairs are written")
        rounds = [read_pairs(run / f"preferences_{n}.safetensors") for n in range(1, number + 1)]
        train, held_out = (_join(rounds, part) for part in (slice(kept), slice(kept, None)))
        return Judgements(train[0], held_out[0], gaps=held_out[1], votes=np.zeros((len(held_out[1]), 0)))

    learned: dict[int, Learned] = {}

    def learn(params: PyTree, number: int) -> Learned:
        if number not in learned:
            data, stage = judgements(params, number), "reward" if number == 1 else f"reward_{number}"
            learned[number] = Learned(*train_reward(learning, policy, data, reference, seed, run, writer, stage))
            save_reward_model(run / stage, learned[number].model)
        return learned[number]

    return learn


def _join(rounds: list[tuple[PreferenceBatch, np.ndarray]], part: slice) -> tuple[PreferenceBatch, np.ndarray]:
    """The same part of the pairs of every round, and of their gaps."""
    return jax.tree.map(lambda *rows: np.concatenate([x[part] for x in rows]), *rounds)
