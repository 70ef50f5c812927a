"""Whether proxy and gold part: seldom by noise, surely where they do."""

import numpy as np
import pytest

from rl_jax.run.parting import Parting, describe_parting, parting, parting_warning, window_means

RNG = np.random.default_rng(0)


def noise(count: int, correlation: float, scale: float) -> np.ndarray:
    """AR(1), with the given standard deviation."""
    values = [RNG.normal()]
    for fresh in RNG.normal(size=count - 1):
        values.append(correlation * values[-1] + np.sqrt(1 - correlation**2) * fresh)
    return scale * np.array(values)


def rising(height: float, count: int) -> np.ndarray:
    return height * (1 - np.exp(-5 * np.linspace(0, 1, count)))


def peaked(count: int) -> np.ndarray:
    """Up to 1.5 in the first half, down to 1 in the second."""
    x = np.linspace(0, 1, count)
    return 1.5 * np.minimum(2 * x, 1) - np.maximum(x - 0.5, 0)


def share_found(proxy: np.ndarray, gold: np.ndarray, correlation: float, runs: int, scale: float = 0.15) -> float:
    count = len(gold)
    found = [
        parting(np.arange(count), proxy + noise(count, correlation, scale), gold + noise(count, correlation, scale))
        for _ in range(runs)
    ]
    return sum(one is not None for one in found) / runs


@pytest.mark.parametrize("count", [20, 100])
@pytest.mark.parametrize("correlation", [0.0, 0.3])
@pytest.mark.parametrize("gold", [0.0, 1.5])
def test_noise_is_seldom_taken_for_a_parting(count, correlation, gold):
    """The runs of quickstart have a correlation of 0.2 from one update to the next."""
    proxy = rising(2.0, count) if gold else np.zeros(count)
    assert share_found(proxy, rising(gold, count), correlation, 100) <= 0.04


def test_over_optimisation_is_found_where_it_begins():
    steps = np.arange(100, 200)
    found = [
        parting(steps, rising(3, 100) + noise(100, 0.2, 0.1), peaked(100) + noise(100, 0.2, 0.1)) for _ in range(50)
    ]
    ends = [one.step for one in found if one is not None and one.step is not None]
    assert len(ends) >= 45
    assert all(139 <= step <= 169 for step in ends)  # the peak is at 150


def test_a_fall_of_both_is_no_parting():
    assert share_found(peaked(100), peaked(100), 0.0, 50) <= 0.06


def test_a_proxy_that_rises_alone_is_found():
    steps, gold = np.arange(100), np.zeros(100)
    found = [parting(steps, rising(2, 100) + noise(100, 0.0, 0.1), gold + noise(100, 0.0, 0.1)) for _ in range(20)]
    assert sum(one is not None and one.step is None for one in found) >= 18
    slow = [parting(steps, rising(2, 100), 0.8 * np.linspace(0, 1, 100) + noise(100, 0.0, 0.1)) for _ in range(20)]
    assert slow == [None] * 20


def test_what_is_said_of_a_fall_by_hand():
    """Windows of five without noise: gold 1, 3, 2 and proxy 0, 1, 2."""
    gold, proxy = np.repeat([1.0, 3.0, 2.0], 5), np.repeat([0.0, 1.0, 2.0], 5)
    found = parting(np.arange(10, 25), proxy, gold)
    assert found == Parting(19, (3.0, 2.0), (1.0, 2.0))
    assert describe_parting(found) == (
        "The proxy and the gold reward part after step 19: gold fell from 3.00 to 2.00 while the proxy rose from 1.00 "
        "to 2.00 (standard deviations of the reference). Stop there, raise the KL coefficient, or collect preferences "
        "from the present policy."
    )
    assert parting(np.arange(15), np.repeat([0.0, 1.0, 0.7], 5), gold) is None  # the proxy fell by more than 0.25
    lower = parting(np.arange(15), np.repeat([0.0, 1.0, 0.8], 5), gold)
    assert lower is not None and "the proxy went from 1.00 to 0.80" in describe_parting(lower)
    assert parting(np.arange(15), proxy, np.repeat([-1.0, 3.0, 2.61], 5)) is None  # less than a tenth of its range
    assert parting(np.arange(15), proxy, np.repeat([-1.0, 3.0, 2.59], 5)) is not None
    assert parting(np.arange(14), proxy[1:], gold[1:]) is None  # too few to say


