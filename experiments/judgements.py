"""Judgements for a reward model: read from files, or given by a gold reward to samples of a policy."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rl_jax.data.conversations import make_render
from rl_jax.data.preferences import Judged, encode_preferences, read_preferences, write_preferences
from rl_jax.data.prompts import decode_completions
from rl_jax.errors import InputError
from rl_jax.types import PreferenceBatch, Rollout

Kind = Literal["pairs", "rankings", "ratings"]

NAMED = 20  # rows left out that are named one by one
HELD_OUT = 0.1  # share of the judgements that a reward model never learns from, where no file holds them


class Judgements(NamedTuple):
    """What a reward model learns from, and what it is measured on. NumPy arrays.

    Attributes:
        train: M rows.
        held_out: M' rows.
        gaps: how far apart the held-out candidates really are; NaN where nobody knows. [M'].
        votes: of each rater for the first of each held-out pair: 1, 0, 0.5 for a tie; NaN where there is none. [M', R].
        broken: rows of the files that could not be used.
    """

    train: PreferenceBatch
    held_out: PreferenceBatch
    gaps: np.ndarray
    votes: np.ndarray
    broken: int = 0


def kind_of(data: PreferenceBatch) -> Kind:
    """Which judgements these are, by their number of candidates and their labels."""
    candidates = data.labels.shape[1]
    if candidates == 1:
        return "ratings"
    return "pairs" if candidates == 2 and np.allclose(np.sum(data.labels, axis=1), 1) else "rankings"


def load_judgements(preferences: Path, held_out: Path | None, tokenizer: Any, context: int) -> Judgements:
    """Read judgements and those held out, or a tenth of the others; say which rows cannot be used, and why."""
    read = [read_preferences(path, make_render(tokenizer)) for path in (preferences, held_out) if path is not None]
    parts = [each.rows for each in read] if held_out is not None else split_rows(read[0].rows)
    if not all(parts):
        raise InputError(f"{preferences} has too few rows to hold some out: give more, or a held_out file.")
    if held_out is not None and (shared := set(map(_texts, parts[0])) & set(map(_texts, parts[1]))):
        print(f"warning: {len(shared)} rows of {held_out} are also learned from")
    broken = [line for each in read for line in each.broken]
    arrays, rows = [], []
    for part in parts:
        data, too_long = encode_preferences(tokenizer, part, context)
        broken += [f"row {part[i].completions[0][:40]!r}: longer than the context of {context}" for i in too_long]
        arrays.append(data if len(arrays) else without_every_second_end(data))
        rows.append([part[i] for i in sorted(set(range(len(part))) - set(too_long))])
    say_left_out(broken)
    if kind_of(arrays[0]) != kind_of(arrays[1]):
        raise InputError(f"The rows to learn from are {kind_of(arrays[0])}, and those held out {kind_of(arrays[1])}.")
    return Judgements(*arrays, gaps=gaps_of(rows[1]), votes=votes_of(rows[1]), broken=len(broken))


def split_rows(rows: Sequence[Judged]) -> list[list[Judged]]:
    """The rows to learn from, and about a tenth that shares no prompt with them, nor a text where there is no prompt.

    Where all of them hang together, rows are held out one by one, and that is said.
    """
    if len(rows) < 2:
        return [list(rows), []]
    places: dict[str, int] = {}
    marks = [
        (row, places.setdefault(mark, len(places)))
        for row, each in enumerate(rows)
        for mark in ([f"prompt {each.prompt}"] if each.prompt else each.completions)
    ]
    row, mark = np.array(marks).T
    links = coo_array((np.ones(len(row)), (row, len(rows) + mark)), shape=(len(rows) + len(places),) * 2)
    _, components = connected_components(links, directed=False)
    _, members, sizes = np.unique(components[: len(rows)], return_inverse=True, return_counts=True)
    wanted, held_out = round(HELD_OUT * len(rows)), np.zeros(len(rows), bool)
    for component in np.random.default_rng(0).permutation(len(sizes)):
        if held_out.sum() < wanted and held_out.sum() + sizes[component] <= 1.5 * wanted:
            held_out |= members == component
    if held_out.sum() < 0.5 * wanted:
        print("warning: too many rows share prompts or texts: those held out share some with those learned from")
        held_out = np.isin(np.arange(len(rows)), np.random.default_rng(0).permutation(len(rows))[:wanted])
    return [[each for each, out in zip(rows, held_out, strict=True) if out == part] for part in (False, True)]


def without_every_second_end(data: PreferenceBatch) -> PreferenceBatch:
    """The same rows, of which every second has its completions without their last token, the end of the text.

    RL cuts completions at a length, and the reward is then to be read where there is no end.
    """
    mask = data.completion_mask.copy()
    lengths = mask.sum(axis=2)
    row, candidate = np.nonzero((lengths > 1) & (np.arange(len(mask)) % 2 == 1)[:, None])
    mask[row, candidate, lengths[row, candidate] - 1] = False
    return dataclasses.replace(data, completion_mask=mask)


def _texts(row: Judged) -> tuple[str, ...]:
    return (row.prompt, *sorted(row.completions))


def say_left_out(lines: Sequence[str]) -> None:
    """Show how many rows of a file cannot be used, and why the first of them cannot."""
    if lines:
        print(f"{len(lines)} rows are left out:")
        print("\n".join([*lines[:NAMED], *["..."] * (len(lines) > NAMED)]))


def gaps_of(rows: Sequence[Judged]) -> np.ndarray:
    """The gaps of judged rows, NaN where unknown. [M]."""
    return np.array([np.nan if row.gap is None else row.gap for row in rows])


def votes_of(rows: Sequence[Judged]) -> np.ndarray:
    """The raters' votes of judged rows, NaN where a row has fewer than another. [M, R]."""
    most = max((len(row.raters) for row in rows), default=0)
    return np.array([[*row.raters, *[np.nan] * (most - len(row.raters))] for row in rows]).reshape(len(rows), most)


def standardise(data: Judgements) -> Judgements:
    """Ratings with mean 0 and variance 1 over the training rows: the head has no bias to learn another mean with."""
    mean, std = data.train.labels.mean(), data.train.labels.std()
    if not std > 0:
        raise InputError("All ratings are the same: there is nothing to learn from them.")
    train, held_out = (
        dataclasses.replace(part, labels=(part.labels - mean) / std) for part in (data.train, data.held_out)
    )
    return data._replace(train=train, held_out=held_out)


def judge_pairs(
    rollout: Rollout, gold: np.ndarray, noise: float, seed: int | Sequence[int]
) -> tuple[PreferenceBatch, np.ndarray]:
    """Which of two completions of each prompt a gold reward prefers, with Bradley-Terry noise.

    The first is preferred with probability sigmoid((g_0 - g_1) / (noise * std of g)).

    Args:
        rollout: NumPy arrays of B = 2 M sequences, two for each prompt.
        gold: their gold rewards. [M, 2].
        noise: gold rewards' standard deviations in which the odds gain a factor of e; 0 for none.
        seed: of the noise.

    Returns:
        Pairs, labelled 1 and 0, or 0.5 each where gold rewards are equal and there is no noise; and how far apart the
        gold rewards are. [M].

    Raises:
        InputError: all gold rewards are the same, or one is not finite.
    """
    gold = np.asarray(gold, np.float64)
    if not (np.isfinite(gold).all() and gold.std() > 0):
        raise InputError("The gold reward is the same for every completion, or not finite: it cannot judge any pair.")
    lead = (gold[:, 0] - gold[:, 1]) / gold.std()
    drawn = lead if noise == 0 else lead + noise * np.random.default_rng(seed).logistic(size=len(lead))
    first = (np.sign(drawn) + 1) / 2
    pairs = PreferenceBatch(
        prompts=rollout.prompts[::2],
        prompt_mask=rollout.prompt_mask[::2],
        completions=rollout.completions.reshape(len(gold), 2, -1),
        completion_mask=rollout.completion_mask.reshape(len(gold), 2, -1),
        labels=jnp.stack([first, 1 - first], axis=1),
        margins=jnp.zeros(len(gold)),
    )
    return jax.tree.map(np.asarray, pairs), np.abs(gold[:, 0] - gold[:, 1])


def write_pairs(path: Path, pairs: PreferenceBatch, gaps: np.ndarray, tokenizer: Any) -> None:
    """Write pairs as arrays that `read_pairs` gives back, and beside them as JSONL for people to read."""
    texts = decode_completions(
        tokenizer, *(x.reshape(-1, x.shape[-1]) for x in (pairs.completions, pairs.completion_mask))
    )
    asked = decode_completions(tokenizer, pairs.prompts, pairs.prompt_mask)
    rows = []
    for number, (labels, gap) in enumerate(zip(pairs.labels.tolist(), gaps.tolist(), strict=True)):
        candidates = [(texts[2 * number + k], label) for k, label in enumerate(labels)]
        ordered, shares = zip(*sorted(candidates, key=lambda pair: -pair[1]), strict=True)
        rows.append(Judged(asked[number], ordered, shares, gap=gap))
    write_preferences(path.with_suffix(".jsonl"), rows)
    half = path.with_name(path.name + ".tmp")
    arrays = {name: np.ascontiguousarray(value) for name, value in vars(pairs).items()}  # safetensors takes no views
    save_file(arrays | {"gaps": gaps}, half)
    os.replace(half, path)


def read_pairs(path: Path) -> tuple[PreferenceBatch, np.ndarray]:
    """Pairs and gaps that `write_pairs` wrote.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    try:
        arrays: dict[str, Any] = load_file(path)
        gaps = arrays.pop("gaps")
        pairs = PreferenceBatch(**arrays)
        _check_pairs(pairs, gaps)
    except MemoryError:  # no fault of the file's
        raise
    except Exception as error:  # a damaged file can break its reader in any way
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} cannot be read ({why}); bring it back from a copy, or start another run.") from error
    return pairs, gaps


def _check_pairs(pairs: PreferenceBatch, gaps: np.ndarray) -> None:
    """Raises ValueError for arrays that no pairs have."""
    rows, prompt_length, length = len(pairs.labels), pairs.prompts.shape[-1], pairs.completions.shape[-1]
    layout = {
        "prompts": ((rows, prompt_length), "i"),
        "prompt_mask": ((rows, prompt_length), "b"),
        "completions": ((rows, 2, length), "i"),
        "completion_mask": ((rows, 2, length), "b"),
        "labels": ((rows, 2), "f"),
        "margins": ((rows,), "f"),
        "gaps": ((rows,), "f"),
    }
    if {name: (x.shape, x.dtype.kind) for name, x in (vars(pairs) | {"gaps": gaps}).items()} != layout:
        raise ValueError("its arrays are not those of pairs")
    if min(pairs.prompts.min(initial=0), pairs.completions.min(initial=0)) < 0 or not np.all(np.isfinite(gaps)):
        raise ValueError("a number in it is none that pairs have")
    if not np.allclose(np.sum(pairs.labels, axis=1), 1):
        raise ValueError("the labels of a pair in it do not add up to 1")
