"""Texts that people have rated, as files to pretrain on, and to learn a reward from and to judge it by.

    python experiments/human_ratings.py --folder data/movie_reviews
    python experiments/human_ratings.py --folder data/tweets --source tweets --sdist vaderSentiment-3.3.2.tar.gz

Of 10,605 snippets of movie reviews, each with the ratings of 15 to 29 people, a tenth is held out. The folder gets

    texts.jsonl             the snippets to learn from, without their ratings: a corpus for pretraining
    ratings-train.jsonl     the same with their mean rating and the raw ones; ratings-held-out.jsonl the others
    pairs-train.jsonl       pairs of snippets, and which of the two a single rating of each puts first
    pairs-held-out.jsonl    pairs of held-out snippets, with the share of the raters who prefer the first, the gap
                            between the mean ratings, and each rater's vote
"""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

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
from rl_jax.data.preferences import Judged, write_preferences
from rl_jax.errors import InputError
from rl_jax.keys import check_seed
from rl_jax.run.loop import run_main

HELD_OUT = 0.1  # share of the documents; drawn with seed 0, like the held-out pairs, so that all seeds are judged alike
GAP = 0.5  # between the mean ratings of two texts; above it people nearly agree


@dataclasses.dataclass(frozen=True)
class Config:
    """Texts that people have rated, as files to pretrain on, and to learn a reward from and to judge it by."""

    folder: Path = Path("data/movie_reviews")
    """Folder that the files are written to."""
    source: Literal["movies", "products", "news", "tweets"] = "movies"
    """Snippets of movie reviews, sentences of product reviews or of opinion news, or tweets."""
    sdist: Path | None = None
    """A copy of the source distribution of vaderSentiment 3.3.2; without one, pip downloads it."""
    pairs: int = 20_000
    """Pairs to learn from."""
    held_out_pairs: int = 2_000
    """Held-out pairs."""
    seed: int = 0
    """Seed of the pairs to learn from and of their raters; what is held out is the same for all seeds."""


def load_rated(config: Config) -> list[Rated]:
    """The collection, from the copy that is given or from one that pip downloads for the moment."""
    if config.sdist is not None:
        return read_rated(config.sdist, SOURCES[config.source])
    with tempfile.TemporaryDirectory() as folder:
        return read_rated(fetch_sdist(Path(folder)), SOURCES[config.source])


def vote_figures(judged: Sequence[Judged], rated: Sequence[Rated]) -> dict[str, float]:
    """How far single votes agree with the mean ratings: shares, of pairs from `pairs_of_one_vote`.

    Ties of the votes count as neither in the agreement.
    """
    means = dict(zip((each.text for each in rated), mean_ratings(rated), strict=True))
    gaps = np.array([means[pair.completions[0]] - means[pair.completions[1]] for pair in judged])
    strict = np.array([pair.labels[0] != pair.labels[1] for pair in judged]) & (gaps != 0)
    wide = strict & (np.abs(gaps) > GAP)
    ties = np.mean([pair.labels[0] == pair.labels[1] for pair in judged])
    return {"ties": float(ties), "agree": _share(gaps > 0, strict), "agree_where_apart": _share(gaps > 0, wide)}


def _share(true: np.ndarray, among: np.ndarray) -> float:
    return float(true[among].mean()) if among.any() else float("nan")


def main(config: Config) -> None:
    check_seed(config.seed)
    for name in ("pairs", "held_out_pairs"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}; it must be at least 1.")
    folder = config.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists; give another --folder, or remove it.")
    everything = load_rated(config)
    rated = first_of_each_text(everything)
    train, held_out = split_rated(rated, HELD_OUT)
    learned = pairs_of_one_vote(train, draw_pairs(len(train), config.pairs, config.seed), config.seed)
    judged = pairs_of_all_votes(held_out, draw_pairs(len(held_out), config.held_out_pairs, seed=0))

    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": each.text}, ensure_ascii=False) + "\n" for each in train]
    (folder / "texts.jsonl").write_text("".join(lines), "utf-8", newline="\n")
    for name, part in (("train", train), ("held-out", held_out)):
        means = mean_ratings(part).tolist()
        rows = [
            Judged("", (each.text,), (mean,), raters=tuple(map(float, each.ratings)))
            for each, mean in zip(part, means, strict=True)
        ]
        write_preferences(folder / f"ratings-{name}.jsonl", rows)
    write_preferences(folder / "pairs-train.jsonl", learned)
    write_preferences(folder / "pairs-held-out.jsonl", judged)

    counts = [len(each.ratings) for each in rated]
    figures = vote_figures(learned, train)
    apart = sum(pair.gap is not None and pair.gap > GAP for pair in judged)
    print(
        f"{len(rated)} texts with {min(counts)} to {max(counts)} ratings each; {len(everything) - len(rated)} more "
        f"that repeat one of them are left out.\n"
        f"To learn from: {len(train)} texts and {len(learned)} pairs of them. Held out: {len(held_out)} texts and "
        f"{len(judged)} pairs, of which {apart} have mean ratings more than {GAP} apart.\n"
        f"Of the votes to learn from, {figures['ties']:.1%} are ties; {figures['agree']:.1%} of the others are for the "
        f"text with the higher mean rating, {figures['agree_where_apart']:.1%} where these are more than {GAP} apart.\n"
        f"Everything is in {folder}."
    )


if __name__ == "__main__":
    run_main(main, Config)
