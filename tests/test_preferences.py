import json

import jax
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from rl_jax.data.batches import shuffled_batch
from rl_jax.data.conversations import make_render, plain_turns
from rl_jax.data.preferences import (
    Judged,
    encode_preferences,
    padded_batches,
    read_demonstrations,
    read_preferences,
    write_preferences,
)
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError


@pytest.fixture
def tokenizer():
    """Tokens 257 to 259 are "ab", "abab" and " abab"; 0 ends a sequence."""
    return train_tokenizer(["abab abab"], 260)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def read(folder, *rows, **options):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return read_preferences(path, **options)


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
GRADED = PAIR | {"preference": 0.75, "margin": 2, "gap": 1.5, "raters": [1, 0.5, 0], "score_chosen": 9}
TALK = [user("Hi"), assistant("Hello"), user("Who?")]
TALK_TEXT = "user: Hi\nassistant: Hello\nuser: Who?\nassistant:"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR, Judged("p", ("a", "b"), (1.0, 0.0))),
        (GRADED, Judged("p", ("a", "b"), (0.75, 0.25), 2.0, 1.5, (1.0, 0.5, 0.0))),
        (PAIR | {"preference": None, "prompt": None}, Judged("", ("a", "b"), (1.0, 0.0))),
        (PAIR | {"preference": 0.5}, Judged("p", ("a", "b"), (0.5, 0.5))),
        ({"completions": ["a", "b", "c"], "scores": [1, 3, -2]}, Judged("", ("a", "b", "c"), (1.0, 3.0, -2.0))),
        ({"completions": ["a", "b", "c"], "ranks": [2, 1, 3]}, Judged("", ("a", "b", "c"), (-2.0, -1.0, -3.0))),
        ({"completions": ["a", "b"], "ranks": [1, 2], "gap": 3}, Judged("", ("a", "b"), (1.0, 0.0), gap=3.0)),
        ({"completions": ["a", "b"], "scores": [0.1, 0.7]}, Judged("", ("a", "b"), (0.0, 1.0))),
        ({"completions": ["a", "b"], "scores": [2, 2]}, Judged("", ("a", "b"), (0.5, 0.5))),
        ({"completion": "a", "rating": -1.5, "raters": [-2, -1]}, Judged("", ("a",), (-1.5,), raters=(-2.0, -1.0))),
        ({"prompt": "p", "completion": "a", "rating": 4}, Judged("p", ("a",), (4.0,))),
        ({"messages": [*TALK, assistant("Me")], "rating": 4}, Judged(TALK_TEXT, (" Me",), (4.0,))),
        ({"messages": [assistant("Me")], "rating": 4}, Judged("", ("assistant: Me",), (4.0,))),
    ],
)
def test_rows_of_every_kind(tmp_path, row, expected):
    assert read(tmp_path, row) == ([expected], [])
    table = pyarrow.Table.from_pylist([row])
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert read_preferences(tmp_path / "rows.parquet") == ([expected], [])


