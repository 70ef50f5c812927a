import json
import random

import pytest
from transformers import AutoTokenizer, LlamaConfig

from rl_jax.data.tokenizer import (
    END_OF_TEXT,
    encode_texts,
    load_tokenizer,
    save_tokenizer,
    stream_pieces,
    token_pieces,
    train_tokenizer,
)
from rl_jax.errors import InputError

TEXT = "In the beginning the earth was waste and without form; it was dark on the face of the deep. " * 3
HARD_TEXTS = [
    "  two  spaces, a trailing one ",
    "tab\tnewline\nreturn\r\n\n\nnull\x00bell\x07escape\x1b[0m",
    "don't can't I'll we've",
    "héllo naïve Ærø e\u0301",
    "日本語の文章。中文，한국어",
    "👩‍👩‍👧 😀🏳️‍🌈",
    "العربية עברית",
    "\ufeff\ufffd\u200b\U0010ffff",
    f"a {END_OF_TEXT} b",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 300)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_round_trip_loses_nothing(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_round_trip_of_random_unicode(tokenizer):
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    text = "".join(map(chr, random.Random(0).sample(points, 20_000)))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_merges_follow_the_counts_of_pairs():
    # Words "abab" and " abab": the pair ab occurs 4 times, then abab twice, then " abab" once.
    tokenizer = train_tokenizer(["abab abab"], 260)
    assert len(tokenizer) == 260
    assert tokenizer.convert_ids_to_tokens([0]) == [END_OF_TEXT]
    assert [tokenizer.decode([id]) for id in (257, 258, 259)] == ["ab", "abab", " abab"]
    assert tokenizer("abab abab ab")["input_ids"] == [258, 259, tokenizer(" ")["input_ids"][0], 257]


def test_end_of_text_is_the_first_id_and_every_byte_has_one(tokenizer):
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END_OF_TEXT, 0)
    ascii_ids = {tokenizer(chr(point))["input_ids"][0] for point in range(128)}
    assert len(ascii_ids) == 128
    assert ascii_ids <= set(range(1, 257))


def test_training_is_deterministic(tokenizer):
    assert train_tokenizer([TEXT], 300).get_vocab() == tokenizer.get_vocab()


def test_vocabulary_too_large_for_the_text_or_too_small_for_the_bytes():
    with pytest.raises(InputError, match="vocabulary of 261 tokens: it gives 260"):
        train_tokenizer(["abab abab"], 261)
    with pytest.raises(InputError, match="at least 257"):
        train_tokenizer([TEXT], 256)
    assert len(train_tokenizer([TEXT], 257)) == 257


def test_saved_tokenizer_is_read_by_plain_transformers_beside_a_models_configuration(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=300, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path)
    text = " ".join(HARD_TEXTS)
    expected = tokenizer(text)["input_ids"]
    for loaded in (load_tokenizer(tmp_path), load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded(text)["input_ids"] == expected
        assert loaded.decode(expected) == text
        assert (loaded.eos_token_id, len(loaded)) == (0, 300)


def test_a_folder_without_a_tokenizer_is_an_input_error(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer folder .*absent"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_with_code_of_its_own_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    path.write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "mine.py").write_text("raise SystemExit('the code ran')", encoding="utf-8")
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_encode_texts_in_several_chunks_is_encoding_one_by_one(tokenizer, monkeypatch):
    monkeypatch.setattr("rl_jax.data.tokenizer.TEXTS_AT_ONCE", 3)
    encoded = encode_texts(tokenizer, HARD_TEXTS)
    assert [ids.tolist() for ids in encoded] == [tokenizer(text)["input_ids"] for text in HARD_TEXTS]
    assert {str(ids.dtype) for ids in encoded} == {"int32"}


def test_token_pieces_show_a_split_character_once_with_its_last_byte():
    tokenizer = train_tokenizer(["abab abab"], 260)
    ids = tokenizer("ababé日!")["input_ids"]
    assert token_pieces(tokenizer, ids) == ["abab", "", "é", "", "", "日", "!"]
    assert token_pieces(tokenizer, ids[:-2]) == ["abab", "", "é", "", "\ufffd"]  # cut in the middle of 日
    assert token_pieces(tokenizer, []) == []
    assert token_pieces(tokenizer, [0]) == [END_OF_TEXT]


def test_pieces_are_shown_as_their_tokens_come():
    tokenizer = train_tokenizer(["abab abab"], 260)
    ids, come = tokenizer("ababé日!")["input_ids"], []

    def tokens():
        for id in ids[:-2]:
            come.append(id)
            yield id

    shown = [(len(come), piece) for piece in stream_pieces(tokenizer, tokens())]
    assert shown == [(1, "abab"), (2, ""), (3, "é"), (4, ""), (5, ""), (5, "\ufffd")]
    assert list(stream_pieces(tokenizer, [])) == [""]


def test_token_pieces_join_to_the_decoded_text(tokenizer):
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(300) for _ in range(30)]
        pieces = token_pieces(tokenizer, ids)
        assert len(pieces) == 30
        assert "".join(pieces) == tokenizer.decode(ids)


def test_all_chat_templates_are_written(tmp_path):
    tokenizer = train_tokenizer([TEXT], 300)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    for _ in range(2):
        save_tokenizer(tmp_path / "policy", tokenizer)
    assert load_tokenizer(tmp_path / "policy").chat_template == tokenizer.chat_template
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_a_tokenizer_that_is_written_again_is_never_half_there(tokenizer, tmp_path):
    class Killed:
        def save_pretrained(self, folder):
            folder.mkdir()
            (folder / "tokenizer.json").write_text("{")
            raise KeyboardInterrupt

    folder = tmp_path / "policy"
    save_tokenizer(folder, tokenizer)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        save_tokenizer(folder, Killed())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_tokenizer(folder, tokenizer)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()
