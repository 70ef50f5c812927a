"""What holds of any input: of files, prompts, packed rows and configurations that Hypothesis thinks of."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from experiments.pretrain import Pretraining, check_batch, check_counts, model_config
from rl_jax.data.conversations import plain_turns
from rl_jax.data.corpus import read_passages, split_passages
from rl_jax.data.files import Row, read_rows
from rl_jax.data.preferences import (
    Judged,
    encode_preferences,
    read_demonstrations,
    read_preferences,
    write_preferences,
)
from rl_jax.data.prompts import decode_completions, encode_prompts, passage_openings
from rl_jax.data.tokenizer import END_OF_TEXT, encode_texts, train_tokenizer
from rl_jax.errors import InputError
from rl_jax.models.config import TransformerConfig
from rl_jax.models.families import family, from_settings, to_settings
from rl_jax.models.transformer import init_params, token_positions
from rl_jax.packing import Packing, from_rows, pack, sum_over_rows, to_rows
from rl_jax.types import Rollout


def examples(count):
    """The same examples in every run, and as long as they take."""
    ignored = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=ignored)


@functools.cache
def tokenizer():
    return train_tokenizer(["the cat sat on the mat, the cat sat"] * 2, 260)


# Files

texts = st.text(max_size=12)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, 0.5, 10**400, 1e300, True])
scalars = st.none() | st.booleans() | numbers | texts | st.sampled_from(["\ud800", "user", END_OF_TEXT])
messages = st.lists(st.fixed_dictionaries({"role": scalars | texts, "content": texts | scalars}), max_size=3)
values = st.recursive(scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(texts, x, max_size=3), max_leaves=6)
COLUMNS = ("prompt", "chosen", "rejected", "completion", "completions", "messages", "rating", "scores", "ranks")
COLUMNS += ("preference", "margin", "gap", "raters", "text")
likely = texts | messages | values | st.lists(numbers | texts, max_size=3)
rows_of_files = st.lists(
    st.dictionaries(st.sampled_from(COLUMNS), likely, max_size=len(COLUMNS))
    | st.fixed_dictionaries({"chosen": texts | messages, "rejected": texts | messages}, optional={"margin": numbers})
    | st.fixed_dictionaries({"completion": texts | messages, "rating": numbers}, optional={"prompt": texts})
    | st.fixed_dictionaries({"completions": st.lists(texts, max_size=3), "scores": st.lists(numbers, max_size=3)}),
    max_size=3,
)


def assert_read(path):
    """Every reader gives rows that can be used, or one clear error that names the file."""
    for read in (read_preferences, read_demonstrations):
        try:
            found = read(path)
        except InputError as error:
            assert str(path) in str(error)
            continue
        assert found.rows and all(str(path) in line for line in found.broken)
        for row in found.rows:
            row.prompt.encode(), [text.encode() for text in row.completions]
            assert all(row.completions) and len(row.completions) == len(row.labels)
            known = [*row.labels, row.margin, *row.raters, *([] if row.gap is None else [row.gap])]
            assert np.isfinite(np.float32(known)).all()
    try:
        passages = read_passages(str(path))
        assert passages and all(passage.strip() == passage != "" for passage in passages)
    except InputError:
        pass


@examples(300)
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_any_bytes_are_rows_or_one_clear_error(tmp_path, kind, content):
    path = tmp_path / f"file.{kind}"
    path.write_bytes(content)
    if kind == "txt":
        try:
            assert "".join(read_passages(str(path)))
        except InputError:
            return
        content.decode()
    else:
        assert_read(path)


@examples(1000)
@given(rows=rows_of_files)
def test_any_json_rows_are_judgements_or_named(tmp_path, rows):
    path = tmp_path / "file.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.broken for row in read_rows(path)] == [""] * len(rows)
    assert_read(path)


@examples(300)
@given(rows=st.lists(st.dictionaries(st.sampled_from(COLUMNS[:4]), texts, min_size=1), min_size=1), flips=st.data())
def test_spoilt_parquet_is_rows_or_one_clear_error(tmp_path, rows, flips):
    path = tmp_path / "file.parquet"
    names = sorted({name for row in rows for name in row})
    parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), path)
    assert [row.values for row in read_rows(path)] == [{name: row.get(name) for name in names} for row in rows]
    content = bytearray(path.read_bytes())
    for place in flips.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[place] ^= flips.draw(st.integers(1, 255))
    path.write_bytes(content[: flips.draw(st.sampled_from([len(content), len(content) // 2, 8]))])
    try:
        assert all(isinstance(row, Row) for row in read_rows(path))
    except InputError as error:
        assert str(path) in str(error)
    assert_read(path)


several = st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=4, unique=True)
finite = st.floats(-1e30, 1e30)


@examples(300)
@given(prompt=texts, candidates=several, labels=st.lists(finite, min_size=4, max_size=4), share=st.floats(0, 1))
def test_judgements_are_read_as_they_were_written(tmp_path, prompt, candidates, labels, share):
    pair = Judged(prompt, tuple(candidates[:2]), (share, 1 - share), margin=abs(labels[0]), gap=abs(labels[1]))
    rating = Judged(prompt, tuple(candidates[:1]), (labels[0],), raters=tuple(labels[1:]))
    ranking = Judged(prompt, tuple(candidates), tuple(labels[: len(candidates)]), gap=abs(labels[3]))
    for row in (pair, rating, ranking)[: 3 if len(candidates) > 2 else 2]:
        write_preferences(tmp_path / "file.jsonl", [row, row])
        assert read_preferences(tmp_path / "file.jsonl", plain_turns).rows == [row, row]


@examples(500)
@given(
    st.text(st.sampled_from("ab .!?\n\t\u3000…"), max_size=200) | st.text() | st.just(f"a{END_OF_TEXT}b"),
    st.integers(1, 20),
)
def test_passages_lose_nothing_but_white_space_and_marks(text, characters):
    passages = split_passages(text, characters)
    assert "".join("".join(passages).split()) == "".join("".join(text.split(END_OF_TEXT)).split())
    assert all(0 < len(passage) <= 1.5 * characters + 1 for passage in passages)


def test_a_home_that_nobody_has_is_no_corpus():
    with pytest.raises(InputError, match="no corpus ~nobody-has-it"):
        read_passages("~nobody-has-it/text.txt")


# Prompts


@examples(50)
@given(texts, st.integers(0xD800, 0xDFFF), texts)
def test_half_of_a_surrogate_pair_is_no_prompt(before, half, after):
    with pytest.raises(InputError, match="surrogate"):
        encode_prompts(tokenizer(), ["fine", before + chr(half) + after], context=200, completion_length=4)


@examples(300)
@given(st.lists(st.text(min_size=1, max_size=20) | st.just(END_OF_TEXT), min_size=1, max_size=5))
def test_padded_prompts_are_the_texts(prompts):
    encoded = encode_texts(tokenizer(), prompts)
    tokens, mask = encode_prompts(tokenizer(), prompts, context=200, completion_length=4)
    assert tokens.shape == mask.shape == (len(prompts), max(map(len, encoded)))
    assert mask[:, -1].all() and (np.diff(mask.astype(int), axis=1) >= 0).all()
    assert (tokens[~mask] == tokenizer().eos_token_id).all()
    for row, real, ids, text in zip(tokens, mask, encoded, prompts, strict=True):
        np.testing.assert_array_equal(row[real], ids)
        assert tokenizer().decode(row[real]) == text
    plain = [text.replace(END_OF_TEXT, "") for text in prompts]
    assert decode_completions(tokenizer(), tokens, mask) == plain


@examples(300)
@given(st.lists(st.text(st.sampled_from("the cat\n日"), max_size=30), min_size=1, max_size=5), st.integers(-1, 8))
def test_openings_are_what_passages_begin_with(passages, length):
    longer = [ids for ids in encode_texts(tokenizer(), passages) if len(ids) > length]
    try:
        tokens, mask = passage_openings(tokenizer(), passages, length)
    except InputError:
        assert length < 1 or not longer
        return
    assert tokens.shape == mask.shape == (len(longer), length) and mask[:, -1].all()
    for row, real, ids in zip(tokens, mask, longer, strict=True):
        np.testing.assert_array_equal(row[real], ids[: real.sum()])
        np.testing.assert_array_equal(real, np.arange(length) >= length - real.sum())


@examples(60)
@given(st.lists(st.integers(1, 8), min_size=4, max_size=4))
def test_positions_count_the_real_tokens(lengths):
    mask = np.arange(8) >= 8 - np.array(lengths)[:, None]
    for row, real, length in zip(np.asarray(token_positions(jnp.asarray(mask))), mask, lengths, strict=True):
        assert row[real].tolist() == list(range(length))
        assert not row[~real].any()


@examples(200)
@given(st.lists(st.tuples(texts, st.text(max_size=8), st.text(max_size=8)), min_size=1, max_size=4))
def test_encoded_judgements_are_the_texts(rows):
    judged = [Judged(prompt, (first, second), (1.0, 0.0)) for prompt, first, second in rows]
    try:
        batch, left_out = encode_preferences(tokenizer(), judged, context=40)
    except InputError:
        batch, left_out = None, list(range(len(rows)))
    kept = [row for number, row in enumerate(judged) if number not in left_out]
    for number, row in enumerate(kept):
        prompt = batch.prompts[number][batch.prompt_mask[number]]
        assert tokenizer().decode(prompt) == (row.prompt or END_OF_TEXT)
        for candidate, text in enumerate(row.completions):
            ids = batch.completions[number, candidate][batch.completion_mask[number, candidate]]
            assert tokenizer().decode(ids) == text + END_OF_TEXT and len(prompt) + len(ids) <= 40
    for number in left_out:
        ids = encode_texts(tokenizer(), [judged[number].prompt, *judged[number].completions])
        assert max(len(ids[0]), 1) + max(map(len, ids[1:])) + 1 > 40, judged[number]


# Packing

B, P, C = 6, 4, 5


@functools.partial(jax.jit, static_argnums=1)
def packed(rollout, packing):
    """Rows of a rollout, numbers that went there and back, and how often each token is predicted in smaller parts."""
    rows = pack(rollout, packing)
    numbers = jnp.arange(1, B * C + 1).reshape(B, C)

    def count(part):
        found = pack(part, small)
        times = jnp.zeros((B, C), jnp.int32).at[found.sequence, found.index].add(found.predicts.astype(jnp.int32))
        return times, jnp.sum(part.completion_mask, axis=1)

    small = Packing(2, packing.width)
    again = from_rows(to_rows(numbers, rows), rows, rollout.completion_mask)
    return rows, again, sum_over_rows(count, rollout, small)


@examples(300)
@given(
    lengths=st.lists(st.integers(0, C), min_size=B, max_size=B),
    numbers=st.lists(st.integers(0, 2), min_size=B, max_size=B),
    prompts=st.lists(st.integers(1, P), min_size=3, max_size=3),
    width=st.sampled_from([P - 1 + C, 2 * C + P]),
)
def test_every_completion_token_is_predicted_once_and_sees_what_is_before_it(lengths, numbers, prompts, width):
    prompt_mask = np.arange(P) >= P - np.array(prompts)[numbers][:, None]
    tokens = np.where(prompt_mask, 100 * np.array(numbers)[:, None] + np.arange(P) + 10, 0).astype(np.int32)
    mask = np.arange(C) < np.array(lengths)[:, None]
    completions = (1000 + np.arange(B * C)).reshape(B, C).astype(np.int32)
    rollout = Rollout(tokens, prompt_mask, completions, mask, np.zeros((B, C), np.float32), np.zeros(B, bool))
    rows, again, (times, kept) = jax.device_get(packed(jax.tree.map(jnp.asarray, rollout), Packing(B, width)))
    np.testing.assert_array_equal(again, np.where(mask, np.arange(1, B * C + 1).reshape(B, C), 0))
    np.testing.assert_array_equal(times, mask)
    np.testing.assert_array_equal(kept, lengths)
    assert rows.predicts.sum() == mask.sum()
    for b, c in zip(*np.nonzero(mask), strict=True):
        ((row, column),) = np.argwhere(rows.predicts & (rows.sequence == b) & (rows.index == c))
        assert rows.cells[b, c] == row * width + column
        before = [*tokens[b][prompt_mask[b]], *completions[b, :c]]
        seen = np.flatnonzero(rows.seen[row, column])
        order = seen[np.argsort(rows.positions[row, seen])]
        assert rows.tokens[row, order].tolist() == before and order[-1] == column
        assert rows.positions[row, order].tolist() == list(range(len(before)))


# Configurations

small = st.integers(-1, 9)
sizes = ("vocab_size", "context", "layers", "width", "heads", "kv_heads", "head_size", "mlp_width")
FLAGS = ("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "post_norms", "tied", "scaled_embedding", "remat")
choices = {
    "positions": st.sampled_from(["learned", "rotary"]),
    "norm": st.sampled_from(["layer", "rms", "rms_plus_one"]),
    "mlp": st.sampled_from(["gelu", "swiglu", "geglu"]),
    **dict.fromkeys(FLAGS, st.booleans()),
}
likely_sizes = st.tuples(*[st.integers(1, 4)] * 4, st.integers(1, 2), st.integers(1, 2), st.sampled_from([2, 4]), small)
any_sizes = st.tuples(*[small] * len(sizes))


def promised(c):
    """The shapes of a model's parameters, written out."""
    norm = {"scale": (c.width,)} | ({"bias": (c.width,)} if c.norm == "layer" else {})

    def dense(fan_in, fan_out, bias):
        return {"kernel": (fan_in, fan_out)} | ({"bias": (fan_out,)} if bias else {})

    query, key = c.heads * c.head_size, c.kv_heads * c.head_size
    attention = {"query": dense(c.width, query, c.qkv_bias), "out": dense(query, c.width, c.out_bias)}
    attention |= {name: dense(c.width, key, c.qkv_bias) for name in ("key", "value")}
    attention |= {f"{name}_norm": {"scale": (c.head_size,)} for name in ("query", "key") if c.qk_norm}
    mlp = {"up": dense(c.width, c.mlp_width, c.mlp_bias), "down": dense(c.mlp_width, c.width, c.mlp_bias)}
    mlp |= {"gate": dense(c.width, c.mlp_width, c.mlp_bias)} if c.mlp != "gelu" else {}
    block = {"attention_norm": norm, "attention": attention, "mlp_norm": norm, "mlp": mlp}
    block |= dict.fromkeys(("attention_post_norm", "mlp_post_norm"), norm) if c.post_norms else {}
    model = {"embedding": {"embedding": (c.vocab_size, c.width)}, "final_norm": norm}
    model |= {f"block_{layer}": block for layer in range(c.layers)}
    model |= {"position_embedding": {"embedding": (c.context, c.width)}} if c.positions == "learned" else {}
    return model | ({} if c.tied else {"output": dense(c.width, c.vocab_size, False)})