YES, NO = [assistant("Yes")], [assistant("No")]
CONVERSATION = Judged(TALK_TEXT, (" Yes", " No"), (1.0, 0.0))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": TALK, "chosen": YES, "rejected": NO}, CONVERSATION),
        ({"chosen": TALK + YES, "rejected": TALK + NO}, CONVERSATION),
        ({"prompt": TALK, "chosen": TALK + YES, "rejected": TALK + NO}, CONVERSATION),
        ({"prompt": TALK, "chosen": "Yes", "rejected": "No"}, CONVERSATION),
        (
            {"prompt": "Hi", "chosen": [user("Hi"), *YES], "rejected": [user("Hi"), *NO]},
            Judged("user: Hi\nassistant:", (" Yes", " No"), (1.0, 0.0)),
        ),
        (  # they part at the first answer; what follows it is a part of the completions, equal or not
            {"chosen": [user("Hi"), *YES, user("So?")], "rejected": [user("Hi"), *NO, user("So?")]},
            Judged("user: Hi\nassistant:", (" Yes\nuser: So?", " No\nuser: So?"), (1.0, 0.0)),
        ),
        (  # a turn of the user's is judged: nobody's turn is opened
            {"prompt": YES, "chosen": [user("a")], "rejected": [user("b")]},
            Judged("assistant: Yes", ("\nuser: a", "\nuser: b"), (1.0, 0.0)),
        ),
        (  # of different lengths: they have only the first turn in common
            {"chosen": TALK + YES, "rejected": TALK[:1] + NO},
            Judged("user: Hi\nassistant:", (" Hello\nuser: Who?\nassistant: Yes", " No"), (1.0, 0.0)),
        ),
        (  # one goes on where the other ends
            {"chosen": [user("Hi"), *YES], "rejected": [user("Hi"), *YES, user("So?")]},
            Judged("user: Hi\nassistant:", (" Yes", " Yes\nuser: So?"), (1.0, 0.0)),
        ),
        (  # only one repeats the prompt: it is a part of that completion
            {"prompt": [user("Hi")], "chosen": [user("Hi"), *YES], "rejected": NO},
            Judged("user: Hi", ("\nuser: Hi\nassistant: Yes", "\nassistant: No"), (1.0, 0.0)),
        ),
    ],
)
def test_conversations_are_a_prompt_and_what_follows_it(tmp_path, row, expected):
    assert read(tmp_path, row) == ([expected], [])


def template(tokenizer, monkeypatch, function):
    """Gives the tokenizer a chat template that this function of messages and add_generation_prompt runs."""
    tokenizer.chat_template = "run by a function"

    def apply(messages, tokenize, add_generation_prompt):
        assert not tokenize
        return function(messages, add_generation_prompt)

    monkeypatch.setattr(tokenizer, "apply_chat_template", apply)
    return make_render(tokenizer)


def test_a_chat_template_makes_the_text(tmp_path, tokenizer, monkeypatch):
    def tagged(messages, open_turn):
        turns = [f"<{message['role']}>\n{message['content']}<|endoftext|>\n" for message in messages]
        return "".join(turns) + ("<assistant>\n" if open_turn else "")

    assert make_render(tokenizer) is plain_turns
    render = template(tokenizer, monkeypatch, tagged)
    rows, _ = read(tmp_path, {"chosen": TALK + YES, "rejected": TALK + NO}, render=render)
    end = "<|endoftext|>\n"
    assert rows[0].prompt == f"<user>\nHi{end}<assistant>\nHello{end}<user>\nWho?{end}<assistant>\n"
    assert rows[0].completions == ("Yes", "No")  # whoever encodes them ends them


def test_what_a_chat_template_refuses_is_a_broken_row(tmp_path, tokenizer, monkeypatch):
    def refusing(messages, open_turn):
        raise ValueError("No such role.")

    row = {"chosen": TALK + YES, "rejected": TALK + NO}
    with pytest.raises(InputError, match=r"no row that can be used; the first of 1: .*line 1 is refused .* No such"):
        read(tmp_path, row, render=template(tokenizer, monkeypatch, refusing))
    with pytest.raises(InputError, match="line 1 has a prompt whose text is not what the text of the whole"):
        read(tmp_path, row, render=template(tokenizer, monkeypatch, lambda messages, _: str(len(messages))))


