"""Rewards computed from strings in Python, and the one boundary on the host where they are called."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rl_jax.errors import InputError
from rl_jax.run.interrupt import TimeUp, time_limit

TIME_LIMIT = 60.0  # seconds that a text reward may take for a completion

TextReward = Callable[..., float]
"""Prompt, completion -> reward; or prompt, completion, the row of a file that the prompt is from -> reward."""

Row = Mapping[str, Any]
"""A row of a file, by the names of its columns."""

FailureFn = Callable[[int, InputError], float]
"""Number of a completion, why its reward failed -> the reward that it gets instead; or it raises the error."""


def raise_failure(number: int, error: InputError) -> float:
    """No reward is replaced: what failed is raised."""
    raise error


def sentiment(prompt: str, completion: str) -> float:
    """Sentiment of the completion: VADER's compound score (Hutto and Gilbert 2014), in [-1, 1]."""
    return _analyzer().polarity_scores(completion)["compound"]


_analyzer = functools.cache(SentimentIntensityAnalyzer)  # which reads its lexicon from a file


def keyword_reward(completion: str, keywords: Sequence[str]) -> float:
    """Share of the keywords that occur in the completion as whole words, in any case."""
    patterns = (rf"(?<!\w){re.escape(keyword)}(?!\w)" for keyword in keywords)
    return sum(bool(re.search(pattern, completion, re.IGNORECASE)) for pattern in patterns) / len(keywords)


def regex_reward(completion: str, pattern: str) -> float:
    """1 if the regular expression matches anywhere in the completion, else 0."""
    return float(bool(re.search(pattern, completion)))


def score_texts(
    reward: TextReward,
    prompts: Sequence[str],
    completions: Sequence[str],
    rows: Sequence[Row | None] | None = None,
    *,
    limit: float = TIME_LIMIT,
    on_failure: FailureFn = raise_failure,
) -> np.ndarray:
    """Calls a text reward on each prompt and its completion.

    Args:
        reward: what is called.
        prompts: [B].
        completions: [B].
        rows: what the reward is given as its third argument; None for a reward of two. [B].
        limit: seconds that a call may take. It holds in the main thread, for what runs in Python: see `time_limit`.
        on_failure: what becomes of a completion whose reward raised, took longer than the limit, or was something other
            than a finite number.

    Returns:
        float32 [B].

    Raises:
        InputError: from `on_failure`.
    """
    rewards = np.empty(len(completions), np.float32)
    columns = (prompts, completions) if rows is None else (prompts, completions, rows)
    for index, given in enumerate(zip(*columns, strict=True)):
        try:
            with time_limit(limit):
                rewards[index] = score_text(reward, *given)
        except InputError as error:
            failure = InputError(f"completion {index} of {len(completions)}: {error}")
            failure.__cause__ = error
            rewards[index] = on_failure(index, failure)
    return rewards


def score_text(reward: TextReward, prompt: str, completion: str, *row: Row | None) -> float:
    """Calls a text reward once; an InputError names the reward and shows the completion."""
    name, shown = getattr(reward, "__qualname__", repr(reward)), _shown(completion)
    try:
        value = np.asarray(reward(prompt, completion, *row))
    except InputError:  # from a part of this reward, and already explained
        raise
    except TimeUp as up:
        raise InputError(f"the reward {name} took longer than {up} s; the completion was {shown}") from None
    except Exception as error:
        raise InputError(
            f"the reward {name} failed with {type(error).__name__}: {error}; the completion was {shown}"
        ) from error
    if value.ndim > 0 or value.dtype.kind not in "biuf":
        raise InputError(f"the reward {name} gave {value!r}, not a number; the completion was {shown}")
    if not abs(value) <= np.finfo(np.float32).max:
        raise InputError(f"the reward {name} gave {value}, not a finite number; the completion was {shown}")
    return float(value)


def _shown(completion: str, characters: int = 200) -> str:
    return repr(completion if len(completion) <= characters else completion[:characters] + "...")
