import functools
import signal
import threading
import time

import numpy as np
import pytest
import tyro

from rl_jax.errors import InputError
from rl_jax.rewards.compose import Reward, RewardConfig, make_reward, try_text_reward
from rl_jax.rewards.text import keyword_reward, regex_reward, score_texts, sentiment


@pytest.mark.parametrize(
    ("completion", "compound"),  # published in VADER's README
    [
        ("VADER is smart, handsome, and funny.", 0.8316),
        ("VADER is not smart, handsome, nor funny.", -0.7424),
        ("The book was good.", 0.4404),
        ("Today SUX!", -0.5461),
        ("", 0.0),
    ],
)
def test_sentiment_is_vaders_compound_of_the_completion(completion, compound):
    assert sentiment("a horrible, terrible prompt", completion) == compound


def test_keywords_are_whole_words_in_any_case():
    keywords = ("peace", "good will", "c++", "ÉTÉ")
    assert keyword_reward("Peace, and GOOD WILL.", keywords) == 0.5
    assert keyword_reward("peaceful good willing", keywords) == 0.0
    assert keyword_reward("(c++) un été", keywords) == 0.5
    assert keyword_reward("c+++peace", ("peace",)) == 1.0


def test_regex_matches_anywhere():
    assert regex_reward("there are 12 of them", r"\b\d+\b") == 1.0
    assert regex_reward("there are twelve", r"\d") == 0.0


def test_score_texts_gives_a_float32_for_each_completion():
    def reward(prompt, completion):
        return len(prompt) * 10 + len(completion)

    rewards = score_texts(reward, ["a", "bb", ""], ["x", "", "xyz"])
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [11.0, 20.0, 3.0]
    assert score_texts(reward, [], []).shape == (0,)


@pytest.mark.parametrize("value", [True, 1, np.float32(1), np.bool_(True), np.asarray(1.0)])
def test_every_kind_of_number_is_a_reward(value):
    assert score_texts(lambda prompt, completion: value, ["p"], ["c"]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (None, "not a number"),
        ("1.0", "not a number"),
        ([1.0], "not a number"),
        (1j, "not a number"),
        (float("nan"), "not a finite number"),
        (float("inf"), "not a finite number"),
        (-float("inf"), "not a finite number"),
        (1e39, "not a finite number"),  # beyond float32
    ],
)
def test_what_is_no_finite_number_is_refused_with_its_completion(value, complaint):
    def my_reward(prompt, completion):
        return value if completion == "bad one" else 0.0

    with pytest.raises(InputError, match=complaint) as refusal:
        score_texts(my_reward, ["p"] * 3, ["fine", "bad one", "fine"])
    message = str(refusal.value)
    assert "completion 1 of 3" in message
    assert "my_reward" in message
    assert "'bad one'" in message


def test_an_exception_names_the_reward_and_shows_the_completion():
    def my_reward(prompt, completion):
        return 1 / (len(completion) - 300)

    with pytest.raises(InputError) as refusal:
        score_texts(my_reward, ["p"] * 2, ["", "x" * 300])
    message = str(refusal.value)
    assert "completion 1 of 2" in message
    assert "my_reward failed with ZeroDivisionError: division by zero" in message
    assert repr("x" * 200 + "...") in message
    assert isinstance(refusal.value.__cause__.__cause__, ZeroDivisionError)


def test_a_reward_without_a_name_is_named_by_its_repr():
    with pytest.raises(InputError, match=r"reward functools\.partial.*gave nan"):
        score_texts(functools.partial(lambda value, p, c: value, float("nan")), ["p"], ["c"])


def test_prompts_and_completions_come_in_pairs():
    with pytest.raises(ValueError, match="longer"):
        score_texts(lambda prompt, completion: 0.0, ["p"], ["c", "d"])


def never_ends(prompt, completion):
    while completion == "endless":
        try:
            time.sleep(0.01)
        except Exception:  # as careless code does
            continue
    return 1.0


def test_a_call_that_takes_too_long_is_ended():
    handler, start = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(InputError) as refusal:
        score_texts(never_ends, ["p"] * 3, ["fine", "endless", "fine"], limit=0.3)
    assert 0.3 <= time.monotonic() - start < 5
    assert str(refusal.value) == (
        "completion 1 of 3: the reward never_ends took longer than 0.3 s; the completion was 'endless'"
    )
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_limit_is_one_for_each_call_and_not_for_all():
    assert score_texts(lambda p, c: time.sleep(0.1) or 1.0, ["p"] * 5, ["c"] * 5, limit=0.3).tolist() == [1.0] * 5