BROKEN = {
    '{"prompt": "p", "chosen"': "is not JSON",
    '["chosen", "rejected"]': "is not a JSON object",
    "[" * 100_000: "is not JSON",
    '{"prompt": "p", "chosen": "a"}': "has no judgement; its columns are chosen, prompt. It needs chosen and rejected",
    '{"chosen": "a", "rejected": null}': "has no judgement; its columns are chosen.",
    "{}": "has no judgement; its columns are empty",
    '{"chosen": "a", "rejected": 3}': 'has no string under "rejected"',
    '{"chosen": "a", "rejected": ["b"]}': 'has no messages under "chosen"',
    '{"prompt": 3, "chosen": "a", "rejected": "b"}': 'has no string under "prompt"',
    '{"chosen": "a", "rejected": ""}': 'has an empty "rejected"',
    '{"chosen": "a", "rejected": "\\ud83d"}': "has half of a surrogate pair",
    '{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}': "has half of a surrogate pair",
    '{"chosen": "a", "rejected": "a"}': 'has the same text under "chosen" and "rejected"',
    '{"chosen": "a", "rejected": "b", "margin": NaN}': 'has a number under "margin" that is not finite',
    '{"chosen": "a", "rejected": "b", "margin": -1}': 'has -1 under "margin"; it must be at least 0',
    '{"chosen": "a", "rejected": "b", "gap": -0.5}': 'has -0.5 under "gap"; it must be at least 0',
    '{"chosen": "a", "rejected": "b", "gap": 1' + "0" * 400 + "}": 'has a number under "gap" that is not finite',
    '{"chosen": "a", "rejected": "b", "preference": 1.5}': 'has 1.5 under "preference"; it must be from 0 to 1',
    '{"chosen": "a", "rejected": "b", "preference": true}': 'has True under "preference", which is no number',
    '{"chosen": "a", "rejected": "b", "raters": [1, 2]}': 'has 2 under "raters"; it must be from 0 to 1',
    '{"chosen": "a", "rejected": "b", "raters": 1}': 'has no list of numbers under "raters"',
    '{"chosen": ["Hi"], "rejected": []}': 'has no string under "role" of message 1 of "chosen"',
    '{"chosen": [{"role": "user", "content": "\\ud83d"}], "rejected": []}': "has half of a surrogate pair",
    '{"chosen": [{"role": "user"}], "rejected": []}': 'has no string under "content" of message 1 of "chosen"',
    '{"chosen": [{"role": "user", "content": ""}], "rejected": [{"role": "user", "content": "a"}]}': "has an empty",
}


def test_broken_rows_are_named_and_the_others_kept(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [line.encode() for line in BROKEN] + [b'{"chosen": "a", "rejected": "\xff"}']
    path.write_bytes(
        b"\xef\xbb\xbf" + b"\n".join([json.dumps(PAIR).encode(), b"", *lines, json.dumps(GRADED).encode()])
    )
    rows, broken = read_preferences(path)
    assert [row.labels[0] for row in rows] == [1.0, 0.75]
    reasons = [*BROKEN.values(), "is not UTF-8 (at byte 29 of the line)"]
    assert len(broken) == len(reasons)
    for number, (line, reason) in enumerate(zip(broken, reasons, strict=True), start=3):
        assert line.startswith(f"{path}, line {number} {reason}")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"completions": ["a"], "scores": [1]}, 'has no list of at least 2 under "completions"'),
        ({"completions": "ab", "scores": [1, 2]}, 'has no list of at least 2 under "completions"'),
        ({"completions": ["a", "b", "c"], "scores": [1, 2]}, 'has 3 completions and 2 numbers under "scores"'),
        ({"completions": ["a", "b"], "ranks": ["1", 2]}, "has '1' under \"ranks\", which is no number"),
        ({"completions": ["a", ""], "ranks": [1, 2]}, 'has an empty "completions, number 2"'),
        ({"completions": ["a", "a"], "ranks": [1, 2]}, "has the same text in both completions"),
        ({"completion": "a", "rating": float("inf")}, 'has a number under "rating" that is not finite'),
        ({"completion": "", "rating": 1}, 'has an empty "completion"'),
        ({"messages": [], "rating": 1}, 'has no messages under "messages"'),
        ({"messages": [user("a"), assistant("")], "rating": 1}, 'has an empty "messages"'),
    ],
)
def test_broken_rankings_and_ratings(tmp_path, row, reason):
    with pytest.raises(InputError, match=r"rows.jsonl has no row that can be used; the first of 1: ") as error:
        read(tmp_path, row)
    assert reason in str(error.value)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match=r"line 2 is a pair and .*line 4 is a rating: put each kind in a file"):
        read(tmp_path, {}, PAIR, PAIR, {"completion": "a", "rating": 1})
    with pytest.raises(InputError, match=r"rows.jsonl has no row that can be used$"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"there is no file .*absent"):
        read_preferences(tmp_path / "absent.jsonl")
    (tmp_path / "rows.csv").write_text("chosen,rejected", "utf-8")
    with pytest.raises(InputError, match=r"of no kind whose rows can be read: .jsonl, .parquet"):
        read_preferences(tmp_path / "rows.csv")


