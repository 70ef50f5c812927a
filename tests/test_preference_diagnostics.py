"""What is measured of a reward model, against hand constants, SciPy, and the same in plain Python."""

import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from rl_jax.preferences import diagnostics
from rl_jax.preferences.diagnostics import pair_diagnostics, ranking_diagnostics, rating_diagnostics

NAN = math.nan
RNG = np.random.default_rng(0)
REWARDS = np.round(RNG.normal(0, 2, (400, 2)), 1)  # some are equal
SHARES = RNG.binomial(4, 0.5, 400) / 4  # some are tied
LABELS = np.stack([SHARES, 1 - SHARES], axis=1)


@pytest.mark.parametrize("right, count", [(0, 5), (5, 5), (3, 10), (81, 100)])
def test_wilson_interval_is_wilsons(right, count):
    estimate = diagnostics.wilson_interval(np.repeat([1.0, 0.0], [right, count - right]))
    expected = binomtest(right, count).proportion_ci(method="wilson")
    np.testing.assert_allclose(estimate, (right / count, expected.low, expected.high), atol=1e-7)


def test_wilson_interval_of_none_says_nothing():
    assert str(tuple(diagnostics.wilson_interval(np.zeros(0)))) == "(nan, 0.0, 1.0)"


def test_pair_accuracy_by_hand():
    """Right, wrong, right by the second, equal rewards; and a tie that does not count."""
    rewards = np.array([[2.0, 1.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0], [9.0, 0.0]])
    labels = np.array([[1.0, 0.0], [0.75, 0.25], [0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    found = pair_diagnostics(rewards, labels)
    assert found["pair_accuracy"] == 2.5 / 4 and (found["pairs"], found["tied"]) == (4, 1)
    assert found["pair_accuracy_interval"] == pytest.approx(wilson(2.5, 4))


def wilson(right: float, count: int) -> list[float]:
    """By its definition: shares p at which |right / count - p| is 1.96 standard errors of p."""
    z, share = float(norm.ppf(0.975)), right / count
    a, b, c = 1 + z**2 / count, -(2 * share + z**2 / count), share**2
    return [(-b + sign * math.sqrt(b**2 - 4 * a * c)) / (2 * a) for sign in (-1, 1)]


def plain_pairs() -> tuple[list[tuple[float, float]], list[float], float]:
    """Confidence and share of each pair, agreement of those that are not tied, and the log-loss."""
    folded, agree, loss = [], [], 0.0
    for (r0, r1), (l0, l1) in zip(REWARDS.tolist(), LABELS.tolist(), strict=True):
        p = 1 / (1 + math.exp(r1 - r0))
        folded.append((p, l0) if r0 > r1 else (1 - p, l1) if r1 > r0 else (0.5, 0.5))
        loss -= (l0 * math.log(p) + l1 * math.log(1 - p)) / len(REWARDS)
        if l0 != l1:
            agree.append(0.5 if r0 == r1 else float((r0 > r1) == (l0 > l1)))
    return folded, agree, loss


def test_pair_diagnostics_against_plain_python():
    found = pair_diagnostics(REWARDS, LABELS)
    folded, agree, loss = plain_pairs()
    assert found["pair_accuracy"] == pytest.approx(sum(agree) / len(agree))
    assert found["log_loss"] == pytest.approx(loss)
    rows, error = [], 0.0
    for n in range(10):
        low, high = 0.5 + n / 20, 0.55 + n / 20
        inside = [(p, s) for p, s in folded if low <= p < high or (n == 9 and p == 1)]
        p, share = (sum(x) / len(inside) for x in zip(*inside, strict=True))
        error += len(inside) / len(folded) * abs(p - share)
        rows.append((p, share, *wilson(share * len(inside), len(inside)), len(inside)))
    names = ("confidence", "observed", "low", "high", "pairs")
    np.testing.assert_allclose([[row[name] for name in names] for row in found["reliability"]], rows, rtol=1e-6)
    assert found["ece"] == pytest.approx(error)
    assert sum(row["pairs"] for row in found["reliability"]) == 400


def test_ece_by_hand():
    """Three pairs at sigmoid(log 3) = 0.75, of which the judges are with one and a half; one at 0.9 that is right."""
    rewards = np.array([[math.log(3), 0.0], [0.0, math.log(3)], [math.log(3), 0.0], [0.0, math.log(9)]])
    labels = np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    found = pair_diagnostics(rewards, labels)
    assert [(row["pairs"], round(row["observed"], 9)) for row in found["reliability"]] == [(3, 0.5), (1, 1.0)]
    assert found["ece"] == pytest.approx((3 * 0.25 + 0.1) / 4)


def test_certainty_has_a_bin():
    (row,) = diagnostics.reliability(np.array([[1000.0, 0.0], [0.0, 800.0]]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert (row["confidence"], row["observed"], row["pairs"]) == (1.0, 0.5, 2)


def test_rewards_that_are_the_truth_are_calibrated():
    difference = RNG.normal(0, 2, 40_000)
    first = RNG.random(40_000) < 1 / (1 + np.exp(-difference))
    rewards, labels = np.stack([difference, np.zeros(40_000)], axis=1), np.stack([first, ~first], axis=1).astype(float)
    honest, bold = pair_diagnostics(rewards, labels), pair_diagnostics(3 * rewards, labels)
    assert honest["ece"] < 0.01 < 0.08 < bold["ece"]
    inside = [row["low"] < row["confidence"] < row["high"] for row in honest["reliability"]]
    assert sum(inside) >= 9 and honest["log_loss"] < bold["log_loss"]
    assert honest["pair_accuracy"] == bold["pair_accuracy"]


def test_accuracy_by_gap_by_hand():
    """Ten untied pairs, gaps 0 to 9 of both signs, right from 4 on; one whose gap is unknown, and one tied."""
    gaps = np.array([0, -1, 2, -3, 4, -5, 6, -7, 8, -9, NAN, 100])
    rewards = np.stack([np.where(np.abs(gaps) >= 4, 1.0, -1.0), np.zeros(12)], axis=1)
    labels = np.stack([np.where(np.arange(12) == 11, 0.5, 1.0), np.where(np.arange(12) == 11, 0.5, 0.0)], axis=1)
    rows = diagnostics.accuracy_by_gap(rewards, labels, gaps, bins=5)
    assert [(row["gap"], row["accuracy"], row["pairs"]) for row in rows] == [
        (0.5, 0.0, 2),
        (2.5, 0.0, 2),
        (4.5, 1.0, 2),
        (6.5, 1.0, 2),
        (8.5, 1.0, 2),
    ]
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx(tuple(wilson(0, 2)), abs=1e-6)


def test_equal_gaps_are_never_parted():
    gaps = np.repeat([1.0, 2.0], [90, 10])
    rows = diagnostics.accuracy_by_gap(REWARDS[:100], np.tile([1.0, 0.0], (100, 1)), gaps)
    assert [(row["gap"], row["pairs"]) for row in rows] == [(1.0, 90), (2.0, 10)]
    assert diagnostics.accuracy_by_gap(REWARDS[:2], LABELS[:2], np.array([NAN, NAN])) == []


def test_agreement_by_rater_by_hand():
    rewards = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [1.0, 0.0]])
    raters = np.array(
        [  # the last never votes
            [1.0, 0.0, 1.0, NAN],
            [1.0, 1.0, NAN, NAN],
            [0.5, 0.0, 1.0, NAN],
            [NAN, NAN, 0.0, NAN],
            [0.5, 1.0, 1.0, NAN],
        ]
    )
    rows = diagnostics.agreement_by_rater(rewards, raters)
    assert [(row["rater"], row["accuracy"], row["pairs"]) for row in rows] == [
        (0, 1.0, 2),  # the ties are left out
        (1, 3 / 4, 4),
        (2, (1 + 0 + 0.5 + 1) / 4, 4),
    ]
    # Rater 0: the others are split, then with. 1: against, with, against, with. 2: split, against, nobody, with.
    assert [row["others"] for row in rows] == [1.0, 0.5, 0.5]
    found = pair_diagnostics(rewards, np.tile([1.0, 0.0], (5, 1)), raters=raters)
    assert found["agreement_with_raters"] == pytest.approx((1 + 3 / 4 + 5 / 8) / 3)
    assert found["agreement_among_raters"] == pytest.approx(2 / 3)


def test_a_rater_without_others():
    found = pair_diagnostics(np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]]), raters=np.array([[1.0]]))
    assert found["agreement_with_raters"] == 1.0 and math.isnan(found["agreement_among_raters"])
    assert "agreement_by_rater" not in pair_diagnostics(REWARDS[:1], LABELS[:1], raters=np.array([[NAN, 0.5]]))


