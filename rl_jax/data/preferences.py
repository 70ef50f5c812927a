"""What people said of completions: rows of files and padded arrays.

Letters: M rows of a data set, B of a batch, K candidate completions of each, P prompt length, C completion length.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from rl_jax.data.conversations import (
    BrokenRow,
    Render,
    plain_turns,
    read_completion,
    read_completions,
    turn_end,
    usable_rows,
)
from rl_jax.data.files import Row, read_rows
from rl_jax.data.prompts import left_padded
from rl_jax.data.tokenizer import encode_openings, encode_texts
from rl_jax.errors import InputError
from rl_jax.types import PreferenceBatch

LARGEST = float(np.finfo(np.float32).max)  # of a number in a row, since batches are float32
COLUMNS = (
    "chosen and rejected of pairs; completions with scores or ranks of rankings; or completion, or messages, with "
    "rating or label of ratings"
)


class Judged(NamedTuple):
    """A prompt, its candidate completions, and what was said of them.

    Attributes:
        prompt: text; "" where there is none.
        completions: K texts: 1 of a rating, 2 of a pair, more of a ranking.
        labels: of a pair, the share of the judges who prefer each, (p, 1 - p), a tie is (0.5, 0.5); of a ranking,
            numbers that order the candidates, higher is better; of a single completion, its rating.
        margin: reward by which the preferred of a pair is to lead; 0 where nobody said.
        gap: how far apart the candidates really are, in the unit of the ratings; None where unknown.
        raters: of a pair, each rater's vote for the first: 1, 0, or 0.5 for a tie; of a rating, each rater's rating.
    """

    prompt: str
    completions: tuple[str, ...]
    labels: tuple[float, ...]
    margin: float = 0.0
    gap: float | None = None
    raters: tuple[float, ...] = ()


class Read(NamedTuple):
    """The usable rows of a file, and of each of the others one line: "FILE, line 7 has an empty "chosen"."""

    rows: list[Judged]
    broken: list[str]


def read_preferences(path: str | os.PathLike[str], render: Render = plain_turns) -> Read:
    """Reads judged completions from a .jsonl or .parquet file, of which only the rows' texts are kept.

    Which kind a row is follows from its columns:

    - a pair: `chosen`, `rejected`; and, if there, `preference`, the share of the judges who prefer chosen (1), and
      `margin`;
    - a ranking: `completions` with `scores` (higher is better) or `ranks` (1 is best). One of two candidates is kept
      as a pair, a tie where both are equal;
    - a rating: `completion` or `messages`, of which the last is what was rated, and `rating`, or `label`, true (1) or
      false (0).

    Any of them may have `prompt`, `gap` and, but for rankings, `raters`, as in `Judged`; without a prompt it is "".
    Prompts and completions are strings, or lists of messages {"role", "content"}, of which `render` makes text. Where
    chosen and rejected are whole conversations, the prompt is what they have in common. Other columns are left alone.

    A row that is not JSON, or that lacks a column, has one of the wrong type, an empty completion, two equal ones in
    a pair, half of a surrogate pair or a number that is not finite, is left out and named.

    Args:
        path: the file.
        render: from `make_render`, to use a tokenizer's chat template.

    Raises:
        InputError: the file cannot be read, none of its rows can be used, or they are of different kinds.
    """
    places: dict[str, str] = {}

    def judged(row: Row) -> Judged:
        kind = _kind(row.values)
        found = _READERS[kind](row.values, render)
        places.setdefault(kind, row.place)
        if len(places) > 1:
            (one, first), (other, second) = places.items()
            raise InputError(f"{first} is a {one} and {second} is a {other}: put each kind in a file of its own")
        return found

    return Read(*usable_rows(Path(path), read_rows(Path(path)), judged))


def read_demonstrations(path: str | os.PathLike[str], render: Render = plain_turns) -> Read:
    """Reads prompts with a completion to learn from, of files as `read_preferences` has them.

    The columns are `prompt` (or none) and `completion`; or `messages`, of which the last is the completion; or `text`,
    a completion of nothing. The row's label, which nobody gave, is 0. Rows that cannot be used are left out and named.

    Raises:
        InputError: the file cannot be read, or none of its rows can be used.
    """

    def shown(row: Row) -> Judged:
        values: Mapping[str, Any] = row.values
        if all(values.get(name) is None for name in ("completion", "messages", "text")):
            raise BrokenRow('has neither "completion", "messages" nor "text"')
        if values.get("completion") is None and values.get("messages") is None:
            values = {"completion": values["text"]}
        return Judged(*read_completion(values, "completion", render), (0.0,))

    return Read(*usable_rows(Path(path), read_rows(Path(path)), shown))