def test_in_a_sum_it_is_the_part_that_is_named(monkeypatch, tmp_path):
    (tmp_path / "slow_rewards.py").write_text("def endless(prompt, completion):\n    while True:\n        pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward = make_reward(RewardConfig(("sentiment", "slow_rewards:endless"), (1.0, 0.5)), None)
    with pytest.raises(InputError, match=r"the reward endless took longer than 0\.2 s"):
        score_texts(reward.on_text, ["p"], ["c"], limit=0.2)


def test_there_is_no_limit_in_another_thread_nor_under_an_alarm_of_somebody_elses():
    def slow(prompt, completion):
        time.sleep(0.3)
        return 2.0

    rewards = []
    thread = threading.Thread(target=lambda: rewards.append(score_texts(slow, ["p"], ["c"], limit=0.1)))
    thread.start()
    thread.join()
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        rewards.append(score_texts(slow, ["p"], ["c"], limit=0.1))
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 50, "it is still set"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert [array.tolist() for array in rewards] == [[2.0], [2.0]]


def test_what_fails_gets_what_on_failure_gives_and_the_others_their_own():
    failed = []

    def replace(number, error):
        failed.append((number, str(error)))
        return -7.0

    def my_reward(prompt, completion):
        return 1 / len(completion) if completion != "endless" else never_ends(prompt, completion)

    completions = ["ab", "", "endless", "abcd"]
    rewards = score_texts(my_reward, ["p"] * 4, completions, limit=0.2, on_failure=replace)
    assert rewards.tolist() == [0.5, -7.0, -7.0, 0.25]
    assert [number for number, _ in failed] == [1, 2]
    assert failed[0][1].startswith("completion 1 of 4: the reward ") and "ZeroDivisionError" in failed[0][1]
    assert failed[1][1].startswith("completion 2 of 4: the reward ") and "took longer than 0.2 s" in failed[1][1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time_limit": 0.0}, "time_limit is 0: give a number of seconds above 0"),
        ({"time_limit": -1.0}, "time_limit is -1"),
        ({"time_limit": float("inf")}, "time_limit is inf"),
        ({"time_limit": float("nan")}, "time_limit is nan"),
        ({"on_failure": float("nan")}, "on_failure is nan: give stop, or a finite number"),
        ({"on_failure": 1e39}, "on_failure is 1e"),
        (
            {"names": ("length",), "target_length": 3, "time_limit": 5.0},
            "time_limit is given, and no reward is on text",
        ),
        (
            {"names": ("length",), "target_length": 3, "on_failure": 0.0},
            "on_failure is given, and no reward is on text",
        ),
    ],
)
def test_what_is_wrong_with_the_settings_of_failures(settings, message):
    with pytest.raises(InputError, match=message):
        make_reward(RewardConfig(**settings), None)


def test_the_settings_of_failures_are_options():
    words = ["--time-limit", "2.5", "--on-failure"]
    assert tyro.cli(RewardConfig, args=[*words, "-1"]) == RewardConfig(time_limit=2.5, on_failure=-1.0)
    assert tyro.cli(RewardConfig, args=[*words, "stop"]) == RewardConfig(time_limit=2.5)
    reward = make_reward(RewardConfig(time_limit=2.5, on_failure=-1.0), None)
    assert (reward.time_limit, reward.on_failure) == (2.5, -1.0)


@pytest.mark.parametrize(
    ("on_failure", "bad", "refused"), [("stop", 1, 0), (0.0, 1, None), (0.0, 2, 0), (0.0, 0, None)]
)
def test_a_reward_that_is_tried_is_refused_where_it_would_stop_or_always_fails(on_failure, bad, refused):
    def my_reward(prompt, completion):
        return 1 / (completion >= "abc"[bad])

    reward = Reward("mine", None, my_reward, on_failure=on_failure)
    if refused is None:
        try_text_reward(reward, ["p"] * 2, ["a", "b"])
    else:
        with pytest.raises(InputError, match=f"completion {refused} of 2"):
            try_text_reward(reward, ["p"] * 2, ["a", "b"])