def test_diagnostics_are_json_and_whole():
    raters = np.where(RNG.random((400, 3)) < 0.2, NAN, RNG.integers(0, 2, (400, 3)))
    found = pair_diagnostics(REWARDS.astype(np.float32), LABELS.astype(np.float32), RNG.random(400), raters)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {"accuracy_by_gap", "agreement_by_rater"} <= set(found)
    empty = pair_diagnostics(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0), np.zeros((0, 2)))
    assert math.isnan(empty["pair_accuracy"]) and empty["reliability"] == []


def plain_tau(rewards: list[float], labels: list[float]) -> float:
    """Tau-b, by every pair."""
    signs = [
        (np.sign(rewards[i] - rewards[j]), np.sign(labels[i] - labels[j]))
        for i in range(len(rewards))
        for j in range(i)
    ]
    return sum(a * b for a, b in signs) / math.sqrt(sum(a * a for a, _ in signs) * sum(b * b for _, b in signs))


def test_ranking_diagnostics():
    rewards = np.array([[3.0, 2.0, 1.0, 9.0], [1.0, 2.0, 2.0, 4.0], [1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    labels = np.array([[3.0, 2.0, 1.0, 0.0], [1.0, 3.0, 2.0, 2.0], [1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0]])
    mask = np.array([[True, True, True, False], [True] * 4, [True] * 4, [True] * 4])
    found = ranking_diagnostics(rewards, labels, mask)
    taus = [1.0, plain_tau(rewards[1].tolist(), labels[1].tolist()), 0.0]
    assert found["kendall_tau"] == pytest.approx(np.mean(taus)) and found["rankings"] == 3
    half = 4.302653 * np.std(taus, ddof=1) / math.sqrt(3)  # Student's, two degrees of freedom
    assert found["kendall_tau_interval"] == pytest.approx([max(np.mean(taus) - half, -1), min(np.mean(taus) + half, 1)])
    assert math.isnan(ranking_diagnostics(rewards, labels, np.zeros_like(mask))["kendall_tau"])


def test_rating_diagnostics():
    ratings = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = rating_diagnostics(np.array([1.0, 3.0, 2.0, 4.0, 10.0]), ratings)
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (5 * 24)) and found["ratings"] == 5  # two ranks differ by 1
    assert found["pearson"] == pytest.approx(19 / math.sqrt(10 * 50))
    half = 1.959964 / math.sqrt(2)
    expected = [math.tanh(math.atanh(found["pearson"]) + sign * half) for sign in (-1, 1)]
    assert found["pearson_interval"] == pytest.approx(expected)
    half *= math.sqrt(1 + 0.9**2 / 2)
    assert found["spearman_interval"] == pytest.approx([math.tanh(math.atanh(0.9) + s * half) for s in (-1, 1)])
    assert rating_diagnostics(ratings, ratings)["pearson_interval"][1] == pytest.approx(1)
    constant = rating_diagnostics(np.ones(5), ratings)
    assert math.isnan(constant["pearson"]) and constant["pearson_interval"] == [-1.0, 1.0]


def test_shapes_are_checked():
    for rewards, labels in ((REWARDS[:, 0], LABELS), (REWARDS, LABELS[:5]), (REWARDS[:, :1], LABELS[:, :1])):
        with pytest.raises(AssertionError):
            diagnostics.pair_accuracy(rewards, labels)
