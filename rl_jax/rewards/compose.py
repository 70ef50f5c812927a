"""From a configuration to one reward: named rewards and the user's own, weighted and summed."""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import operator
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from transformers import PreTrainedTokenizerBase

from rl_jax.data.prompt_rows import PromptRows
from rl_jax.errors import InputError
from rl_jax.models.reward_model import RewardModel, load_reward_model, members
from rl_jax.rewards.learned import (
    Combination,
    learned_reward,
    mean_minus_spread_reward,
    mean_reward,
    minimum_reward,
)
from rl_jax.rewards.text import (
    TIME_LIMIT,
    Row,
    TextReward,
    keyword_reward,
    regex_reward,
    score_text,
    score_texts,
    sentiment,
)
from rl_jax.rewards.tokens import length_reward, repetition_penalty, token_share
from rl_jax.types import Array, PyTree, RewardFn, Rollout

BUILT_IN = ("sentiment", "length", "keyword", "regex", "repetition", "tokens", "learned")
SETTINGS = {  # which rewards use a setting, and whether they need it
    "keywords": (("keyword", "tokens"), True),
    "pattern": (("regex",), True),
    "target_length": (("length",), True),
    "model": (("learned",), False),
    "combine": (("learned",), False),
    "spread_weight": (("learned",), False),
}
OnFailure = Literal["stop"] | float


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What a completion is rewarded for."""

    names: Annotated[tuple[str, ...], tyro.conf.arg(name="")] = ("sentiment",)
    """Rewards; RL adds them up. sentiment: VADER's compound score, in [-1, 1]. length: minus the distance from
    target_length, as a share of it. keyword: share of the keywords that occur. regex: 1 where the pattern matches,
    else 0. repetition: minus the share of repeated bigrams. tokens: share of the tokens that are keywords. learned: a
    reward model's, each member of mean 0 and variance 1 on the reference policy. module:function is your own, of one
    rollout (JAX, gives [B]) or of a prompt and a completion (strings, gives a number), or of these and the row
    of the prompt file (a dict of all its columns); the module may be in the current directory."""

    weights: tuple[float, ...] = ()
    """The factor of each reward, in the order of names; all 1 when empty."""

    keywords: tuple[str, ...] = ()
    """Words that the rewards keyword and tokens look for."""

    pattern: str = ""
    """Regular expression of the reward regex, in Python's syntax."""

    target_length: int = 0
    """Length that the reward length asks for, in tokens, at least 1."""

    model: Path | None = None
    """Folder of the reward model that the reward learned is given by."""

    combine: Literal["mean", "minimum", "mean_minus_spread"] | None = None
    """How the members of an ensemble make one reward; mean where none is given. mean_minus_spread takes off
    spread_weight times their standard deviation."""

    spread_weight: float = 0.0
    """The factor of the spread in mean_minus_spread, above 0."""

    time_limit: float = TIME_LIMIT
    """Seconds that the rewards on text may take for a completion."""

    on_failure: OnFailure = "stop"
    """What happens where a reward on text raises, takes too long or gives no finite number. stop: the run stops, saved
    and with the texts kept. A number: the completion gets that for its rewards on text, weights and all; the run keeps
    its text, says so and goes on."""


class Reward(NamedTuple):
    """A reward in its two parts, whose sum it is; a part that has nothing in it is None.

    Attributes:
        name: for people, such as "sentiment + 0.5 repetition".
        on_tokens: the part inside the compiled step, params, Rollout -> [B].
        on_text: the part on the host, prompt, completion and, where there are rows, the prompt's -> number.
        params: what the part inside the step is given: those of a reward model, or nothing.
        context: the longest prompt and completion together that it can read, in tokens.
        time_limit: seconds that the part on text may take for a completion.
        on_failure: "stop", or what the part on text gives a completion for which it fails.
        rows: of the file that prompts are from, for the part on text.
    """

    name: str
    on_tokens: Callable[[PyTree, Rollout], Array] | None
    on_text: TextReward | None
    params: PyTree = ()
    context: float = math.inf
    time_limit: float = TIME_LIMIT
    on_failure: OnFailure = "stop"
    rows: PromptRows = MappingProxyType({})


