"""The whole of a reward, on tokens and on text, of completions that exist already; and what becomes of its failures."""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rl_jax.data.prompt_rows import find_rows
from rl_jax.data.prompts import decode_completions
from rl_jax.errors import InputError
from rl_jax.models.layout import put_unchanged
from rl_jax.rewards.compose import Reward
from rl_jax.rewards.text import raise_failure, score_texts
from rl_jax.run.loop import RewardFailed
from rl_jax.run.processes import anywhere
from rl_jax.run.spmd import AS_IT_IS, fetch, join_rows, make_mesh, own_rows, pmapped
from rl_jax.types import Rollout

JudgeFn = Callable[[Rollout], np.ndarray]
"""Rollout -> reward of each completion, on the host. float32 [B]."""

Failures = list[dict[str, str]]
"""Completions whose reward failed and was replaced: prompt, completion, failure."""

KeepFn = Callable[[str, Sequence[Mapping[str, str]]], Path]
"""Name of a file, its rows -> where they are now: `MetricsWriter.keep`."""


def text_rewards(reward: Reward, tokenizer: Any, rollout: Rollout, failures: Failures) -> np.ndarray:
    """The part of a reward that is on text, of each completion. float32 [B].

    Each process rewards the completions that its own devices have, and all get the rewards of all. Of a prompt that is
    from a file the reward is told what its row says.

    Args:
        reward: of which it is.
        tokenizer: the policy's.
        rollout: the completions.
        failures: those of this process are added to it whose reward was replaced by `reward.on_failure`.

    Raises:
        RewardFailed: it failed for one, in any process, and is to stop there. The texts are this process's.
    """
    assert reward.on_text is not None, "the caller saw it"
    mesh = make_mesh()
    own = own_rows(rollout, mesh)
    texts = decode_completions(tokenizer, own.completions, own.completion_mask)
    asked, given = decode_completions(tokenizer, own.prompts, own.prompt_mask), None
    if reward.rows:
        found = find_rows(reward.rows, own.prompts, own.prompt_mask)
        asked = [text if each is None else each.prompt for text, each in zip(asked, found, strict=True)]
        given = [None if each is None else each.row for each in found]
    said = [{"prompt": prompt, "completion": text} for prompt, text in zip(asked, texts, strict=True)]

    def replace(number: int, error: InputError) -> float:
        failures.append(said[number] | {"failure": str(error)})
        return float(reward.on_failure)

    on_failure = raise_failure if reward.on_failure == "stop" else replace
    rewards, failure = np.zeros(len(texts), np.float32), None
    try:
        rewards = score_texts(reward.on_text, asked, texts, given, limit=reward.time_limit, on_failure=on_failure)
    except InputError as error:
        failure = error
    if anywhere(failure is not None):
        raise RewardFailed(str(failure or "A reward on text failed in another process."), said) from failure
    return fetch(join_rows(rewards, mesh))


def tell_failures(failures: Failures, name: str, keep: KeepFn | None = None) -> None:
    """Says what was replaced, if anything was, and keeps the texts as unrewarded_NAME.jsonl where that can be."""
    if failures:
        kept = f" The texts are in {keep(f'unrewarded_{name}', failures)}." if keep else ""
        print(f"warning: {name}: {len(failures)} rewards failed and were replaced, {failures[0]['failure']}.{kept}")


@contextlib.contextmanager
def failures_kept(name: str, keep: KeepFn | None, failures: Failures | None = None) -> Generator[Failures]:
    """Yields a list for failures, and tells of them at the end; one that stops the run has its texts kept as well."""
    failures = [] if failures is None else failures
    try:
        yield failures
    except RewardFailed as error:
        if keep is None or not error.texts:
            raise
        path = keep(f"unrewarded_{name}", error.texts)
        said = f"{error}. The texts are in {path}. Mend the reward, then add --resume to continue."
        raise RewardFailed(said, ()) from error
    tell_failures(failures, name, keep)
    failures.clear()


def make_judge(reward: Reward, tokenizer: Any, failures: Failures | None = None) -> JudgeFn:
    """A function that rewards rollouts of a policy with that tokenizer.

    Failures are added to the list where one is given; else they are told of at each call.
    """
    start = make_late_judge(reward, tokenizer)

    def judge(rollout: Rollout) -> np.ndarray:
        if failures is not None:
            return start(rollout, failures)()
        with failures_kept(reward.name, None) as told:
            return start(rollout, told)()

    return judge


def make_late_judge(reward: Reward, tokenizer: Any) -> Callable[[Rollout, Failures], Callable[[], np.ndarray]]:
    """As `make_judge`, but what it gives is called for the rewards: until then only the device is at work."""
    mesh = make_mesh()
    on_tokens = None if reward.on_tokens is None else pmapped(reward.on_tokens, mesh, (AS_IT_IS, 0), 0)
    params = put_unchanged(reward.params, mesh)

    def start(rollout: Rollout, failures: Failures) -> Callable[[], np.ndarray]:
        rewards = 0.0 if on_tokens is None else on_tokens(params, rollout)

        def finish() -> np.ndarray:
            total = np.zeros(len(rollout.completions), np.float32) + fetch(rewards)
            if reward.on_text is not None:
                total += text_rewards(reward, tokenizer, rollout, failures)
            return total

        return finish

    return start
