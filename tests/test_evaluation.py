import math

import numpy as np
import pytest
import scipy.stats

from rl_jax.errors import InputError
from rl_jax.evaluation import (
    ask_judge,
    distinct_n,
    judged_shares,
    mean_interval,
    position_bias,
    win_rate,
    win_shares,
)


def correlated(rng: np.random.Generator, prompts: int, group: int) -> np.ndarray:
    """Rewards about 3 whose difference between prompts is twice that within a prompt. [prompts, group]."""
    return 3 + 2 * rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, group))


def test_interval_is_that_of_scipy():
    values = correlated(np.random.default_rng(0), 7, 4)
    expected = scipy.stats.ttest_1samp(values.mean(axis=1), 0).confidence_interval(0.95)
    np.testing.assert_allclose(mean_interval(values), [values.mean(), *expected], rtol=1e-9)
    assert all(type(number) is float for number in mean_interval(values.astype(np.float32)))


def test_interval_covers_the_mean_of_correlated_completions():
    rng = np.random.default_rng(0)
    trials = [correlated(rng, 12, 4) for _ in range(2000)]
    share = np.mean([low <= 3 <= high for _, low, high in map(mean_interval, trials)])
    naive = np.mean([low <= 3 <= high for _, low, high in (mean_interval(x.reshape(-1, 1)) for x in trials)])
    assert abs(share - 0.95) < 0.015  # three standard errors
    assert naive < 0.8  # completions taken for independent


def test_one_prompt_says_nothing_of_the_others():
    assert mean_interval(np.array([[1.0, 2.0]])) == (1.5, -math.inf, math.inf)
    assert win_rate(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0]])) == (0.875, 0.0, 1.0)


def test_win_rate_by_hand():
    challenger, incumbent = np.array([[3, 1], [0, 0]]), np.array([[1, 2, 3], [0, -1, 1]])
    rates = [(2.5 + 0.5) / 6, 3 / 6]  # 3 beats 1 and 2 and ties 3, 1 ties 1; each 0 ties, wins, loses
    rate = win_rate(challenger, incumbent)
    np.testing.assert_allclose(rate.value, np.mean(rates))
    assert rate == mean_interval(np.array(rates)[:, None])


def test_win_rate_and_its_interval_stay_shares():
    challenger = np.array([[1.0], [1.0], [1.0], [0.0]])
    assert win_rate(challenger, np.full((4, 1), 0.5)).high == 1.0
    assert win_rate(1 - challenger, np.full((4, 1), 0.5)).low == 0.0
    assert win_rate(np.full((4, 2), 2.0), challenger) == (1.0, 1.0, 1.0)


def test_win_rate_against_oneself_is_one_half():
    rewards = correlated(np.random.default_rng(0), 20, 4)
    np.testing.assert_allclose(win_rate(rewards, rewards), 0.5)


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, 4 / 8), (2, 3 / 4), (3, 1), (4, 1), (5, 0)],  # 12 21 12 34; 121 212
)
def test_distinct_n_by_hand(n, expected):
    completions = [[1, 2, 1, 2], [3, 4], [2], [], [1]]
    np.testing.assert_allclose(distinct_n(completions, n), expected)


def test_n_grams_do_not_cross_completions():
    assert distinct_n([[1, 2], [1, 2]], 2) == 0.5
    assert distinct_n([[1], [2]], 2) == 0.0


def test_win_shares_by_hand():
    shares = win_shares(np.array([[3, 1], [0, 0]]), np.array([[1, 2, 3], [0, -1, 1]]))
    np.testing.assert_allclose(shares, [[2.5 / 3, 0.5 / 3], [0.5, 0.5]])
    assert shares.dtype == np.float64


def test_judge_is_asked_in_both_orders():
    asked = []

    def judge(prompt, first, second):
        asked.append((prompt, first, second))
        return {"ab": 0.9, "ba": 0.3, "cd": True, "dc": np.float32(1)}[first + second]

    verdicts = ask_judge(judge, ["p", "q"], ["a", "c"], ["b", "d"])
    assert asked == [("p", "a", "b"), ("p", "b", "a"), ("q", "c", "d"), ("q", "d", "c")]
    np.testing.assert_allclose(verdicts, [[0.9, 0.3], [1, 1]])
    np.testing.assert_allclose(judged_shares(verdicts), [0.8, 0.5])
    bias = position_bias(verdicts[:, None])
    assert bias.value == pytest.approx((0.2 + 1) / 2) and (bias.low, bias.high) == (-1, 1)


def test_position_bias_tells_a_judge_that_looks_at_the_place_from_one_that_does_not():
    texts = [str(x) for x in np.random.default_rng(0).permutation(40)]

    def bias(judge):
        return position_bias(ask_judge(judge, [""] * 20, texts[:20], texts[20:]).reshape(10, 2, 2))

    assert bias(lambda prompt, first, second: 1.0) == (1, 1, 1)
    assert bias(lambda prompt, first, second: 0) == (-1, -1, -1)
    assert bias(lambda prompt, first, second: float(first) > float(second)) == (0, 0, 0)


@pytest.mark.parametrize("verdict", [1.5, -0.1, math.nan, "first", None, [0.5]])
def test_verdicts_that_are_no_probability_are_refused(verdict):
    with pytest.raises(InputError, match=r"judge .*lambda.* gave .*number from 0 to 1; .*'left' and 'right'"):
        ask_judge(lambda prompt, first, second: verdict, [""], ["left"], ["right"])


def test_judge_that_fails_is_named():
    with pytest.raises(InputError, match="failed with ZeroDivisionError"):
        ask_judge(lambda prompt, first, second: 1 / 0, [""], ["left"], ["right"])
