"""Texts judged without a neural network: ridge regression on TF-IDF, and how often rewards order texts as people do.

The reference figures of the recipe `human_preferences`. Letters: M texts, F features.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import lsqr

from rl_jax.errors import InputError
from rl_jax.evaluation import Estimate
from rl_jax.preferences.diagnostics import NORMAL
from rl_jax.rewards.text import TextReward

WORD = re.compile(r"\w\w+")
MOST_ITERATIONS = 1000


class Ridge(NamedTuple):
    """A linear function of the words and pairs of words of a text.

    Attributes:
        features: the column of each word, and of each two that follow one another.
        idf: weight of each column, the less the more texts have it. [F].
        coefficients: [F].
        mean: what it says of a text without any of them.
    """

    features: dict[str, int]
    idf: np.ndarray
    coefficients: np.ndarray
    mean: float


def grams(text: str) -> list[str]:
    """The words of at least two characters, and every two that follow one another, in lower case."""
    words = WORD.findall(text.lower())
    return words + [f"{first} {second}" for first, second in itertools.pairwise(words)]


def fit_ridge(texts: Sequence[str], ratings: np.ndarray, penalty: float) -> Ridge:
    """Minimises sum (x w + mean - rating)^2 + penalty w^2, x from `tfidf` and mean that of the ratings.

    Args:
        texts: M of them.
        ratings: [M].
        penalty: above 0.

    Raises:
        InputError: there is no word in the texts.
    """
    counted = [Counter(grams(text)) for text in texts]
    features = {gram: column for column, gram in enumerate(dict.fromkeys(gram for row in counted for gram in row))}
    if not features:
        raise InputError("The texts to learn ratings from have no words.")
    appearances = np.bincount([features[gram] for row in counted for gram in row])
    idf = np.log((1 + len(texts)) / (1 + appearances)) + 1
    mean = float(np.mean(ratings))
    matrix = tfidf(texts, features, idf)
    solution = lsqr(matrix, ratings - mean, damp=math.sqrt(penalty), iter_lim=MOST_ITERATIONS)[0]
    return Ridge(features, idf, solution, mean)


def ridge_ratings(ridge: Ridge, texts: Sequence[str]) -> np.ndarray:
    """The ratings that it expects. M texts -> float64 [M]."""
    return tfidf(texts, ridge.features, ridge.idf) @ ridge.coefficients + ridge.mean


def rate_whole(ridge: Ridge) -> TextReward:
    """A reward on text: the rating of a prompt with its completion."""
    return lambda prompt, completion: float(ridge_ratings(ridge, [prompt + completion])[0])


def tfidf(texts: Sequence[str], features: dict[str, int], idf: np.ndarray) -> csr_matrix:
    """(1 + log count) idf of each feature, each row divided by its length (Salton and Buckley 1988). [M, F]."""
    rows = [Counter(gram for gram in grams(text) if gram in features) for text in texts]
    ends = np.cumsum([0, *map(len, rows)])
    columns = np.array([features[gram] for row in rows for gram in row], int)
    counts = np.array([count for row in rows for count in row.values()], float)
    values = (1 + np.log(counts)) * idf[columns]
    lengths = np.sqrt(np.bincount(np.repeat(np.arange(len(rows)), np.diff(ends)), values**2, len(rows)))
    return csr_matrix((values / np.repeat(lengths, np.diff(ends)), columns, ends), (len(rows), len(features)))


def order_share(rewards: np.ndarray, ratings: np.ndarray, gap: float, most: float = math.inf) -> Estimate:
    """Share of all pairs of texts with ratings more than `gap` apart that rewards order alike; ties count half.

    The interval is that of the texts, of which every one is in many pairs: a jackknife that leaves out one text after
    another. Of several rows of rewards it is the mean.

    Args:
        rewards: [M], or [R, M] of R models.
        ratings: the mean rating of each. [M].
        gap: in the unit of the ratings.
        most: only pairs no further apart than this.
    """
    shares, total, pairs = _alike(np.atleast_2d(rewards), ratings, gap, most)
    return _jackknife(shares.mean(axis=0), total, pairs)


def order_lead(rewards: np.ndarray, others: np.ndarray, ratings: np.ndarray, gap: float) -> Estimate:
    """By how much `order_share` is higher than that of other rewards of the same texts. [R, M], [R', M], [M]."""
    mine, total, pairs = _alike(np.atleast_2d(rewards), ratings, gap)
    theirs, _, _ = _alike(np.atleast_2d(others), ratings, gap)
    return _jackknife(mine.mean(axis=0) - theirs.mean(axis=0), total, pairs)


def _alike(
    rewards: np.ndarray, ratings: np.ndarray, gap: float, most: float = math.inf
) -> tuple[np.ndarray, np.ndarray, float]:
    """For each text, in how many of its pairs rewards agree [R, M], and how many it has [M]; and how many there are."""
    apart = ratings[:, None] - ratings[None, :]
    signs = np.where((np.abs(apart) > gap) & (np.abs(apart) <= most), np.sign(apart), 0.0)
    found = [np.sum((1 + np.sign(row[:, None] - row[None, :]) * signs) / 2 * (signs != 0), axis=1) for row in rewards]
    counts = np.count_nonzero(signs, axis=1)
    return np.array(found), counts, float(counts.sum() / 2)


def _jackknife(agreeing: np.ndarray, counts: np.ndarray, pairs: float) -> Estimate:
    if not pairs:
        return Estimate(math.nan, -math.inf, math.inf)
    share, texts = float(agreeing.sum() / 2 / pairs), len(counts)
    without = (agreeing.sum() / 2 - agreeing) / np.maximum(pairs - counts, 1)
    half = NORMAL * math.sqrt((texts - 1) / texts * np.sum((without - without.mean()) ** 2))
    return Estimate(share, share - half, share + half)