def make_reward(config: RewardConfig, tokenizer: PreTrainedTokenizerBase, model: RewardModel | None = None) -> Reward:
    """Checks a configuration and builds the reward that it describes.

    Args:
        config: what it is made of.
        tokenizer: the policy's.
        model: what the reward learned is given by, where it is not read from a folder.

    Raises:
        InputError: a name is unknown, a setting is missing, wrong or unused, a reward model cannot be read or has
            another vocabulary, or a function of the user's cannot be imported or gives something other than [B] floats.
    """
    _check(config)
    model = _reward_model(config, tokenizer, model) if "learned" in config.names else None
    weights = config.weights or (1.0,) * len(config.names)
    parts = [_part(name, config, tokenizer, model) for name in config.names]
    on_tokens = [(weight, part) for weight, (part, _) in zip(weights, parts, strict=True) if part]
    on_text = [(weight, _with_row(part)) for weight, (_, part) in zip(weights, parts, strict=True) if part]

    def tokens_sum(params: PyTree, rollout: Rollout) -> Array:
        return functools.reduce(operator.add, (weight * reward(params, rollout) for weight, reward in on_tokens))

    def text_sum(prompt: str, completion: str, row: Row | None = None) -> float:
        return sum(weight * score_text(reward, prompt, completion, row) for weight, reward in on_text)

    check_text_settings(config, bool(on_text))
    terms = [name if weight == 1 else f"{weight:g} {name}" for name, weight in zip(config.names, weights, strict=True)]
    return Reward(
        name=" + ".join(terms).replace("+ -", "- "),
        on_tokens=tokens_sum if on_tokens else None,
        on_text=text_sum if on_text else None,
        params=model.params if model else (),
        context=model.config.context if model else math.inf,
        time_limit=config.time_limit,
        on_failure=config.on_failure,
    )


def check_text_settings(config: RewardConfig, used: bool) -> None:
    """Raises InputError for settings of rewards on text that cannot work, or that nothing uses."""
    if not 0 < config.time_limit < math.inf:
        raise InputError(f"time_limit is {config.time_limit:g}: give a number of seconds above 0")
    if config.on_failure != "stop" and not abs(config.on_failure) <= float(jnp.finfo(jnp.float32).max):
        raise InputError(f"on_failure is {config.on_failure}: give stop, or a finite number")
    for setting, default in (("time_limit", TIME_LIMIT), ("on_failure", "stop")):
        if not used and getattr(config, setting) != default:
            raise InputError(f"{setting} is given, and no reward is on text: leave it out")


def try_text_reward(
    reward: Reward, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row | None] | None = None
) -> None:
    """Calls a reward on text so that a mistake in it shows before any long work.

    Raises:
        InputError: it failed for a completion, or where failures are replaced, for all of them.
    """
    failed: list[InputError] = []

    def note(number: int, error: InputError) -> float:
        failed.append(error)
        if reward.on_failure == "stop" or len(failed) == len(completions):
            raise failed[0]
        return reward.on_failure

    if reward.on_text is not None:
        score_texts(reward.on_text, prompts, completions, rows, limit=reward.time_limit, on_failure=note)


