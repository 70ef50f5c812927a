"""The texts of the recipe `human_preferences`: what is learned from, what is held out, and how it is shown."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.human_ratings import HELD_OUT
from experiments.judgements import Judgements, gaps_of, votes_of
from experiments.pretrain import Text
from experiments.reinforcing import Prompts, Reinforcing, split_prompts
from experiments.vader_ratings import (
    SOURCES,
    Rated,
    draw_pairs,
    fetch_sdist,
    first_of_each_text,
    mean_ratings,
    pairs_of_all_votes,
    pairs_of_one_vote,
    read_rated,
    split_rated,
)
from rl_jax.data.corpus import encode_passages
from rl_jax.data.preferences import Judged, encode_preferences
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.types import PreferenceBatch

MOST_TOKENS = 256  # of a snippet


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a reward model sees of a snippet when it learns."""

    dropped: float = 0.25
    """Share of the tokens of a snippet that a reward model does not see when it learns, on average; of each snippet
    another share, from 0 to twice this."""
    copies: int = 4
    """Times that a rated snippet is in the data, each time without other tokens."""
    longest: int = 40
    """Most tokens that are left of a snippet; what is beyond is cut. Held-out snippets are judged whole."""


class Data(NamedTuple):
    """Rated texts: snippets to learn from, held-out snippets, and those of the other collections."""

    train: list[Rated]
    held_out: list[Rated]
    others: list[Rated]


def load_data(sdist: Path | None) -> Data:
    """All four collections; a text that is held out is nowhere else."""
    with tempfile.TemporaryDirectory() as folder:
        path = fetch_sdist(Path(folder)) if sdist is None else sdist
        collections = {name: first_of_each_text(read_rated(path, source)) for name, source in SOURCES.items()}
    train, held_out = split_rated(collections.pop("movies"), HELD_OUT)
    apart = {each.text for each in held_out}
    return Data(train, held_out, [x for rated in collections.values() for x in rated if x.text not in apart])


def make_text(data: Data, vocab_size: int) -> Text:
    """The corpus of all texts but the held-out snippets, without a rating, in a mixed order."""
    texts = [each.text for each in (*data.train, *data.others)]
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    tokenizer, held_out = train_tokenizer(texts, vocab_size), [each.text for each in data.held_out]
    return Text(tokenizer, held_out, *(encode_passages(tokenizer, part) for part in (texts, held_out)))


def drop_tokens(batch: PreferenceBatch, share: float, longest: int, seed: int) -> PreferenceBatch:
    """The same completions without some of their tokens, the others moved together; those beyond `longest` are cut.

    Each completion lacks a share of its own, uniform from 0 to twice `share`; its first token stays.
    """
    draw, mask = np.random.default_rng([seed, 1]), np.asarray(batch.completion_mask)
    shares = 2 * share * draw.random(mask.shape[:-1])
    kept = mask & (draw.random(mask.shape) >= shares[..., None])
    kept[..., 0] = mask[..., 0]
    order = np.argsort(~kept, axis=-1, kind="stable")[..., :longest]
    parts = {"completions": batch.completions, "completion_mask": kept}
    arrays: dict[str, Any] = {name: np.take_along_axis(np.asarray(x), order, axis=-1) for name, x in parts.items()}
    return dataclasses.replace(batch, **arrays)


def encode_snippets(tokenizer: Any, rows: Sequence[Judged]) -> PreferenceBatch:
    """Judged snippets, all of them."""
    batch, too_long = encode_preferences(tokenizer, rows, MOST_TOKENS)
    assert not too_long, "no snippet has so many tokens"
    return batch


def rated_snippets(tokenizer: Any, rated: Sequence[Rated]) -> PreferenceBatch:
    """Each snippet with the mean of its ratings."""
    ratings = mean_ratings(rated).tolist()
    return encode_snippets(
        tokenizer, [Judged("", (each.text,), (mean,)) for each, mean in zip(rated, ratings, strict=True)]
    )


def make_ratings(data: Data, tokenizer: Any, seen: Seen, seed: int) -> Judgements:
    """Snippets with their mean ratings; those to learn from several times, each time without other tokens."""
    train = jax.tree.map(lambda x: np.repeat(x, seen.copies, axis=0), rated_snippets(tokenizer, data.train))
    nothing = np.zeros((len(data.held_out), 0))
    train = drop_tokens(train, seen.dropped, seen.longest, seed)
    return Judgements(train, rated_snippets(tokenizer, data.held_out), nothing, nothing)


def make_votes(data: Data, tokenizer: Any, seen: Seen, count: int, kept: Sequence[Judged], seed: int) -> Judgements:
    """Pairs of snippets, each with a vote of its own: one rating of either; and the held-out pairs that are given."""
    votes = pairs_of_one_vote(data.train, draw_pairs(len(data.train), count, seed), seed)
    train = drop_tokens(encode_snippets(tokenizer, votes), seen.dropped, seen.longest, seed)
    return Judgements(train, encode_snippets(tokenizer, kept), gaps_of(kept), votes_of(kept))


def held_out_pairs(data: Data, count: int) -> list[Judged]:
    """Pairs of held-out snippets with the votes of all raters, the same for all seeds."""
    return pairs_of_all_votes(data.held_out, draw_pairs(len(data.held_out), count, seed=0))


def make_prompts(settings: Reinforcing, tokenizer: Any, passages: list[str]) -> Prompts:
    """Openings of held-out snippets, each after an end of text, as in pretraining and before the judged snippets."""
    prompts = split_prompts(settings, tokenizer, passages)

    def begun(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens, mask = (np.pad(x, ((0, 0), (1, 0))) for x in (tokens, mask))
        first = np.argmax(mask, axis=1) - 1
        tokens[np.arange(len(tokens)), first] = tokenizer.eos_token_id
        mask[np.arange(len(tokens)), first] = True
        return tokens, mask

    return Prompts(begun(*prompts.train), begun(*prompts.held_out))
