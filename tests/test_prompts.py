import copy

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from rl_jax.data.batches import shuffled_batch
from rl_jax.data.prompts import decode_completions, encode_prompts, passage_openings
from rl_jax.data.tokenizer import leading_tokens, train_tokenizer
from rl_jax.errors import InputError


@pytest.fixture(scope="module")
def tokenizer():
    """Tokens 257 to 259 are "ab", "abab" and " abab"."""
    return train_tokenizer(["abab abab"], 260)


def test_openings_are_the_first_tokens_of_longer_passages(tokenizer):
    passages = ["abab abab abab", "abab abab", "abab", "ab abab abab abab"]
    prompts, mask = passage_openings(tokenizer, passages, prompt_length=2)
    assert prompts.tolist() == [[258, 259], [257, 259]]
    assert prompts.dtype == np.int32
    assert mask.dtype == bool and mask.shape == (2, 2) and mask.all()


def test_openings_end_where_a_word_does(tokenizer):
    # As tokens: "abab" " abab" "x" "y" | "z" " abab", and one whose only word does not end.
    prompts, mask = passage_openings(tokenizer, ["abab ababxyz abab", "xxxxxxxx", "abab abab abab abab abab"], 4)
    assert decode_completions(tokenizer, prompts, mask) == ["abab", "xxxx", "abab abab abab abab"]
    assert mask.tolist() == [[False, False, False, True], [True] * 4, [True] * 4]


def test_openings_need_a_longer_passage(tokenizer):
    with pytest.raises(InputError, match=r"longer than a prompt of 4 tokens .the longest has 3"):
        passage_openings(tokenizer, ["abab abab abab"], 4)
    with pytest.raises(InputError, match="no passage"):
        passage_openings(tokenizer, [], 4)
    with pytest.raises(InputError, match="at least 1"):
        passage_openings(tokenizer, ["abab abab"], 0)


def test_prompts_are_padded_on_the_left(tokenizer):
    prompts, mask = encode_prompts(tokenizer, ["abab abab abab", "ab", "abab abab"], 8, 5)
    assert prompts.tolist() == [[258, 259, 259], [0, 0, 257], [0, 258, 259]]
    assert mask.tolist() == [[True, True, True], [False, False, True], [False, True, True]]
    assert (prompts.dtype, mask.dtype) == (np.int32, np.dtype(bool))


def test_an_end_of_sequence_token_within_a_prompt_is_not_padding(tokenizer):
    prompts, mask = encode_prompts(tokenizer, ["<|endoftext|>ab", "ab"], 8, 5)
    assert prompts.tolist() == [[0, 257], [0, 257]]
    assert mask.tolist() == [[True, True], [False, True]]


def test_prompts_that_are_empty_or_too_long(tokenizer):
    with pytest.raises(InputError, match="prompt '' is empty"):
        encode_prompts(tokenizer, ["ab", ""], 8, 5)
    with pytest.raises(InputError, match="no prompt"):
        encode_prompts(tokenizer, [], 8, 5)
    with pytest.raises(InputError, match=r"'abab abab' has 2 tokens; .* 7 .* 8 leaves room for 1"):
        encode_prompts(tokenizer, ["ab", "abab abab"], context=8, completion_length=7)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 10])
def test_every_epoch_is_a_permutation_of_the_prompts(batch_size):
    total = 10
    prompts, mask = np.arange(total, dtype=np.int32)[:, None], np.arange(total)[:, None] % 2 == 0
    batches = [shuffled_batch((prompts, mask), batch_size, 0, step, "prompts") for step in range(3 * total)]
    stream = np.concatenate([batch[:, 0] for batch, _ in batches])
    epochs = stream[: len(stream) // total * total].reshape(-1, total)
    assert (np.sort(epochs, axis=1) == np.arange(total)).all()
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
    for batch, batch_mask in batches:
        assert batch.shape == (batch_size, 1)
        np.testing.assert_array_equal(batch_mask, batch % 2 == 0)  # a mask stays with its prompt


def test_a_batch_of_prompts_is_a_function_of_seed_and_step():
    prompts = np.arange(100)[:, None]
    batch = shuffled_batch(prompts, 8, 1, 10**9, "prompts")
    np.testing.assert_array_equal(batch, shuffled_batch(prompts, 8, 1, 10**9, "prompts"))
    assert (batch != shuffled_batch(prompts, 8, 2, 10**9, "prompts")).any()
    own = np.array([1, 6])
    np.testing.assert_array_equal(shuffled_batch(prompts, 8, 1, 10**9, "prompts", rows=own), batch[own])


def test_a_batch_needs_as_many_prompts():
    with pytest.raises(InputError, match="there are 2 prompts and a batch needs 3"):
        shuffled_batch(np.zeros((2, 1), np.int32), 3, 0, 0, "prompts")


def test_decoding_follows_the_mask_and_leaves_out_the_end(tokenizer):
    completions = np.asarray([[258, 259, 0], [257, 0, 258], [0, 259, 259], [259, 259, 257]], np.int32)
    mask = np.asarray([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
    assert decode_completions(tokenizer, completions, mask) == ["abab abab", "ab", "", " abab ababab"]
    assert decode_completions(tokenizer, completions[:0], mask[:0]) == []


def test_decoding_undoes_encoding(tokenizer):
    texts = ["日本 😀", "don't  .", "\t\x00"]
    assert decode_completions(tokenizer, *encode_prompts(tokenizer, texts, 64, 1)) == texts


def test_what_begins_a_sequence_is_put_before_prompts_that_lack_it(tokenizer):
    """As Llama's and Gemma's tokenizers do, whose models have seen no text without it."""
    opened = copy.deepcopy(tokenizer)
    first = opened.convert_tokens_to_ids("x")
    opened.backend_tokenizer.post_processor = TemplateProcessing(single="x $A", special_tokens=[("x", first)])
    assert leading_tokens(tokenizer) == [] and leading_tokens(opened) == [first]
    prompts, mask = encode_prompts(opened, ["abab abab", "xabab"], context=64, completion_length=8)
    assert prompts.tolist() == [[first, 258, 259], [0, first, 258]] and mask.tolist() == [
        [True] * 3,
        [False, True, True],
    ]
    openings, mask = passage_openings(opened, ["abab abab abab"], 3)
    assert openings.tolist() == [[first, 258, 259]] and mask.all()
    with pytest.raises(InputError, match="at least 2"):
        passage_openings(opened, ["abab abab abab"], 1)