def test_parquet_rows_are_named_too(tmp_path):
    table = pyarrow.table({"chosen": ["a", "", "c"], "rejected": ["b", "b", None]})
    parquet.write_table(table, tmp_path / "pairs.parquet", row_group_size=2)
    rows, broken = read_preferences(tmp_path / "pairs.parquet")
    assert [row.completions for row in rows] == [("a", "b")]
    assert [line.partition("pairs.parquet, ")[2] for line in broken] == [
        'row 1 has an empty "chosen"',
        "row 2 has no judgement; its columns are chosen. It needs chosen and rejected of pairs; completions with "
        "scores or ranks of rankings; or completion, or messages, with rating or label of ratings",
    ]


def test_files_are_read_a_part_at_a_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(PAIR), json.dumps({"completion": "a", "rating": 1}), "{}" * 10**6]), "utf-8")
    table = pyarrow.table({"chosen": ["a"] * 3, "rejected": ["b"] * 3})
    parquet.write_table(table, tmp_path / "pairs.parquet", row_group_size=1)
    with (tmp_path / "pairs.parquet").open("r+b") as file:  # the last row group's bytes: unread until it is reached
        start = parquet.ParquetFile(tmp_path / "pairs.parquet").metadata.row_group(2).column(0).dictionary_page_offset
        file.seek(start)
        file.write(b"\xff" * 16)
    with pytest.raises(InputError, match=r"line 1 is a pair and .*line 2 is a rating"):
        read_preferences(path)
    with pytest.raises(InputError, match=r"pairs.parquet is not a Parquet file that can be read"):
        read_preferences(tmp_path / "pairs.parquet")


@pytest.mark.parametrize(
    "rows",
    [
        [Judged("p", ("a", "b\n\u2028"), (0.3, 0.7), 0.5, 1.25, (1.0, 0.0, 0.5)), Judged("", ("é", " "), (0.5, 0.5))],
        [Judged("p", ("a", "b", "c"), (1.5, 2.0, -3.0), gap=2.0), Judged("", ("a", "b"), (0.0, 1.0))],
        [Judged("p", ("a",), (-1.25,), raters=(-1.0, -1.5)), Judged("", ("b",), (0.0,), gap=0.0)],
    ],
)
def test_what_is_written_is_read_back(tmp_path, rows):
    write_preferences(tmp_path / "rows.jsonl", rows)
    assert read_preferences(tmp_path / "rows.jsonl") == (rows, [])


def test_demonstrations_are_prompts_with_a_completion(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "p", "completion": "a"},
        {"messages": [user("Hi"), assistant("Hello")]},
        PAIR,
        {"completion": ""},
    ]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    read = read_demonstrations(path)
    assert [row[:2] for row in read.rows] == [("p", ("a",)), ("user: Hi\nassistant:", (" Hello",))]
    assert read.broken == [
        f'{path}, line 3 has neither "completion", "messages" nor "text"',
        f'{path}, line 4 has an empty "completion"',
    ]
    path.write_text("{}", "utf-8")
    with pytest.raises(InputError, match="has no row that can be used"):
        read_demonstrations(path)


