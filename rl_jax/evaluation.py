"""Statistics of completions, on the host, with intervals that know that a prompt's completions are not independent.

Letters: N prompts, G completions of each, B = N * G.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import chex
import numpy as np
from scipy.special import stdtrit

from rl_jax.errors import InputError

Judge = Callable[[str, str, str], float]
"""Prompt, first completion, second completion -> probability that the first is the better, 0.5 for a tie."""


class Estimate(NamedTuple):
    """A mean and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def mean_interval(values: np.ndarray) -> Estimate:
    """Mean of values [N, G], with Student's interval over the N means of the prompts; infinite for one prompt.

    Of values [N], such as those of seeds, the interval is over them.
    """
    means = np.asarray(values, np.float64)
    means = means.mean(axis=1) if means.ndim > 1 else means
    mean, prompts = float(means.mean()), len(means)
    if prompts < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = float(stdtrit(prompts - 1, 0.975) * means.std(ddof=1) / math.sqrt(prompts))
    return Estimate(mean, mean - half, mean + half)


def share_interval(shares: np.ndarray) -> Estimate:
    """`mean_interval` of shares, [N, G] or [N], each in [0, 1]; so are the ends of the interval."""
    return Estimate(*np.clip(mean_interval(shares), 0.0, 1.0).tolist())


def win_shares(challenger: np.ndarray, incumbent: np.ndarray) -> np.ndarray:
    """Share of the incumbent's completions of the same prompt that each of the challenger's has a higher reward than.

    Ties count half.

    Args:
        challenger: rewards [N, G].
        incumbent: rewards [N, G'].

    Returns:
        float64 [N, G].
    """
    challenger, incumbent = np.asarray(challenger), np.asarray(incumbent)
    chex.assert_rank([challenger, incumbent], 2)
    chex.assert_equal_shape_prefix([challenger, incumbent], 1)
    above = np.sign(challenger[:, :, None] - incumbent[:, None, :])
    return ((above + 1) / 2).mean(axis=2, dtype=np.float64)


def win_rate(challenger: np.ndarray, incumbent: np.ndarray) -> Estimate:
    """Share of the pairs of completions of a prompt that the challenger wins: the mean of `win_shares`.

    Args:
        challenger: rewards [N, G].
        incumbent: rewards [N, G'].
    """
    return share_interval(win_shares(challenger, incumbent))


def ask_judge(judge: Judge, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """What a judge says of pairs of completions, asked in both orders, because judges favour a place.

    Args:
        judge: see `Judge`.
        prompts: B of them.
        first: a completion of each.
        second: another.

    Returns:
        The probability that the completion shown first is the better: of `first` shown first, and of `second` shown
        first. float64 [B, 2].

    Raises:
        InputError: the judge failed, or gave something other than a number from 0 to 1.
    """
    verdicts = np.empty((len(prompts), 2))
    for row, (prompt, a, b) in enumerate(zip(prompts, first, second, strict=True)):
        verdicts[row] = _ask(judge, prompt, a, b), _ask(judge, prompt, b, a)
    return verdicts


def judged_shares(verdicts: np.ndarray) -> np.ndarray:
    """How far the first completion of a pair won, the mean of both orders: (v(a, b) + 1 - v(b, a)) / 2.

    Args:
        verdicts: from `ask_judge`. [..., 2].

    Returns:
        [...], in [0, 1].
    """
    return (verdicts[..., 0] + 1 - verdicts[..., 1]) / 2


def position_bias(verdicts: np.ndarray) -> Estimate:
    """How much a judge favours what it is shown first: the mean of v(a, b) + v(b, a) - 1, 0 where it does not.

    Args:
        verdicts: from `ask_judge`. [N, G, 2].

    Returns:
        In [-1, 1]: 1 for a judge that always takes the first, -1 for one that always takes the second.
    """
    return Estimate(*np.clip(mean_interval(verdicts.sum(axis=2) - 1), -1.0, 1.0).tolist())


def distinct_n(completions: Iterable[Sequence[int]], n: int) -> float:
    """Share of all n-grams of all completions that are distinct (Li 2016, "A diversity-promoting objective")."""
    grams = [tuple(tokens[i : i + n]) for tokens in completions for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def _ask(judge: Judge, prompt: str, first: str, second: str) -> float:
    name = getattr(judge, "__qualname__", repr(judge))
    shown = f"the completions were {first!r:.200} and {second!r:.200}"
    try:
        verdict = np.asarray(judge(prompt, first, second))
    except Exception as error:
        raise InputError(f"the judge {name} failed with {type(error).__name__}: {error}; {shown}") from error
    if verdict.ndim > 0 or verdict.dtype.kind not in "biuf" or not 0 <= verdict <= 1:
        raise InputError(
            f"the judge {name} gave {verdict!r}, not the probability that the first is the better, a number from 0 "
            f"to 1; {shown}"
        )
    return float(verdict)
