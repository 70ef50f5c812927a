"""The settings of reinforcement, what they are checked for, and the prompts that they ask for."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from experiments.compare import Comparing
from experiments.judgements import say_left_out
from experiments.options import EstimatorOptions, chosen_estimator
from experiments.pretrain import check_counts, check_optimizer
from rl_jax.data.conversations import make_render
from rl_jax.data.prompt_rows import (
    Asked,
    PromptRows,
    check_same,
    encode_prompt_rows,
    find_rows,
    pad_keys,
    read_prompt_rows,
)
from rl_jax.data.prompts import decode_completions, passage_openings
from rl_jax.errors import InputError
from rl_jax.keys import check_seed
from rl_jax.models.config import TransformerConfig
from rl_jax.models.lora import LoRA, check_lora
from rl_jax.reinforce.estimators import ESTIMATORS
from rl_jax.rewards.compose import Reward, RewardConfig, make_reward, try_text_reward
from rl_jax.rollout import check_lengths
from rl_jax.run.spmd import batch_parts, make_mesh
from rl_jax.sampling import Sampling
from rl_jax.sign_check import check_signs

COUNTS = ("prompts", "group_size", "prompt_length", "completion_length", "steps", "checkpoint_every")


@dataclasses.dataclass(frozen=True)
class Reinforcing:
    """Reinforcement: what is sampled, and how the policy learns from it."""

    prompts: int = 16
    """Prompts in an update."""
    group_size: int = 4
    """Completions of each prompt."""
    prompt_length: int = 16
    """Most tokens of a prompt: of a file's, which are left out where they are longer; or of the opening of a held-out
    passage, up to the end of a word."""
    prompt_file: Path | None = None
    """Prompts to learn from, instead of the corpus's: .jsonl, .parquet, or a data set of the hub (org/name:split), with
    the column prompt, a string or messages, or messages, whose last assistant's turn is left out; or .txt, one on each
    line. Messages go through the tokenizer's chat template. A reward on text with three arguments is given the row."""
    held_out_file: Path | None = None
    """Prompts to compare on, as those of prompt_file; without it, part of those is kept for that."""
    as_chat: bool = False
    """Take each string of these files for a user's message."""
    completion_length: int = 48
    """Most tokens of a completion."""
    temperature: float = 0.8
    """Divides the logits that completions are sampled from."""
    top_k: int = 0
    """Sample among this many of the likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the fewest tokens that have this probability together; 1 means all."""
    min_p: float = 0.0
    """Sample among tokens with at least this share of the highest probability; 0 means all."""
    estimator: Annotated[str, tyro.conf.arg(help=f"The algorithm: {', '.join(ESTIMATORS)}.")] = "rloo"
    options: Annotated[EstimatorOptions, tyro.conf.arg(name="")] = EstimatorOptions()
    steps: int = 90
    """Updates."""
    learning_rate: float = 3e-4
    """Learning rate of AdamW after the warm-up."""
    warmup: int = 5
    """Updates in which the learning rate rises to that."""
    weight_decay: float = 0.0
    """Weight decay of matrices."""
    clip_norm: float = 1.0
    """Longest gradient, global L2 norm."""
    lora: LoRA = LoRA()
    slots: int = 0
    """Completions sampled at once, the others waiting their turn, to save memory; 0 for all of them."""
    tokens_at_once: int = 0
    """Tokens that go through the update at once, about, on each device: memory against speed; 0 for what suits it."""
    reference: Literal["whole", "shared"] = "whole"
    """Whether each device has the whole of the reference policy, or a part that is gathered for each update: less
    memory, more to communicate."""
    noise_every: int = 0
    """Updates between measurements of the gradient's noise, by a gradient for each prompt; 0 for none."""
    checkpoint_every: int = 50
    """Updates between checkpoints."""
    compare: Comparing = Comparing()