ROWS = [
    Judged("ab", ("ab abab abab abab abab", "x"), (1.0, 0.0), 9.0),
    Judged("abab abab", ("ab", "abab ababx"), (1.0, 0.0), 0.5),
    Judged("", ("x", "ab"), (0.25, 0.75)),
]


def test_encoding_pads_and_cuts_nothing(tokenizer):
    batch, left_out = encode_preferences(tokenizer, ROWS, context=6)
    x = tokenizer.encode("x")[0]
    assert left_out == [0]  # 1 and 6 tokens, of which the last ends it
    assert batch.prompts.tolist() == [[258, 259], [0, 0]]
    assert batch.prompt_mask.tolist() == [[True, True], [False, True]]
    assert batch.completions.tolist() == [[[257, 0, 0, 0], [258, 259, x, 0]], [[x, 0, 0, 0], [257, 0, 0, 0]]]
    assert batch.completion_mask.sum(axis=2).tolist() == [[2, 4], [2, 2]]
    assert not np.any(~batch.completion_mask[..., :-1] & batch.completion_mask[..., 1:])
    assert batch.labels.tolist() == [[1, 0], [0.25, 0.75]]
    assert batch.margins.tolist() == [0.5, 0]
    assert [x.dtype for x in jax.tree.leaves(batch)] == [np.int32, bool, np.int32, bool, np.float32, np.float32]


def test_candidates_that_a_prompt_lacks_have_no_true_entry(tokenizer):
    rows = [Judged("x", ("a", "b", "c"), (1.0, -2.0, 3.0)), Judged("x", ("a", "b"), (0.0, 1.0))]
    batch, _ = encode_preferences(tokenizer, rows, context=8)
    assert batch.completion_mask.sum(axis=2).tolist() == [[2, 2, 2], [2, 2, 0]]
    assert batch.labels.tolist() == [[1, -2, 3], [0, 1, 0]]


def test_what_cannot_be_encoded(tokenizer):
    with pytest.raises(InputError, match=r"none of 3 rows fits a context of 2 tokens .the shortest needs 3"):
        encode_preferences(tokenizer, ROWS, context=2)
    with pytest.raises(InputError, match="no rows"):
        encode_preferences(tokenizer, [], context=2)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        encode_preferences(tokenizer, ROWS, context=9)


def test_batches_of_rows_are_those_of_prompts(tokenizer):
    rows = [Judged("x", (str(n), "ab"), (n / 10, 1 - n / 10), float(n)) for n in range(10)]
    data, _ = encode_preferences(tokenizer, rows, context=9)
    for step in (0, 3, 10**9):
        batch = shuffled_batch(data, 4, 1, step, "judged rows")
        numbers = shuffled_batch(np.arange(10), 4, 1, step, "numbers")
        assert batch.margins.tolist() == numbers.tolist()
        own = shuffled_batch(data, 4, 1, step, "judged rows", rows=np.array([0, 3]))
        assert own.margins.tolist() == batch.margins[[0, 3]].tolist()
        for part, whole in zip(jax.tree.leaves(batch), jax.tree.leaves(data), strict=True):
            np.testing.assert_array_equal(part, whole[numbers])
    with pytest.raises(InputError, match="there are 10 judged rows and a batch needs 11"):
        shuffled_batch(data, 11, 0, 0, "judged rows")


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_padded_batches_hold_every_row_once(tokenizer, size):
    rows = [Judged("x", (str(n), "ab"), (1.0, 0.0), float(n)) for n in range(5)]
    data, _ = encode_preferences(tokenizer, rows, context=9)
    batches = list(padded_batches(data, size))
    assert {batch.completions.shape for batch in batches} == {(size, *data.completions.shape[1:])}
    real = [batch.margins[batch.completion_mask.any(axis=(1, 2))] for batch in batches]
    assert np.concatenate(real).tolist() == [0, 1, 2, 3, 4]
    assert all(len(part) for part in real)
    assert data.completion_mask.any(axis=2).all()  # the data set itself is left as it was