def test_what_is_said_of_a_gold_reward_that_never_rose():
    found = parting(np.arange(15), np.repeat([0.0, 1.0, 2.0], 5), np.repeat([-0.05, 0.0, 0.25], 5))
    assert found == Parting(None, (-0.05, 0.25), (0.0, 2.0))
    assert describe_parting(found) == (
        "The proxy and the gold reward part from the start: the proxy rose from 0.00 to 2.00 while gold, at −0.05, "
        "never rose above 0.25 (standard deviations of the reference). Raise the KL coefficient, or collect "
        "preferences from the present policy."
    )
    assert parting(np.arange(15), np.repeat([0.0, 1.0, 2.0], 5), np.repeat([0.0, 0.1, 0.35], 5)) is None
    assert parting(np.arange(15), np.repeat([0.0, 0.1, 0.4], 5), np.zeros(15)) is None  # no clear rise
    unsure = np.repeat([-0.05, 0.0, 0.25], 5) + np.tile([0.2, -0.2, 0.0, 0.2, -0.2], 3)  # it may have risen by more
    assert parting(np.arange(15), np.repeat([0.0, 1.0, 2.0], 5), unsure) is None


def test_unknown_values_are_left_out():
    gold, proxy = np.repeat([1.0, 3.0, 2.0], 6), np.repeat([0.0, 1.0, 2.0], 6)
    gold[[0, 17]], proxy[9] = np.nan, np.nan
    found = parting(np.arange(18), proxy, gold)
    assert found == Parting(11, (3.0, 2.0), (1.0, 2.0))
    assert parting(np.arange(18), np.full(18, np.nan), gold) is None


def test_a_long_run_is_averaged_down():
    """100,000 updates, in windows of 20 means of 500."""
    found = parting(np.arange(100_000), rising(3, 100_000), peaked(100_000))
    assert found is not None and found.step in (49_999, 59_999)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_error_of_a_windows_mean_is_right(correlation):
    """Against the standard deviation of the means of many windows; a linear trend changes nothing."""
    size = 10
    spread = window_means(noise(size * 4000, correlation, 1.0), size).means.std()
    errors = [window_means(noise(100, correlation, 1.0) + 0.3 * np.arange(100), size).error for _ in range(200)]
    np.testing.assert_allclose(np.median(errors), spread, rtol=0.15)


def test_windows_end_at_the_end():
    windows = window_means(np.arange(17.0), 5)
    np.testing.assert_allclose(windows.means, [4, 9, 14])
    assert windows.freedom == 9 and windows.error < 1e-12


def test_warning_is_read_from_the_rows_of_rl():
    gold, proxy = np.repeat([1.0, 3.0, 2.0], 5), np.repeat([0.0, 1.0, 2.0], 5)
    rows = [
        {"step": n, "reward": 0.0, "reward_gain": p, "gold_gain": g}
        for n, (p, g) in enumerate(zip(proxy.tolist(), gold.tolist(), strict=True))
    ]
    bare = {"step": 3, "reward": 0.0}  # a step whose gold reward was not asked for
    lost = {"step": 4, "reward_gain": None, "gold_gain": 100.0}
    assert "part after step 9" in parting_warning({"rl": [*rows[:4], bare, lost, *rows[4:]]})
    assert parting_warning({"rl": rows[:10]}) == parting_warning({"reward": rows}) == parting_warning({}) == ""