def shapes(config):
    return jax.tree.map(lambda x: x.shape, jax.eval_shape(lambda: init_params(jax.random.key(0), config)))


@examples(100)
@given(likely_sizes | any_sizes, st.fixed_dictionaries(choices))
def test_any_configuration_is_refused_or_has_the_promised_parameters(numbers, options):
    fine = min(numbers) >= 1
    fine = fine and numbers[4] % numbers[5] == 0 and not (options["positions"] == "rotary" and numbers[6] % 2)
    try:
        config = TransformerConfig(*numbers, **options)
    except InputError as error:
        assert not fine, error
        return
    assert fine and shapes(config) == promised(config)


@examples(100)
@given(
    st.fixed_dictionaries(
        {name: st.integers(1, 4) | small for name in ("vocab_size", "context", "layers", "heads", "kv_heads")}
        | {"width": st.sampled_from([4, 8]) | small, "family": st.sampled_from(["llama", "gpt2"])}
    )
)
def test_any_settings_of_a_script_are_refused_or_a_model_that_can_be_saved(options):
    try:
        config = model_config(Pretraining(**options))
    except InputError:
        return
    assert family(config) == options["family"] and from_settings(to_settings(config, 0)) == config
    assert shapes(config) == promised(config)
    assert config.heads * config.head_size == config.width


@examples(100)
@given(small, small, small)
def test_counts_and_batches_are_refused_or_divide(steps, batch_size, microbatches):
    try:
        check_counts({"steps": steps, "batch_size": batch_size, "microbatches": microbatches})
        check_batch(batch_size, microbatches)
    except InputError:
        assert min(steps, batch_size, microbatches) < 1 or batch_size % (microbatches * len(jax.devices()))
        return
    assert steps > 0 and math.gcd(batch_size, microbatches) == microbatches
    assert dataclasses.replace(Pretraining(), batch_size=batch_size).batch_size % len(jax.devices()) == 0
