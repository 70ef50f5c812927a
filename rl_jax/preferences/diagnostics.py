"""What is measured of a reward model on judgements that it has not learned from; on the host.

Letters: M prompts, K candidate completions of each, R raters. Pairs are taken as independent of each other: where many
share a completion, the intervals are too narrow.
"""

import math
from typing import Any

import chex
import numpy as np
from scipy.special import expit
from scipy.stats import kendalltau, pearsonr, spearmanr

from rl_jax.evaluation import Estimate, mean_interval

NORMAL = 1.959964  # standard deviations on either side of the mean that hold 95 % of a normal distribution


def wilson_interval(values: np.ndarray) -> Estimate:
    """Mean of values in [0, 1], [n], with Wilson's 95 % interval (1927); NaN, 0 and 1 of none.

    Values within (a tie, the share of judges) vary less than the zeros and ones that it is made for, and make it wide.
    """
    chex.assert_rank(values, 1)
    count = len(values)
    if not count:
        return Estimate(math.nan, 0.0, 1.0)
    share, weight = float(np.mean(values)), NORMAL**2 / count
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    return Estimate(share, max(centre - half, 0.0), min(centre + half, 1.0))


def agreement(difference: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """1 where two signs are the same, 0 where not, 0.5 where `difference` is 0; NaN where `preference` is 0 or NaN.

    Args:
        difference: the reward of the first of a pair less that of the second. [M].
        preference: above 0 where the first is preferred, below where the second. [M].
    """
    chex.assert_rank([difference, preference], 1)
    chex.assert_equal_shape([difference, preference])
    agree = (1 + np.sign(difference) * np.sign(preference)) / 2
    return np.where(preference == 0, np.nan, agree)  # a NaN is one already


def pair_accuracy(rewards: np.ndarray, labels: np.ndarray) -> Estimate:
    """Share of pairs whose preferred candidate has the higher reward; equal rewards count half, tied pairs not at all.

    Args:
        rewards: [M, 2].
        labels: share of the judges who prefer each. [M, 2].
    """
    return wilson_interval(_known(agreement(*_differences(rewards, labels))))


def log_loss(rewards: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy of the judges' shares under P(first is preferred) = sigmoid(r_1 - r_2), nats a pair.

    Args:
        rewards: [M, 2].
        labels: [M, 2].
    """
    difference, _ = _differences(rewards, labels)
    return float(np.mean(labels[:, 0] * np.logaddexp(0, -difference) + labels[:, 1] * np.logaddexp(0, difference)))


def reliability(rewards: np.ndarray, labels: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """How often a pair's likelier candidate is preferred, beside the probability that the rewards give it.

    Each pair counts once, with the side whose reward is the higher as the prediction.

    Args:
        rewards: [M, 2].
        labels: [M, 2].
        bins: of equal width, from a probability of 0.5 to 1.

    Returns:
        For each bin that has a pair: confidence, the mean probability; observed, the mean share of the judges, and the
        ends of its interval, low and high; and pairs, how many.
    """
    difference, _ = _differences(rewards, labels)
    confidence = expit(np.abs(difference))
    first, second = labels.T
    observed = np.where(difference > 0, first, np.where(difference < 0, second, 0.5))
    number = np.minimum((2 * bins * (confidence - 0.5)).astype(int), bins - 1)
    chosen = [number == n for n in range(bins)]
    return [{"confidence": float(confidence[c].mean()), **_row(observed[c], "observed")} for c in chosen if c.any()]


def expected_calibration_error(rows: list[dict[str, float]]) -> float:
    """ECE (Guo 2017, eq. 3): how far the bins of `reliability` lie from the diagonal, the mean over pairs."""
    pairs = sum(row["pairs"] for row in rows)
    return sum(row["pairs"] * abs(row["observed"] - row["confidence"]) for row in rows) / pairs if pairs else math.nan


def accuracy_by_gap(rewards: np.ndarray, labels: np.ndarray, gaps: np.ndarray, bins: int = 5) -> list[dict[str, float]]:
    """Pair accuracy where the candidates really are close, and where they are far apart.

    Args:
        rewards: [M, 2].
        labels: [M, 2].
        gaps: how far apart the candidates are, in the unit of the ratings; its sign means nothing, NaN is unknown. [M].
        bins: of as many pairs each as the gaps allow; equal gaps are never parted.

    Returns:
        For each bin, from small to large: gap, the mean; accuracy, low, high; pairs.
    """
    chex.assert_shape(gaps, (len(rewards),))
    agree, gaps = agreement(*_differences(rewards, labels)), np.abs(gaps)
    known = np.isfinite(agree) & np.isfinite(gaps)
    agree, gaps = agree[known], gaps[known]
    edges = np.unique(np.quantile(gaps, np.arange(1, bins) / bins)) if len(gaps) else np.zeros(0)
    number = np.searchsorted(edges, gaps)  # a gap on an edge lies below it
    chosen = [number == n for n in range(len(edges) + 1)]
    return [{"gap": float(gaps[c].mean()), **_row(agree[c], "accuracy")} for c in chosen if c.any()]


def agreement_by_rater(rewards: np.ndarray, raters: np.ndarray) -> list[dict[str, float]]:
    """How often the higher reward is that of the candidate that a rater prefers.

    Args:
        rewards: [M, 2].
        raters: each rater's vote for the first candidate: 1, 0, 0.5 for a tie, NaN where there is none. [M, R].

    Returns:
        For each rater who prefers any: rater, the column; accuracy, low, high; pairs; and others, how often the rater
        agrees with most of the other raters, NaN where none of them voted.
    """
    chex.assert_shape([rewards, raters], [(len(rewards), 2), (len(rewards), None)])
    preference = np.asarray(raters, np.float64) - 0.5
    total = np.nan_to_num(preference).sum(axis=1)
    rows = []
    for rater in range(preference.shape[1]):
        own = preference[:, rater]
        agree = _known(agreement(rewards[:, 0] - rewards[:, 1], own))
        rest = total - np.nan_to_num(own)  # its sign is that of the majority, 0 where there is none
        others = _known(agreement(np.where(own == 0, np.nan, own), rest))
        if len(agree):
            row = {"rater": rater, **_row(agree, "accuracy")}
            rows.append(row | {"others": float(others.mean()) if len(others) else math.nan})
    return rows


def pair_diagnostics(
    rewards: np.ndarray, labels: np.ndarray, gaps: np.ndarray | None = None, raters: np.ndarray | None = None
) -> dict[str, Any]:
    """All of the above, by the names of `summary.json`.

    Args:
        rewards: of held-out pairs. [M, 2].
        labels: share of the judges who prefer each, the sum is 1. [M, 2].
        gaps: see `accuracy_by_gap`. [M].
        raters: see `agreement_by_rater`. [M, R].

    Returns:
        pair_accuracy and pair_accuracy_interval; log_loss, nats a pair; ece; reliability; pairs, how many are not tied,
        and tied, how many are; with gaps accuracy_by_gap; with raters agreement_by_rater, and agreement_with_raters and
        agreement_among_raters, the means over raters of accuracy and of others.
    """
    rewards, labels = np.asarray(rewards, np.float64), np.asarray(labels, np.float64)
    accuracy, rows = pair_accuracy(rewards, labels), reliability(rewards, labels)
    tied = int((labels[:, 0] == labels[:, 1]).sum())
    found: dict[str, Any] = {
        "pair_accuracy": accuracy.value,
        "pair_accuracy_interval": [accuracy.low, accuracy.high],
        "pairs": len(labels) - tied,
        "tied": tied,
        "log_loss": log_loss(rewards, labels) if len(labels) else math.nan,
        "ece": expected_calibration_error(rows),
        "reliability": rows,
    }
    if gaps is not None and np.isfinite(gaps).any():
        found["accuracy_by_gap"] = accuracy_by_gap(rewards, labels, gaps)
    if raters is not None and (by_rater := agreement_by_rater(rewards, raters)):
        found["agreement_by_rater"] = by_rater
        found["agreement_with_raters"] = float(np.mean([row["accuracy"] for row in by_rater]))
        others = _known(np.array([row["others"] for row in by_rater]))
        found["agreement_among_raters"] = float(others.mean()) if len(others) else math.nan
    return found


def ranking_diagnostics(rewards: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """How well rewards order the candidates of each prompt.

    Args:
        rewards: [M, K].
        labels: numbers that order the candidates, higher is better. [M, K].
        mask: true on candidates that there are. bool [M, K].

    Returns:
        kendall_tau, the mean over prompts of Kendall's tau-b, 0 where all rewards are equal, and kendall_tau_interval;
        rankings, the number of prompts whose candidates are not all tied.
    """
    chex.assert_rank([rewards, labels, mask], 2)
    chex.assert_equal_shape([rewards, labels, mask])
    pairs = [(r[m], x[m]) for r, x, m in zip(np.asarray(rewards), np.asarray(labels), np.asarray(mask), strict=True)]
    pairs = [(r, x) for r, x in pairs if len(np.unique(x)) > 1]
    taus = np.array([kendalltau(r, x).statistic if len(np.unique(r)) > 1 else 0.0 for r, x in pairs])
    tau = mean_interval(taus) if len(taus) else Estimate(math.nan, -1.0, 1.0)
    return {
        "kendall_tau": tau.value,
        "kendall_tau_interval": [max(tau.low, -1.0), min(tau.high, 1.0)],
        "rankings": len(taus),
    }


def rating_diagnostics(rewards: np.ndarray, ratings: np.ndarray) -> dict[str, Any]:
    """Pearson's and Spearman's correlation of rewards with ratings, NaN where either are all equal. [M], [M].

    Returns:
        pearson and spearman, pearson_interval (Fisher 1921), spearman_interval (Bonett and Wright 2000), ratings (M).
    """
    chex.assert_rank([rewards, ratings], 1)
    chex.assert_equal_shape([rewards, ratings])
    vary = min(len(np.unique(rewards)), len(np.unique(ratings))) > 1
    pearson, spearman = (float(fn(rewards, ratings).statistic) if vary else math.nan for fn in (pearsonr, spearmanr))
    spreads = {"pearson": (pearson, 1.0), "spearman": (spearman, 1 + spearman**2 / 2)}
    found: dict[str, Any] = {name: value for name, (value, _) in spreads.items()}
    for name, (value, spread) in spreads.items():
        half = NORMAL * math.sqrt(spread / (len(rewards) - 3)) if vary and len(rewards) > 3 else math.inf
        centre = float(np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12))) if vary else 0.0
        found[f"{name}_interval"] = [math.tanh(centre - half), math.tanh(centre + half)]
    return found | {"ratings": len(rewards)}


def _differences(rewards: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First less second, of rewards and of labels. [M, 2], [M, 2] -> [M], [M]."""
    chex.assert_shape([rewards, labels], (len(rewards), 2))
    return rewards[:, 0] - rewards[:, 1], labels[:, 0] - labels[:, 1]


def _known(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _row(values: np.ndarray, name: str) -> dict[str, float]:
    estimate = wilson_interval(values)
    return {name: estimate.value, "low": estimate.low, "high": estimate.high, "pairs": len(values)}
