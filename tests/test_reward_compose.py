import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError
from rl_jax.models.config import llama
from rl_jax.models.reward_model import RewardModel, ensemble_rewards, init_reward_params
from rl_jax.models.transformer import init_params
from rl_jax.rewards.compose import RewardConfig, keyword_ids, make_reward
from rl_jax.rewards.text import score_texts
from rl_jax.rewards.tokens import length_reward
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
def four(prompt, completion, row, more): pass
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
        ("own_reward:four", "must take one argument"),
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


@dataclasses.dataclass(frozen=True)
class Script:
    reward: RewardConfig = RewardConfig()
    gold: RewardConfig = RewardConfig(names=())


def test_the_configuration_is_a_command_line():
    arguments = ["--reward", "length", "own:f", "--reward.weights", "1", "0.5", "--reward.target-length", "20"]
    expected = RewardConfig(names=("length", "own:f"), weights=(1.0, 0.5), target_length=20)
    found = tyro.cli(Script, args=[*arguments, "--gold", "sentiment"])
    assert found == Script(expected, RewardConfig())
    assert hash(found.reward) == hash(expected)


def learned(seed, members=1):
    """A reward model of a tiny Transformer, and its tokenizer's vocabulary."""
    tokenizer = train_tokenizer(["abab abab"], 260)
    config = llama(260, 8, 1, 8, 2)
    parts = [
        init_reward_params(jax.random.key(seed + k), init_params(jax.random.key(k), config), config)
        for k in range(members)
    ]
    return RewardModel(jax.tree.map(lambda *x: jnp.stack(x), *parts), config, tokenizer)


def test_a_learned_reward_takes_its_params_and_is_summed_with_others(rollout):
    model = learned(0, members=2)
    config = RewardConfig(
        ("learned", "length"), (2.0, 1.0), target_length=2, combine="mean_minus_spread", spread_weight=0.5
    )
    reward = make_reward(config, model.tokenizer, model)
    rollout = dataclasses.replace(rollout, prompts=rollout.prompts % 260, completions=rollout.completions % 260)
    other = learned(7, members=2)
    for params in (reward.params, other.params):
        each = np.asarray(ensemble_rewards(params, rollout, model.config))
        expected = 2 * (each.mean(axis=0) - 0.5 * each.std(axis=0)) + np.asarray(length_reward(rollout, 2))
        np.testing.assert_allclose(reward.on_tokens(params, rollout), expected, rtol=1e-4, atol=1e-5)
    assert reward.name == "2 learned + length" and reward.on_text is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RewardConfig(("learned",)), "needs model"),
        (RewardConfig(("length",), target_length=3, combine="mean"), "combine is given, and no reward uses it"),
        (RewardConfig(("length",), target_length=3, model=Path("x")), "model is given, and no reward uses it"),
        (RewardConfig(("learned",), combine="mean_minus_spread"), "takes a spread_weight above 0"),
        (RewardConfig(("learned",), combine="mean", spread_weight=1.0), "takes a spread_weight above 0"),
        (RewardConfig(("learned",), model=Path("nowhere")), "not a reward model"),
    ],
)
def test_settings_of_a_learned_reward_are_checked(config, message, tokenizer):
    with pytest.raises(InputError, match=message):
        make_reward(config, tokenizer)


def test_a_reward_model_must_have_the_policys_vocabulary_and_members_to_combine(tokenizer):
    with pytest.raises(InputError, match="another vocabulary"):
        make_reward(RewardConfig(("learned",)), train_tokenizer(["cdcd cdcd"], 260), learned(0))
    with pytest.raises(InputError, match="one member"):
        make_reward(RewardConfig(("learned",), combine="minimum"), learned(0).tokenizer, learned(0))
