"""Prompts of files: what the policy is given, and what a reward is told of the row that a prompt came from.

A row is found again by the token ids of its prompt, so that it need not go through the device: wherever a rollout comes
from, its prompts say which rows they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

from rl_jax.data.conversations import Render, read_prompt, usable_rows
from rl_jax.data.files import Row, read_rows, read_text
from rl_jax.data.prompts import left_padded
from rl_jax.data.tokenizer import encode_openings
from rl_jax.errors import InputError


class Asked(NamedTuple):
    """A prompt of a file.

    Attributes:
        text: what the policy is given.
        prompt: what a reward on text is told: the row's string, or what the user said last in its messages.
        turns: the whole of it for people: the string, or a line for each turn.
        row: the whole row, with the columns that are no prompt.
        place: where it stands.
    """

    text: str
    prompt: str
    turns: str
    row: Mapping[str, Any]
    place: str


PromptRows = Mapping[bytes, Asked]
"""The prompts of a file, each once and in its order, by `prompt_key`."""


def prompt_key(ids: np.ndarray) -> bytes:
    """What a prompt is known by: its real tokens, without padding. int [n]."""
    return np.asarray(ids, np.int32).tobytes()


def read_prompt_rows(path: Path, render: Render, as_chat: bool = False) -> tuple[list[Asked], list[str]]:
    """Reads the prompts of a file, or of a data set of the hub.

    A row has `prompt`, a string or messages, or `messages`, of which a last one of the assistant's is left out; a line
    of a .txt file is the string. Messages become text with the assistant's turn opened.

    Args:
        path: .jsonl, .parquet or .txt; or as for `read_rows`.
        render: messages -> text.
        as_chat: whether a string is the content of a user's message.

    Returns:
        The prompts, and a line on each of the rows that cannot be used.

    Raises:
        InputError: the file cannot be read, or none of its rows can be used.
    """

    def asked(row: Row) -> Asked:
        return Asked(*read_prompt(row.values, render, as_chat), row.values, row.place)

    return usable_rows(path, _text_rows(path) if path.suffix == ".txt" else read_rows(path), asked)


def encode_prompt_rows(
    tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked], longest: int
) -> tuple[dict[bytes, Asked], list[str]]:
    """Encodes prompts, with the tokens that begin a sequence; nothing is cut, and each is taken once.

    Args:
        tokenizer: of the model.
        asked: the prompts.
        longest: tokens that a prompt may have.

    Returns:
        The prompts by `prompt_key`, and a line on each that is longer, or has no token.

    Raises:
        InputError: all are longer, or two rows with the same prompt differ elsewhere.
    """
    encoded = encode_openings(tokenizer, [each.text for each in asked])
    rows: dict[bytes, Asked] = {}
    left_out = []
    for ids, each in zip(encoded, asked, strict=True):
        if 0 < len(ids) <= longest:
            first = rows.setdefault(prompt_key(ids), each)
            check_same(first, each)
        else:
            left_out.append(f"{each.place}: the prompt has {len(ids)} tokens, not 1 to {longest}")
    if not rows:
        sizes = [len(ids) for ids in encoded]
        raise InputError(
            f"none of {len(asked)} prompts has at most {longest} tokens, the prompt length: the shortest has "
            f"{min(sizes)}, the longest {max(sizes)}; give a longer one"
        )
    return rows, left_out


def check_same(some: Asked, other: Asked) -> None:
    """Raises InputError where two rows have the same prompt, and something else that differs."""
    if some.row != other.row:
        names = [name for name in {**some.row, **other.row} if some.row.get(name) != other.row.get(name)]
        raise InputError(
            f"{some.place} and {other.place} have the same prompt and differ in {', '.join(names)}, so that a "
            "completion does not say which of them it is for: leave one of them out, or that column"
        )


def pad_keys(
    tokenizer: PreTrainedTokenizerBase, keys: Sequence[bytes], width: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The prompts with these keys, left-padded to P: the width, or the longest of them where it is longer.

    Returns:
        int32 [N, P], and their mask bool [N, P].
    """
    ids = [np.frombuffer(key, np.int32) for key in keys]
    return left_padded(ids, max(width, *map(len, ids)), tokenizer)


def find_rows(rows: PromptRows, prompts: ArrayLike, mask: ArrayLike) -> list[Asked | None]:
    """The row of each prompt; None for one that is from no file.

    Args:
        rows: by `prompt_key`.
        prompts: token ids. int32 [B, P].
        mask: true on real tokens. bool [B, P].
    """
    return [rows.get(prompt_key(ids[real])) for ids, real in zip(np.asarray(prompts), np.asarray(mask), strict=True)]


def _text_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            yield Row(f"{path}, line {number}", {"prompt": line})
