import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError
from rl_jax.rewards.compose import RewardConfig, keyword_ids, make_reward
from rl_jax.rewards.text import score_texts
from rl_jax.types import Rollout

OWN = """
import functools
import jax.numpy as jnp
import helper_beside_it

def tokens(rollout):
    return rollout.completion_mask.sum(axis=1) * helper_beside_it.FACTOR

def tokens_with_default(rollout, factor=2.0):
    return rollout.completion_mask.sum(axis=1) * factor

def text(prompt, completion):
    return len(prompt) - len(completion)

def text_with_default(prompt, completion, factor=3.0):
    return factor * len(completion)

def fails(prompt, completion):
    raise KeyError(completion)

def wrong_shape(rollout):
    return rollout.behavior_logprobs

def whole_numbers(rollout):
    return rollout.completion_mask.sum(axis=1)

def number(rollout):
    return 1.0

def untraceable(rollout):
    return jnp.asarray([float(x) for x in rollout.truncated])

def none(): pass
def three(prompt, completion, more): pass
def any_number(*arguments): pass
def keyword_only(rollout, *, more): pass
VALUE = 3
"""


@pytest.fixture(scope="module")
def tokenizer():
    """Tokens 257 to 259 are "ab", "abab" and " abab"."""
    return train_tokenizer(["abab abab"], 260)


@pytest.fixture(scope="module")
def rollout():
    mask = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
    return Rollout(
        prompts=jnp.zeros((2, 2), jnp.int32),
        prompt_mask=jnp.ones((2, 2), bool),
        completions=jnp.asarray([[258, 258, 258, 0], [259, 0, 258, 258]], jnp.int32),
        completion_mask=mask,
        behavior_logprobs=jnp.zeros((2, 4)),
        truncated=jnp.zeros(2, bool),
    )


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_reward.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "helper_beside_it.py").write_text("FACTOR = 0.5", encoding="utf-8")
    (tmp_path / "broken_reward.py").write_text("def f(:", encoding="utf-8")
    for module in ("own_reward", "helper_beside_it"):
        monkeypatch.delitem(sys.modules, module, raising=False)


def test_the_default_is_sentiment_on_the_host(tokenizer):
    reward = make_reward(RewardConfig(), tokenizer)
    text = "The joy of the Lord is great."
    assert (reward.name, reward.on_tokens) == ("sentiment", None)
    assert reward.on_text("terrible", text) == SentimentIntensityAnalyzer().polarity_scores(text)["compound"] > 0.5


def test_rewards_on_tokens_are_weighted_and_summed(tokenizer, rollout):
    config = RewardConfig(
        names=("length", "repetition", "tokens"), weights=(1, 2.0, -0.5), keywords=("abab",), target_length=2
    )
    reward = make_reward(config, tokenizer)
    assert reward.name == "length + 2 repetition - 0.5 tokens"
    assert reward.on_text is None
    # Lengths 4 and 2; bigrams AA AA A0 and B0; three of four and one of two tokens are abab or " abab".
    expected = [-1 + 2 * (-1 / 3) - 0.5 * 3 / 4, 0 + 0 - 0.5 * 1 / 2]
    total = jax.jit(reward.on_tokens)((), rollout)
    assert (total.shape, total.dtype) == ((2,), jnp.float32)
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_both_kinds_together(tokenizer, rollout):
    config = RewardConfig(
        names=("keyword", "length", "regex"),
        weights=(2, 1, 0.25),
        keywords=("one", "two"),
        pattern=r"\d",
        target_length=4,
    )
    reward = make_reward(config, tokenizer)
    assert reward.name == "2 keyword + length + 0.25 regex"
    assert reward.on_text("p", "One 1") == 2 * 0.5 + 0.25
    np.testing.assert_allclose(reward.on_tokens((), rollout), [0, -0.5])


