"""Measures of a text that rewards are made of, as pure functions of strings and words; each lies in [0, 1]."""

import collections
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
SENTENCE_END = re.compile(r"(?:(?<=[.!?…])|(?<=[.!?…][\"'”’)]))\s+")
FINISHED = re.compile(r"[.!?…][\"'”’)]*\s*$")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without numbers and punctuation."""
    return WORD.findall(text.lower())


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, by their final marks; the last may be unfinished."""
    return [part.strip() for part in SENTENCE_END.split(text) if words_of(part)]


def grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All n words in a row."""
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def repeated_share(words: Sequence[str], n: int = 2) -> float:
    """Share of the n-grams that have occurred before; 0 where there is none."""
    every = grams(words, n)
    return 1 - len(set(every)) / len(every) if every else 0.0


def copied_share(words: Sequence[str], source: Sequence[str], n: int = 2) -> float:
    """Share of the n-grams that the source has too; 0 where there is none."""
    every, known = grams(words, n), set(grams(source, n))
    return sum(gram in known for gram in every) / len(every) if every else 0.0


def within(value: float, low: float, high: float, margin: float) -> float:
    """1 from `low` to `high`; beyond either it falls in a straight line to 0 at a distance of `margin`."""
    beyond = max(low - value, value - high, 0.0)
    return max(1 - beyond / margin, 0.0)


def is_finished(text: str) -> bool:
    """Whether a text ends as a sentence does."""
    return bool(FINISHED.search(text))


def asks(text: str) -> bool:
    """Whether a sentence of the text is a question."""
    return bool(re.search(r"\w[\"'”’)]*\s*\?", text))


def form(prompts: Sequence[str], texts: Sequence[str], low: int, high: int, margin: int) -> dict[str, np.ndarray]:
    """What says nothing of a text's meaning, in [0, 1]. float [B] each.

    Args:
        prompts: what the texts follow. B of them.
        texts: B.
        low: words that a text has at least, or else its length is worth less.
        high: and at most.
        margin: so many words beyond, it is worth nothing.

    Returns:
        variety, one less the share of pairs of words that a text has had before; originality, one less the share that
        its prompt has; length, whether it is of whole sentences and has so many words.
    """
    asked, said = ([words_of(text) for text in every] for every in (prompts, texts))
    lengths = [within(len(words), low, high, margin) for words in said]
    return {
        "variety": np.array([1 - repeated_share(words) for words in said]),
        "originality": np.array([1 - copied_share(*pair) for pair in zip(said, asked, strict=True)]),
        "length": np.array(lengths) * [is_finished(text) for text in texts],
    }


def word_rarity(texts: Iterable[str]) -> dict[str, float]:
    """How rare each word is: its inverse document frequency, scaled to [0, 1] over the words there are.

    See 2019, "What makes a good conversation?", section 5.3 (NIDF). A word that a single text has is left out: most
    are misspelt.
    """
    texts = list(texts)
    counts = collections.Counter(word for text in texts for word in set(words_of(text)))
    idf = {word: math.log(len(texts) / count) for word, count in counts.items() if count > 1}
    low, high = min(idf.values(), default=0.0), max(idf.values(), default=0.0)
    return {word: (value - low) / ((high - low) or 1.0) for word, value in idf.items()}


def specificity(words: Sequence[str], rarity: Mapping[str, float]) -> float:
    """The mean rarity of the words; one that is not known counts 0, so that nonsense is not rare. 0 for no words."""
    return sum(rarity.get(word, 0.0) for word in words) / max(len(words), 1)
