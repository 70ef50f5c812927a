"""A byte-level BPE vocabulary that loses nothing, in the form that every transformers program loads."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rl_jax.errors import InputError
from rl_jax.run.processes import is_first

END_OF_TEXT = "<|endoftext|>"
BYTES = 256
TEXTS_AT_ONCE = 4096  # bounds the memory that Python's integers take
TRIAL = "In the beginning"
FILE_SETTINGS = ("_file", "_files", "init_inputs", "vocab", "merges")  # endings of settings that may name files


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learns a byte-level byte-pair encoding (Sennrich 2016; bytes as in GPT-2, Radford 2019).

    Any text survives the round trip through it, since every byte is a token. `END_OF_TEXT` is id 0, the bytes
    come next, then the merges in the order in which they were learned.

    Args:
        texts: what the vocabulary is learned from.
        vocab_size: V, the number of tokens.

    Raises:
        InputError: V has no room for the bytes, or the text is too short to give so many tokens.
    """
    if vocab_size <= BYTES:
        raise InputError(
            f"a vocabulary of {vocab_size} tokens has no room for the {BYTES} bytes and {END_OF_TEXT}: "
            f"give at least {BYTES + 1}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocab_size:
        raise InputError(
            f"the text is too short for a vocabulary of {vocab_size} tokens: it gives "
            f"{backend.get_vocab_size()}; give more text or a smaller vocabulary"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes a tokenizer to a folder, for `load_tokenizer` and transformers; of several processes the first does.

    Each file is the old one or the new one, whole: a resumed run, which may be killed, writes what it has read.
    """
    if is_first():
        folder = Path(folder)
        half = folder.with_name(f"{folder.name}.tmp")
        tokenizer.save_pretrained(half)
        for path in list(half.rglob("*")):
            if path.is_file():  # a tokenizer with several chat templates has a folder of them
                place = folder / path.relative_to(half)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
        shutil.rmtree(half)


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Reads a tokenizer from a folder, as `save_tokenizer` writes it; nothing is fetched.

    Raises:
        InputError: there is no such folder, or no tokenizer in it that can be read.
    """
    if not os.path.isdir(folder):  # which transformers would take for the name of a model to fetch
        raise InputError(f"no tokenizer folder {folder}")
    try:
        _stay_inside(Path(folder) / "tokenizer_config.json")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if tokenizer is None:
            raise ValueError("transformers knows no tokenizer of this kind")
        tokenizer(TRIAL, add_special_tokens=False, verbose=False)
    except InputError:
        raise
    except BaseException as error:  # what panics in Rust is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise InputError(
            f"{folder} holds no tokenizer that transformers can read: copy its files again, or train another"
        ) from error
    return tokenizer


def _stay_inside(path: Path) -> None:
    """InputError where a tokenizer_config.json has transformers read files elsewhere than beside it."""
    settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for name, value in settings.items():
        if name == "special_tokens_map_file" or not name.endswith(FILE_SETTINGS):
            continue  # that one is written by old versions, and read by none
        for file in value if isinstance(value, list) else [value]:
            if isinstance(file, str) and file != Path(file).name:
                raise InputError(f"{path} names {file!r} under {name}, which is not beside it: take the line out")


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, with no special tokens added. int32 [its number of tokens] each."""
    encoded = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        chunk = list(texts[start : start + TEXTS_AT_ONCE])
        rows = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)
        encoded += [np.asarray(ids, np.int32) for ids in rows["input_ids"]]
    return encoded


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text that begins a sequence: the beginning-of-sequence token, or nothing."""
    plain, special = (tokenizer(TRIAL, add_special_tokens=add)["input_ids"] for add in (False, True))
    places = range(len(special) - len(plain) + 1)
    return special[: next((n for n in places if special[n : n + len(plain)] == plain), 0)]


def encode_openings(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """As `encode_texts`, of texts that begin a sequence: those that do not begin with `leading_tokens` get them."""
    first = leading_tokens(tokenizer)

    def opened(ids: np.ndarray) -> np.ndarray:
        return ids if not len(ids) or ids[: len(first)].tolist() == first else np.array([*first, *ids], np.int32)

    return [opened(ids) for ids in encode_texts(tokenizer, texts)]


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """One string a token, whose concatenation is the decoded text.

    A character whose bytes are spread over several tokens appears once, with the last of them; the others are
    then empty.
    """
    *pieces, rest = stream_pieces(tokenizer, ids)
    return [*pieces[:-1], pieces[-1] + rest] if pieces else []


def stream_pieces(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> Iterator[str]:
    """As `token_pieces`, each as its token comes, and after them the bytes of a character that was cut short."""
    seen: list[int] = []
    text, shown = "", 0
    for id in ids:
        seen.append(id)
        text = str(tokenizer.decode(seen, clean_up_tokenization_spaces=False))
        whole = text.rstrip("\ufffd")
        yield whole[shown:]
        shown = len(whole)
    yield text[shown:]