def test_the_users_own_functions(tokenizer, rollout, own_module):
    names = ("own_reward:tokens", "own_reward:tokens_with_default", "own_reward:text", "own_reward:text_with_default")
    reward = make_reward(RewardConfig(names=names, weights=(1, 1, 10, 1)), tokenizer)
    np.testing.assert_allclose(reward.on_tokens((), rollout), [0.5 * 4 + 2 * 4, 0.5 * 2 + 2 * 2])
    assert reward.on_text("abc", "x") == 10 * 2 + 3
    assert "own_reward:text" in reward.name


def test_a_failing_part_is_named_with_its_completion(tokenizer, own_module):
    reward = make_reward(RewardConfig(names=("sentiment", "own_reward:fails")), tokenizer)
    with pytest.raises(InputError, match="completion 0 of 1: the reward fails failed with KeyError: 'hm'"):
        score_texts(reward.on_text, ["p"], ["hm"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_reward:wrong_shape", r"gives shape \(2, 5\) and dtype float32 for 2 completions"),
        ("own_reward:whole_numbers", r"gives shape \(2,\) and dtype int32"),
        ("own_reward:number", r"gives shape \(\)"),
        ("own_reward:untraceable", "cannot be traced by JAX"),
        ("own_reward:none", "must take one argument"),
        ("own_reward:three", "must take one argument"),
        ("own_reward:any_number", "must take one argument"),
        ("own_reward:keyword_only", "must take one argument"),
        ("own_reward:VALUE", "has no function 'VALUE'"),
        ("own_reward:txt", r"has no function 'txt' \(did you mean text\?\)"),
        ("own_reward:", "has no function ''"),
        ("absent_reward:f", "cannot be imported: ModuleNotFoundError: No module named 'absent_reward'"),
        ("broken_reward:f", "cannot be imported: SyntaxError"),
        (":f", "cannot be imported"),
    ],
)
def test_what_is_wrong_with_the_users_own_function(tokenizer, own_module, name, message):
    with pytest.raises(InputError, match=message) as refusal:
        make_reward(RewardConfig(names=(name,)), tokenizer)
    assert name.partition(":")[0] in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ("sentimnt",)}, r"no reward 'sentimnt' \(did you mean sentiment\?\): give sentiment, length"),
        ({"names": ("xyz",)}, r"no reward 'xyz': give sentiment, length, keyword, regex, repetition, tokens"),
        ({"names": ()}, "no reward is named"),
        ({"weights": (1.0, 2.0)}, "2 weights for 1 rewards"),
        ({"weights": (float("nan"),)}, "not all finite"),
        ({"names": ("keyword",)}, "reward keyword needs keywords"),
        ({"names": ("tokens",)}, "reward tokens needs keywords"),
        ({"keywords": ("good",)}, "keywords is given, and no reward uses it: name keyword or tokens"),
        ({"names": ("keyword",), "keywords": ("good", " ")}, "a keyword is empty"),
        ({"names": ("regex",)}, "reward regex needs pattern"),
        ({"names": ("regex",), "pattern": "(a"}, r"pattern '\(a' is not a regular expression: missing \)"),
        ({"pattern": "a"}, "pattern is given, and no reward uses it: name regex"),
        ({"names": ("length",)}, "reward length needs target_length"),
        ({"names": ("length",), "target_length": -1}, "target_length is -1: give at least 1"),
        ({"target_length": 5}, "target_length is given, and no reward uses it: name length"),
        ({"names": ("tokens",), "keywords": ("good",)}, "keyword 'good' is no single token"),
    ],
)
def test_what_is_wrong_with_the_configuration(tokenizer, settings, message):
    with pytest.raises(InputError, match=message):
        make_reward(RewardConfig(**settings), tokenizer)


def test_keyword_ids_are_the_word_alone_and_after_a_space(tokenizer):
    assert keyword_ids(tokenizer, ("abab", "ab")) == [258, 259, 257]


def test_the_configuration_is_a_command_line():
    arguments = ["--names", "length", "own:f", "--weights", "1", "0.5", "--target-length", "20"]
    expected = RewardConfig(names=("length", "own:f"), weights=(1.0, 0.5), target_length=20)
    assert tyro.cli(RewardConfig, args=arguments) == expected
    assert hash(expected) == hash(tyro.cli(RewardConfig, args=arguments))