class Prompts(NamedTuple):
    """Left-padded prompts to learn from, and those kept for the comparison. int32 [M, P], bool [M, P]."""

    train: tuple[np.ndarray, np.ndarray]
    held_out: tuple[np.ndarray, np.ndarray]
    rows: PromptRows = MappingProxyType({})
    """Of both, where they are from files."""


def make_sampling(settings: Reinforcing, ends: tuple[int, ...]) -> Sampling:
    """How the settings sample, until one of the ids that end a completion."""
    names = ("group_size", "temperature", "top_k", "top_p", "min_p")
    return Sampling(settings.completion_length, eos=ends, **{name: getattr(settings, name) for name in names})


def choose_prompts(settings: Reinforcing, tokenizer: Any, passages: Callable[[], list[str]]) -> Prompts:
    """The prompts of the files that the settings name, or else of what the corpus holds out."""
    if settings.prompt_file is not None:
        return read_prompts(settings, tokenizer)
    for name, empty in (("held_out_file", None), ("as_chat", False)):
        if getattr(settings, name) != empty:
            raise InputError(f"{name} has no effect without prompt_file: give a file of prompts, or leave it out.")
    return split_prompts(settings, tokenizer, passages())


def read_prompts(settings: Reinforcing, tokenizer: Any) -> Prompts:
    """Prompts of files, each once, and no wider than the longest; those for the comparison are from all over theirs."""
    files = [path for path in (settings.prompt_file, settings.held_out_file) if path is not None]
    read = [read_prompt_rows(path, make_render(tokenizer), settings.as_chat) for path in files]
    check_as_chat(settings.as_chat, [each for asked, _ in read for each in asked], tokenizer)
    encoded = [encode_prompt_rows(tokenizer, asked, settings.prompt_length) for asked, _ in read]
    say_left_out([line for _, broken in read for line in broken] + [line for _, long in encoded for line in long])
    parts = [rows for rows, _ in encoded]
    train, kept = [*parts[0]], settings.compare.prompts
    if len(parts) == 1:
        needed = kept + settings.prompts
        chosen = set(spread(kept, len(train)).tolist())
        held_out = [key for number, key in enumerate(train) if number in chosen]
        train = [key for number, key in enumerate(train) if number not in chosen]
    else:
        needed, held_out = settings.prompts, [*parts[1]]
        for key in set(train) & set(held_out):
            check_same(parts[0][key], parts[1][key])
        if shared := len(set(train) & set(held_out)):
            print(f"warning: {shared} prompts of {settings.held_out_file} are also learned from")
        held_out = [held_out[number] for number in spread(min(kept, len(held_out)), len(held_out))]
    if len(parts[0]) < needed:
        raise InputError(
            f"{settings.prompt_file} has {len(parts[0])} different prompts that can be used; {needed} are needed: "
            f"{settings.prompts} for an update, and compare.prompts, {kept}, where no held_out_file has them. Give "
            "more, or smaller numbers."
        )
    width = max(len(key) for key in train + held_out) // np.dtype(np.int32).itemsize
    train_rows, held_out_rows = (pad_keys(tokenizer, keys, width) for keys in (train, held_out))
    return Prompts(train_rows, held_out_rows, {key: rows[key] for rows in parts for key in rows})


def check_as_chat(as_chat: bool, asked: Sequence[Asked], tokenizer: Any) -> None:
    """InputError where as_chat does nothing; a note where a chat model is given strings without it."""
    strings = sum(isinstance(each.row.get("prompt"), str) for each in asked)
    if as_chat and not strings:
        raise InputError("as_chat has no effect: every prompt is of messages already. Leave it out.")
    if strings and not as_chat and tokenizer.chat_template:
        print(f"note: {strings} prompts are given as they are; --as-chat makes a user's message of each")


def spread(count: int, total: int) -> np.ndarray:
    """So many numbers below a total, at equal distances. [count]."""
    return np.arange(count) * total // max(count, 1)


def fit_width(settings: Reinforcing, prompts: Prompts) -> Reinforcing:
    """The settings with prompts as wide as they are, without padding that all have in common."""
    return dataclasses.replace(settings, prompt_length=prompts.train[0].shape[1])