def write_preferences(path: str | os.PathLike[str], rows: Sequence[Judged]) -> None:
    """Writes JSONL that `read_preferences` gives back equal; rows with more than two candidates make it of rankings."""
    ranking = max((len(row.completions) for row in rows), default=0) > 2
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(_record(row, ranking), ensure_ascii=False, allow_nan=False) + "\n")


def encode_preferences(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Judged], context: int
) -> tuple[PreferenceBatch, list[int]]:
    """Encodes every row that fits, prompts with the tokens that begin a sequence: nothing is cut.

    Prompts are padded on the left to the longest of them, completions on the right; padding is the end-of-sequence
    id. An empty prompt becomes a single end-of-sequence token. Each completion is followed by one, but where it ends
    with it already, or with what the chat template puts after an assistant's turn. P + C may be more than the context,
    which counts the real tokens of a row.

    Args:
        tokenizer: of the model.
        rows: M' of them.
        context: tokens that a prompt and the longest of its completions may have together.

    Returns:
        NumPy arrays of the M rows that fit, in their order, and the numbers of the rows that do not.

    Raises:
        InputError: there is no row, none fits, or the tokenizer lacks the end-of-sequence token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("the tokenizer has no end-of-sequence token to end completions with")
    if not rows:
        raise InputError("there are no rows to encode")
    closing, ends = np.asarray([eos], np.int32), (eos, turn_end(tokenizer))
    opened = _encoded(encode_openings, tokenizer, [row.prompt for row in rows])
    prompts = [ids if len(ids) else closing for ids in opened]
    flat = _encoded(encode_texts, tokenizer, [text for row in rows for text in row.completions])
    closed = (ids if len(ids) and ids[-1] in ends else np.concatenate([ids, closing]) for ids in flat)
    completions = [[next(closed) for _ in row.completions] for row in rows]
    needed = [len(prompt) + max(map(len, ended)) for prompt, ended in zip(prompts, completions, strict=True)]
    kept = [index for index, tokens in enumerate(needed) if tokens <= context]
    if not kept:
        raise InputError(
            f"none of {len(rows)} rows fits a context of {context} tokens (the shortest needs {min(needed)}): "
            "take a model with a longer context, or shorter texts"
        )
    K = max(len(completions[index]) for index in kept)
    openings = [prompts[index] for index in kept]
    prompt_tokens, prompt_mask = left_padded(openings, max(map(len, openings)), tokenizer)
    lacking = np.zeros(0, np.int32)
    candidates = [ids for index in kept for ids in completions[index] + [lacking] * (K - len(completions[index]))]
    tokens, mask = _padded(candidates, eos)
    labels = np.zeros((len(kept), K), np.float32)
    for row, index in zip(labels, kept, strict=True):
        row[: len(rows[index].labels)] = rows[index].labels
    arrays: dict[str, Any] = {
        "prompts": prompt_tokens,
        "prompt_mask": prompt_mask,
        "completions": tokens.reshape(len(kept), K, -1),
        "completion_mask": mask.reshape(len(kept), K, -1),
        "labels": labels,
        "margins": np.asarray([rows[index].margin for index in kept], np.float32),
    }
    return PreferenceBatch(**arrays), [index for index, tokens in enumerate(needed) if tokens > context]


def padded_batches(data: PreferenceBatch, batch_size: int) -> Iterator[PreferenceBatch]:
    """Batches of one shape that together hold every row once, in order.

    The last is filled with rows none of whose completions has a true entry in its mask.
    """
    total = len(data.prompts)
    for start in range(0, total, batch_size):
        index = np.arange(start, start + batch_size)
        batch = jax.tree.map(lambda rows, index=index: rows[np.minimum(index, total - 1)], data)
        batch.completion_mask[index >= total] = False
        yield batch


def _encoded(
    encode: Callable[..., list[np.ndarray]], tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[np.ndarray]:
    distinct = list(dict.fromkeys(texts))  # a text may stand in many pairs
    encoded = dict(zip(distinct, encode(tokenizer, distinct), strict=True))
    return [encoded[text] for text in texts]


def _padded(rows: Sequence[np.ndarray], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids, filled up on the right to the longest of them, and their mask."""
    lengths = np.array([[len(row)] for row in rows])
    mask = np.arange(lengths.max()) < lengths
    tokens = np.full(mask.shape, fill, np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask


def _kind(values: Mapping[str, Any]) -> str:
    has = {name for name, value in values.items() if value is not None}
    if {"chosen", "rejected"} <= has:
        return "pair"
    if "completions" in has and has & {"scores", "ranks"}:
        return "ranking"
    if has & {"completion", "messages"} and has & {"rating", "label"}:
        return "rating"
    raise BrokenRow(f"has no judgement; its columns are {', '.join(sorted(has)) or 'empty'}. It needs {COLUMNS}")


def _pair(values: Mapping[str, Any], render: Render) -> Judged:
    prompt, completions = read_completions(values, {name: values[name] for name in ("chosen", "rejected")}, render)
    if completions[0] == completions[1]:
        raise BrokenRow('has the same text under "chosen" and "rejected"')
    preference = _number(values, "preference", 1.0, 0.0, 1.0)
    margin, raters = _number(values, "margin", 0.0, 0.0), _numbers(values, "raters", 0.0, 1.0)
    return Judged(prompt, completions, (preference, 1 - preference), margin, _gap(values), raters)


def _ranking(values: Mapping[str, Any], render: Render) -> Judged:
    candidates = values["completions"]
    if not isinstance(candidates, list) or len(candidates) < 2:
        raise BrokenRow('has no list of at least 2 under "completions"')
    name = "ranks" if values.get("scores") is None else "scores"
    sign = -1.0 if name == "ranks" else 1.0
    labels = tuple(sign * number for number in _numbers(values, name))
    if len(labels) != len(candidates):
        raise BrokenRow(f'has {len(candidates)} completions and {len(labels)} numbers under "{name}"')
    named = {f"completions, number {number}": candidate for number, candidate in enumerate(candidates, start=1)}
    prompt, completions = read_completions(values, named, render)
    if len(labels) == 2:
        if completions[0] == completions[1]:
            raise BrokenRow("has the same text in both completions")
        first = (1 + float(np.sign(labels[0] - labels[1]))) / 2
        labels = (first, 1 - first)
    return Judged(prompt, completions, labels, gap=_gap(values))


def _rating(values: Mapping[str, Any], render: Render) -> Judged:
    prompt, completions = read_completion(values, "completion", render)
    label = values.get("label")
    if values.get("rating") is None and not isinstance(label, bool):
        raise BrokenRow(f'has {label!r} under "label", which is neither true nor false')
    rating = _number(values, "rating", float(label or 0))
    return Judged(prompt, completions, (rating,), gap=_gap(values), raters=_numbers(values, "raters"))


_READERS = {"pair": _pair, "ranking": _ranking, "rating": _rating}


def _gap(values: Mapping[str, Any]) -> float | None:
    return None if values.get("gap") is None else _number(values, "gap", 0.0, least=0.0)


def _number(
    values: Mapping[str, Any], name: str, default: float, least: float = -math.inf, most: float = math.inf
) -> float:
    value = values.get(name)
    return default if value is None else _checked(value, name, least, most)


def _numbers(
    values: Mapping[str, Any], name: str, least: float = -math.inf, most: float = math.inf
) -> tuple[float, ...]:
    value = values.get(name)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BrokenRow(f'has no list of numbers under "{name}"')
    return tuple(_checked(number, name, least, most) for number in value)


def _checked(value: object, name: str, least: float, most: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise BrokenRow(f'has {value!r} under "{name}", which is no number')
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= LARGEST:
        raise BrokenRow(f'has a number under "{name}" that is not finite')
    if not least <= number <= most:
        wanted = f"at least {least:g}" if math.isinf(most) else f"from {least:g} to {most:g}"
        raise BrokenRow(f'has {number:g} under "{name}"; it must be {wanted}')
    return number


def _record(row: Judged, ranking: bool) -> dict[str, Any]:
    more: dict[str, Any] = {"gap": row.gap} if row.gap is not None else {}
    if ranking:
        return {"prompt": row.prompt, "completions": list(row.completions), "scores": list(row.labels)} | more
    if row.raters:
        more["raters"] = list(row.raters)
    if len(row.completions) == 1:
        return {"prompt": row.prompt, "completion": row.completions[0], "rating": row.labels[0]} | more
    if row.margin:
        more["margin"] = row.margin
    (chosen, rejected), (preference, _) = row.completions, row.labels
    return {"prompt": row.prompt, "chosen": chosen, "rejected": rejected, "preference": preference} | more
