"""Statistics of completions, on the host, with intervals that know that a prompt's completions are not independent.

Letters: N prompts, G completions of each.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit


class Estimate(NamedTuple):
    """A mean and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def mean_interval(values: np.ndarray) -> Estimate:
    """Mean of values [N, G], with Student's interval over the N means of the prompts; infinite for one prompt."""
    means = np.asarray(values, np.float64).mean(axis=1)
    mean, prompts = float(means.mean()), len(means)
    if prompts < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = float(stdtrit(prompts - 1, 0.975) * means.std(ddof=1) / math.sqrt(prompts))
    return Estimate(mean, mean - half, mean + half)


def win_rate(challenger: np.ndarray, incumbent: np.ndarray) -> Estimate:
    """Share of pairs of completions of the same prompt in which the challenger's has the higher reward.

    Ties count half. Every completion of one is paired with every one of the other.

    Args:
        challenger: rewards [N, G].
        incumbent: rewards [N, G'].
    """
    difference = np.asarray(challenger)[:, :, None] - np.asarray(incumbent)[:, None, :]
    wins = (np.sign(difference) + 1) / 2
    rate = mean_interval(wins.reshape(len(wins), -1))
    return Estimate(rate.value, max(rate.low, 0.0), min(rate.high, 1.0))


def distinct_n(completions: Iterable[Sequence[int]], n: int) -> float:
    """Share of all n-grams of all completions that are distinct (Li 2016, "A diversity-promoting objective")."""
    grams = [tuple(tokens[i : i + n]) for tokens in completions for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)
