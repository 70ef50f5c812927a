"""Prompts and completions between strings and padded arrays; masks are made here and carried from here on."""

import functools
from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

from rl_jax.data.files import HALF_SURROGATE, SURROGATE
from rl_jax.data.tokenizer import encode_openings, encode_texts, leading_tokens
from rl_jax.errors import InputError


def passage_openings(
    tokenizer: PreTrainedTokenizerBase, passages: Sequence[str], prompt_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The opening of every passage longer than P = `prompt_length` tokens: its first P, back to the end of a word.

    Tokens that begin a sequence are among them.

    Returns:
        Prompts int32 [M, P], left-padded with the end-of-sequence id, and their mask bool [M, P].

    Raises:
        InputError: `prompt_length` is not positive, or no passage is longer.
    """
    first = leading_tokens(tokenizer)
    length = prompt_length - len(first)
    if length < 1:
        raise InputError(f"a prompt of {prompt_length} tokens: give at least {1 + len(first)}")
    rows = encode_texts(tokenizer, passages)
    longer = [ids[: length + 1] for ids in rows if len(ids) > length]
    if not longer:
        raise InputError(
            f"no passage is longer than a prompt of {prompt_length} tokens (the longest has "
            f"{max(map(len, rows), default=0)}): give a shorter prompt length or longer passages"
        )
    tokens = np.stack(longer)
    ids, places = np.unique(tokens, return_inverse=True)
    begins = np.array([text[:1].isspace() for text in tokenizer.batch_decode(ids[:, None].tolist())])
    begins = begins[places].reshape(tokens.shape)[:, 1:]
    lengths = np.where(begins.any(axis=1), length - np.argmax(begins[:, ::-1], axis=1), length)
    openings = [np.array([*first, *row[:n]], np.int32) for row, n in zip(longer, lengths, strict=True)]
    return left_padded(openings, prompt_length, tokenizer)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], context: int, completion_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes prompts, with the tokens that begin a sequence, left-padded to P, the longest of them.

    Returns:
        Prompts int32 [N, P], padded with the end-of-sequence id, and their mask bool [N, P].

    Raises:
        InputError: there is no prompt, one is empty, or one does not fit the context with its completion.
    """
    if not texts:
        raise InputError("no prompt was given")
    for text in texts:
        if SURROGATE.search(text):  # of a command line that is not UTF-8
            raise InputError(f"the prompt {_shortened(text)!r} {HALF_SURROGATE}")
    rows = encode_openings(tokenizer, texts)
    for text, ids in zip(texts, rows, strict=True):
        if not len(ids):
            raise InputError(f"the prompt {text!r} is empty: give at least one token")
        if len(ids) + completion_length > context:
            raise InputError(
                f"the prompt {_shortened(text)!r} has {len(ids)} tokens; with a completion of "
                f"{completion_length} the context of {context} leaves room for {context - completion_length}"
            )
    return left_padded(rows, max(map(len, rows)), tokenizer)


def decode_completions(
    tokenizer: PreTrainedTokenizerBase, completions: ArrayLike, completion_mask: ArrayLike
) -> list[str]:
    """The text of each row where its mask is true, without special tokens; serves prompts as well.

    Args:
        completions: token ids. int32 [B, C].
        completion_mask: bool [B, C].
    """
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    rows = zip(np.asarray(completions), np.asarray(completion_mask), strict=True)
    return [str(decode(row[keep].tolist())) for row, keep in rows]


def _shortened(text: str, characters: int = 60) -> str:
    return text if len(text) <= characters else text[:characters] + "..."


def left_padded(
    rows: Sequence[np.ndarray], width: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids as int32 [N, width], padded with the end-of-sequence id, and their mask bool [N, width]."""
    mask = np.arange(width) >= width - np.array([[len(row)] for row in rows])
    prompts = np.full(mask.shape, tokenizer.eos_token_id or 0, np.int32)
    prompts[mask] = np.concatenate(rows)
    return prompts, mask