def _check(config: RewardConfig) -> None:
    for name in config.names:
        if name not in BUILT_IN and ":" not in name:
            close = difflib.get_close_matches(name, BUILT_IN, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise InputError(f"no reward {name!r}{hint}: give {', '.join(BUILT_IN)}, or your own as module:function")
    if not config.names:
        raise InputError(f"no reward is named: give {', '.join(BUILT_IN)}, or your own as module:function")
    if config.weights and len(config.weights) != len(config.names):
        raise InputError(
            f"there are {len(config.weights)} weights for {len(config.names)} rewards: give one a name, or none"
        )
    for name, weight in zip(config.names, config.weights, strict=False):
        if name == "learned" and not weight > 0:
            raise InputError(
                f"the weight of learned is {weight:g}: below 0 a policy learns what judges rejected; give one above 0"
            )
    if not all(map(math.isfinite, config.weights)):
        raise InputError(f"the weights {config.weights} are not all finite numbers")
    for setting, (users, needed) in SETTINGS.items():
        given, used = getattr(config, setting) not in (None, (), "", 0), any(user in config.names for user in users)
        if used and needed and not given:
            raise InputError(f"the reward {' or '.join(u for u in users if u in config.names)} needs {setting}")
        if given and not used:
            raise InputError(f"{setting} is given, and no reward uses it: name {' or '.join(users)}, or leave it out")
    if not all(keyword.strip() for keyword in config.keywords):
        raise InputError("a keyword is empty: give words, or leave it out")
    if config.target_length < 0:
        raise InputError(f"target_length is {config.target_length}: give at least 1 token")
    spread = config.combine == "mean_minus_spread"
    if not 0 <= config.spread_weight < math.inf or spread != (config.spread_weight > 0):
        raise InputError("mean_minus_spread takes a spread_weight above 0, and nothing else does")
    try:
        re.compile(config.pattern)
    except re.error as error:
        raise InputError(f"the pattern {config.pattern!r} is not a regular expression: {error}") from error


def _reward_model(config: RewardConfig, tokenizer: PreTrainedTokenizerBase, model: RewardModel | None) -> RewardModel:
    """The reward model that is given, or that the configuration names."""
    if config.model is not None:
        model = load_reward_model(config.model)
    if model is None:
        raise InputError("the reward learned needs model, the folder of a reward model that train_reward.py wrote")
    if model.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError("the reward model has another vocabulary than the policy: train it from this policy")
    if config.combine is not None and members(model.params) == 1:
        raise InputError("combine has no effect: the reward model has one member; train it with more, or leave it out")
    return model


def combination(config: RewardConfig) -> Combination:
    """How the members of an ensemble make one reward."""
    match config.combine:
        case None | "mean":
            return mean_reward
        case "minimum":
            return minimum_reward
    return functools.partial(mean_minus_spread_reward, spread_weight=config.spread_weight)


def _part(
    name: str, config: RewardConfig, tokenizer: PreTrainedTokenizerBase, model: RewardModel | None
) -> tuple[Callable[[PyTree, Rollout], Array] | None, TextReward | None]:
    """The reward of that name as a function of tokens or as one of text; the other is None."""
    match name:
        case "learned":
            assert model is not None, "it was read"
            return functools.partial(learned_reward, config=model.config, combine=combination(config)), None
        case "sentiment":
            return None, sentiment
        case "keyword":
            return None, lambda prompt, completion: keyword_reward(completion, config.keywords)
        case "regex":
            return None, lambda prompt, completion: regex_reward(completion, config.pattern)
        case "length":
            return lambda params, rollout: length_reward(rollout, config.target_length), None
        case "repetition":
            return lambda params, rollout: repetition_penalty(rollout), None
        case "tokens":
            token_ids = keyword_ids(tokenizer, config.keywords)
            return lambda params, rollout: token_share(rollout, jnp.asarray(token_ids)), None
    function = import_function(name)
    match _fewest_arguments(function):
        case 1:
            _check_shape(name, function)
            return lambda params, rollout: function(rollout), None
        case 2 | 3:
            return None, function
    raise InputError(
        f"the reward {name} must take one argument (a Rollout) to be a reward on tokens, or two (prompt, "
        "completion) or three (prompt, completion, row of the prompt file) to be one on text"
    )


def _with_row(function: TextReward) -> TextReward:
    """A reward on text of two arguments or three, as one that is always given the row."""
    takes_row, name = _fewest_arguments(function) == 3, getattr(function, "__qualname__", repr(function))

    def reward(prompt: str, completion: str, row: Row | None) -> float:
        if not takes_row:
            return function(prompt, completion)
        if row is None:
            raise InputError(
                f"the reward {name} takes the row of its prompt, and this prompt is from no file: give prompts by "
                "prompt_file"
            )
        return function(prompt, completion, row)

    reward.__qualname__ = name
    return reward


def keyword_ids(tokenizer: PreTrainedTokenizerBase, keywords: tuple[str, ...]) -> list[int]:
    """Ids of the tokens that are a keyword, alone or after a space.

    Raises:
        InputError: a keyword is no single token of the vocabulary.
    """
    ids = []
    for keyword in keywords:
        forms = [tokenizer.encode(form, add_special_tokens=False) for form in (keyword, " " + keyword)]
        whole = [form[0] for form in forms if len(form) == 1]
        if not whole:
            raise InputError(
                f"the keyword {keyword!r} is no single token of this vocabulary: use the reward keyword for it"
            )
        ids += whole
    return ids


def import_function(name: str, what: str = "reward") -> Callable:
    """The function that module:function names; `what` it is goes into the message.

    Raises:
        InputError: there is none, or its module fails when it is run.
    """
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, "")  # the current directory
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does when it runs
        raise InputError(
            f"the {what} {name} cannot be imported: {type(error).__name__}: {error}; module is a Python module "
            "that is installed or in the current directory"
        ) from error
    finally:
        sys.path.remove("")
    function = getattr(module, function_name, None)
    if not callable(function):
        close = difflib.get_close_matches(function_name, dir(module), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise InputError(f"the module {module_name} has no function {function_name!r}{hint}")
    return function


def _fewest_arguments(function: Callable) -> int | None:
    """The smallest number of arguments, up to three, that the function can be called with."""
    for count in range(4):
        with contextlib.suppress(TypeError, ValueError):  # does not bind; a built-in that hides its signature
            inspect.signature(function).bind(*range(count))
            return count
    return None


def _check_shape(name: str, function: RewardFn) -> None:
    """Traces a reward on tokens with a small rollout, so that a mistake shows before any long work."""
    sequences = 2
    prompts, completions = jnp.zeros((sequences, 3), jnp.int32), jnp.zeros((sequences, 5), jnp.int32)
    rollout = Rollout(
        prompts=prompts,
        prompt_mask=prompts == 0,
        completions=completions,
        completion_mask=completions == 0,
        behavior_logprobs=completions.astype(jnp.float32),
        truncated=jnp.zeros(sequences, bool),
    )
    try:
        reward = jax.eval_shape(function, rollout)
    except Exception as error:
        raise InputError(f"the reward {name} cannot be traced by JAX: {type(error).__name__}: {error}") from error
    shape, dtype = getattr(reward, "shape", None), getattr(reward, "dtype", None)
    if shape != (sequences,) or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(
            f"the reward {name} gives shape {shape} and dtype {dtype} for {sequences} completions: "
            f"give one float a completion, shape ({sequences},)"
        )