def split_prompts(settings: Reinforcing, tokenizer: Any, passages: list[str]) -> Prompts:
    """Openings of held-out passages, some from all over the corpus kept for the comparison."""
    prompts, mask = passage_openings(tokenizer, passages, settings.prompt_length)
    kept = settings.compare.prompts
    if len(prompts) < kept + settings.prompts:
        raise InputError(
            f"The corpus holds out {len(prompts)} passages with an opening of {settings.prompt_length} tokens; "
            f"{settings.prompts} prompts an update and {kept} to compare on need {kept + settings.prompts}. "
            "Give more text, fewer prompts or shorter ones."
        )
    chosen = np.zeros(len(prompts), bool)
    chosen[spread(kept, len(prompts))] = True
    return Prompts((prompts[~chosen], mask[~chosen]), (prompts[chosen], mask[chosen]))


def check(
    settings: Reinforcing, config: TransformerConfig, reward: Reward, prompts: Prompts, tokenizer: Any, seed: int
) -> None:
    """Raise InputError for settings that cannot work, before anything is trained."""
    check_seed(seed)
    check_optimizer(settings)
    check_lora(settings.lora, config)
    counts: dict[str, int] = {name: getattr(settings, name) for name in COUNTS}
    counts |= {f"compare.{name}": count for name, count in dataclasses.asdict(settings.compare).items()}
    check_counts(counts)
    check_lengths(settings.prompt_length, make_sampling(settings, ()), config)
    if settings.prompt_length + settings.completion_length > reward.context:
        raise InputError(
            f"A prompt of {settings.prompt_length} tokens and a completion of {settings.completion_length} are longer "
            f"than the reward model's context of {reward.context}: shorten one of them."
        )
    if settings.temperature == 0:
        raise InputError("A policy learns from sampled completions: give a temperature above 0.")
    estimator = chosen_estimator(settings.estimator, settings.options, settings.group_size)
    parts = batch_parts(make_mesh())
    if settings.prompts * settings.group_size % (estimator.minibatches * parts):
        raise InputError(
            f"{settings.prompts} prompts x {settings.group_size} completions do not divide into "
            f"{estimator.minibatches} minibatches over {parts} devices."
        )
    if settings.prompts % parts:
        raise InputError(f"prompts is {settings.prompts}, which does not divide over {parts} devices.")
    completions = settings.prompts * settings.group_size
    if estimator.kl_target is not None and estimator.kl_horizon <= completions / 5:
        raise InputError(
            f"kl_horizon is {estimator.kl_horizon}; with {completions} completions an update it must be above "
            f"{completions / 5:g}, or the coefficient could change its sign."
        )
    for name in ("slots", "tokens_at_once"):
        if getattr(settings, name) < 0:
            raise InputError(f"{name} is {getattr(settings, name)}; it must be at least 1, or 0.")
    if settings.noise_every < 0 or (settings.noise_every and settings.prompts < 2):
        raise InputError("noise_every must be at least 0, and a noise is measured between at least 2 prompts.")
    check_text_reward(reward, prompts, tokenizer)
    check_signs(estimator)


def check_text_reward(reward: Reward | None, prompts: Prompts, tokenizer: Any) -> None:
    """Try the part of a reward that is a function of text: a mistake in it should show before anything is trained."""
    if reward is not None:
        some = [part[:4] for part in prompts.train]
        texts, found = decode_completions(tokenizer, *some), find_rows(prompts.rows, *some)
        asked = [text if each is None else each.prompt for text, each in zip(texts, found, strict=True)]
        rows = [None if each is None else each.row for each in found]
        try_text_reward(reward, asked, texts, rows if prompts.rows else None)


def make_gold(config: RewardConfig, tokenizer: Any) -> Reward | None:
    """The reward to look at beside the one that is optimised, if one is named."""
    return make_reward(config, tokenizer) if config != RewardConfig(names=()) else None
