"""Prompts of files: what a policy is given, what a reward is told, and how a rollout finds its rows again."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import evaluate, reinforce
from experiments.compare import Comparing
from experiments.judge import text_rewards
from experiments.reinforcing import choose_prompts, fit_width
from rl_jax.data.conversations import make_render, turn_end
from rl_jax.data.files import read_rows
from rl_jax.data.preferences import Judged, encode_preferences, read_demonstrations
from rl_jax.data.prompt_rows import encode_prompt_rows, find_rows, pad_keys, prompt_key, read_prompt_rows
from rl_jax.data.prompts import decode_completions
from rl_jax.data.tokenizer import encode_texts, train_tokenizer
from rl_jax.errors import InputError
from rl_jax.models.config import llama
from rl_jax.models.huggingface import Policy, load_policy, save_policy
from rl_jax.models.transformer import init_params
from rl_jax.rewards.compose import RewardConfig, make_reward
from rl_jax.types import Rollout

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["In the beginning God made the heaven and the earth.", "abab abab", "What is 2+2?\n\nFour."]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def chat_tokenizer(end="<|im_end|>"):
    """A byte-level BPE with the special tokens of ChatML: 300 is <|im_start|>, 301 is <|im_end|>."""
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, end
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture
def write(tmp_path):
    def to_file(*rows, name="prompts.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
        return path

    return to_file


def sums(count=12):
    return [{"prompt": [user(f"What is {n}+{n}?")], "answer": str(2 * n)} for n in range(count)]


def test_a_rendered_template_has_one_id_for_each_special_token(tokenizer):
    (ids,) = encode_texts(tokenizer, [make_render(tokenizer)([user("ab"), assistant("x"), user("ab")], True)])
    assert [id for id in ids.tolist() if id >= 300] == [300, 301, 300, 301, 300, 301, 300]


@pytest.mark.parametrize("said", ["God made", " God", "\nGod", "\n\n God", "2+2", "é 日本"])
def test_prompt_and_completion_encoded_apart_are_the_whole_conversation(tokenizer, write, said):
    path = write({"messages": [user("What is 2+2?"), assistant("?"), user(" ab"), assistant(said)]})
    data, _ = encode_preferences(tokenizer, read_demonstrations(path, make_render(tokenizer)).rows, 200)
    apart = [*data.prompts[0][data.prompt_mask[0]], *data.completions[0, 0][data.completion_mask[0, 0]]]
    text = tokenizer.apply_chat_template(json.loads(path.read_text())["messages"], tokenize=False)
    whole = encode_texts(tokenizer, [text.removesuffix("\n")])[0]
    if said.startswith("\n"):  # line ends join that of the turn's head, which a sampled completion's cannot either
        assert tokenizer.decode(apart) == tokenizer.decode(whole)
    else:
        assert apart == whole.tolist()
    assert apart[-1] == 301 and apart[-2] != 301, "exactly one end"


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_completions_of_conversations_end_as_the_template_ends_a_turn(write, end):
    tokenizer = chat_tokenizer(end)
    assert turn_end(tokenizer) == 301
    path = write({"messages": [user("ab"), assistant("abab")]}, {"prompt": "ab", "completion": "abab"})
    data, _ = encode_preferences(tokenizer, read_demonstrations(path, make_render(tokenizer)).rows, 200)
    plain = encode_texts(tokenizer, ["abab"])[0].tolist()
    for row, closing in enumerate((301, tokenizer.eos_token_id)):
        assert data.completions[row, 0][data.completion_mask[row, 0]].tolist() == [*plain, closing]


def test_a_tokenizer_without_template_ends_completions_with_its_end():
    tokenizer = train_tokenizer(TEXTS, 300)
    assert turn_end(tokenizer) is None
    data, _ = encode_preferences(tokenizer, [Judged("", ("abab", "abab<|endoftext|>"), (1.0, 0.0))], 50)
    first, second = (data.completions[0, k][data.completion_mask[0, k]].tolist() for k in (0, 1))
    assert first == second and first.count(0) == 1


@pytest.mark.parametrize(
    ("row", "as_chat", "messages", "prompt", "turns"),
    [
        ({"prompt": "ab"}, False, None, "ab", "ab"),
        ({"prompt": "ab"}, True, [user("ab")], "ab", "ab"),
        ({"prompt": [user("ab")]}, False, [user("ab")], "ab", "ab"),
        ({"messages": [user("ab"), assistant("x")]}, False, [user("ab")], "ab", "ab"),
        (
            {"messages": [{"role": "system", "content": "s"}, user("a"), assistant("x"), user("b")]},
            False,
            [{"role": "system", "content": "s"}, user("a"), assistant("x"), user("b")],
            "b",
            "system: s\nuser: a\nassistant: x\nuser: b",
        ),
    ],
)
def test_rows_of_every_kind(tokenizer, write, row, as_chat, messages, prompt, turns):
    row |= {"answer": 4}
    (asked,), broken = read_prompt_rows(write(row), make_render(tokenizer), as_chat)
    whole = messages and tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert (asked.text, asked.prompt, asked.turns) == (whole or "ab", prompt, turns)
    assert asked.row == row and asked.place.endswith("line 1") and not broken


def test_rows_that_are_no_prompts_are_named(tokenizer, write):
    bad = [{"prompt": ""}, {"prompt": 3}, {"text": "a"}, {"messages": [assistant("a")]}, {"prompt": [assistant("a")]}]
    asked, broken = read_prompt_rows(write({"prompt": "ab"}, *bad), make_render(tokenizer))
    assert [each.prompt for each in asked] == ["ab"]
    reasons = ["empty", "no messages", "neither", "no message for the assistant", "no message for the assistant"]
    for number, (line, reason) in enumerate(zip(broken, reasons, strict=True), start=2):
        assert f"line {number} " in line and reason in line
    with pytest.raises(InputError, match=r"no row that can be used; the first of 1: .*line 1 has an empty"):
        read_prompt_rows(write({"prompt": ""}), make_render(tokenizer))


def test_long_prompts_are_left_out_and_equal_ones_taken_once(tokenizer, write):
    path = write({"prompt": "xyz", "a": 1}, {"prompt": "xyzxyz", "a": 2}, {"prompt": "xyz", "a": 1}, {"prompt": "x"})
    asked, _ = read_prompt_rows(path, make_render(tokenizer))
    rows, left_out = encode_prompt_rows(tokenizer, asked, 3)
    assert [each.prompt for each in rows.values()] == ["xyz", "x"]
    assert len(left_out) == 1 and "line 2: the prompt has 6 tokens, not 1 to 3" in left_out[0]
    with pytest.raises(InputError, match=r"none of 4 prompts has at most 0 tokens.* shortest has 1, the longest 6"):
        encode_prompt_rows(tokenizer, asked, 0)
    clash, _ = read_prompt_rows(write({"prompt": "x", "a": 1, "b": 2}, {"prompt": "x", "a": 3, "b": 2}), str)
    with pytest.raises(InputError, match=r"line 1 and .*line 2 have the same prompt and differ in a,"):
        encode_prompt_rows(tokenizer, clash, 3)


def test_a_prompt_finds_its_row_whatever_the_padding(tokenizer, write):
    asked, _ = read_prompt_rows(write(*sums()), make_render(tokenizer))
    rows, _ = encode_prompt_rows(tokenizer, asked, 60)
    for width in (0, 70):
        prompts, mask = pad_keys(tokenizer, [*rows], width)
        assert prompts.shape[1] == (width or max(mask.sum(axis=1)))
        assert find_rows(rows, prompts, mask) == asked
        assert find_rows(rows, prompts[::-1], mask[::-1])[0] is asked[-1]
        assert find_rows(rows, prompts[:1, 1:], mask[:1, 1:])[0] is (asked[0] if not mask[0, 0] else None)


def settings(path, **changes):
    changes = {"prompts": 4, "prompt_length": 60, "compare": Comparing(5, 2)} | changes
    return reinforce.Reinforcing(prompt_file=path, **changes)


def no_passages():
    raise AssertionError("no corpus is read")


def test_prompts_of_a_file_are_split_once_for_all_seeds(tokenizer, write):
    prompts = choose_prompts(settings(write(*sums())), tokenizer, no_passages)
    kept, learned = (
        [each.row["answer"] for each in find_rows(prompts.rows, *part)] for part in (prompts.held_out, prompts.train)
    )
    assert kept == ["0", "4", "8", "14", "18"]
    assert sorted(map(int, kept + learned)) == [2 * n for n in range(12)]
    longest = max(len(key) // 4 for key in prompts.rows)
    assert prompts.train[0].shape == (7, longest) and prompts.held_out[0].shape == (5, longest)
    assert prompts.train[1].all(axis=0).sum() < longest <= prompts.train[1].any(axis=0).sum()
    assert fit_width(settings(None), prompts).prompt_length == longest < 60
    texts = decode_completions(tokenizer, *prompts.train)
    assert texts[0] == "user\nWhat is 1+1?\nassistant\n", "special tokens are not shown"


def test_prompts_to_compare_on_may_have_a_file_of_their_own(tokenizer, write, capsys):
    held_out = write(*sums(14)[10:], name="held_out.jsonl")
    prompts = choose_prompts(settings(write(*sums()), held_out_file=held_out), tokenizer, no_passages)
    assert (len(prompts.train[0]), len(prompts.held_out[0]), len(prompts.rows)) == (12, 4, 14)
    assert "warning: 2 prompts of" in capsys.readouterr().out
    clash = write({"prompt": [user("What is 1+1?")], "answer": "3"}, name="clash.jsonl")
    with pytest.raises(InputError, match="have the same prompt and differ in answer"):
        choose_prompts(settings(write(*sums()), held_out_file=clash), tokenizer, no_passages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": 8}, r"has 12 different prompts that can be used; 13 are needed: 8 for an update"),
        ({"prompt_length": 4}, "none of 12 prompts has at most 4 tokens"),
        ({"as_chat": True}, "as_chat has no effect: every prompt is of messages already"),
        ({"prompt_file": None, "as_chat": True}, "as_chat has no effect without prompt_file"),
        ({"prompt_file": None, "held_out_file": "a.jsonl"}, "held_out_file has no effect without prompt_file"),
    ],
)
def test_what_cannot_be_is_refused(tokenizer, write, changes, message):
    with pytest.raises(InputError, match=message):
        choose_prompts(dataclasses.replace(settings(write(*sums())), **changes), tokenizer, no_passages)


def test_strings_for_a_chat_model_are_remarked_on(tokenizer, write, capsys):
    path = write(*({"prompt": f"ab{n}"} for n in range(9)))
    choose_prompts(settings(path), tokenizer, no_passages)
    assert "9 prompts are given as they are; --as-chat" in capsys.readouterr().out
    prompts = choose_prompts(settings(path, as_chat=True), tokenizer, no_passages)
    assert "as-chat" not in capsys.readouterr().out and (prompts.train[0] == 300).sum() == 2 * len(prompts.train[0])


def rollout_of(prompts, tokenizer, texts):
    completions, mask = pad_keys(tokenizer, [prompt_key(ids) for ids in encode_texts(tokenizer, texts)])
    zeros = np.zeros(completions.shape, np.float32)
    return Rollout(*prompts, completions, mask, zeros, np.zeros(len(texts), bool))


def right(prompt, completion, row):
    assert prompt == row["prompt"][-1]["content"]
    return float(completion == row["answer"])


def test_a_reward_on_text_is_given_the_row(tokenizer, write):
    prompts = choose_prompts(settings(write(*sums(16)), prompts=8), tokenizer, no_passages)
    reward = make_reward(RewardConfig((f"{__name__}:right", "regex"), (1.0, 0.5), pattern="^1"), tokenizer)
    some = [part[:8] for part in prompts.train]
    answers = [each.row["answer"] for each in find_rows(prompts.rows, *some)]
    texts = [answer if number % 2 else "no" for number, answer in enumerate(answers)]
    rewards = text_rewards(reward._replace(rows=prompts.rows), tokenizer, rollout_of(some, tokenizer, texts), [])
    expected = [float(text == answer) + 0.5 * text.startswith("1") for text, answer in zip(texts, answers, strict=True)]
    assert rewards.tolist() == expected and 0 < sum(expected) < 8
    with pytest.raises(Exception, match="right takes the row of its prompt, and this prompt is from no file"):
        text_rewards(reward, tokenizer, rollout_of(some, tokenizer, texts), [])


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("policy")
    config = llama(302, 64, 1, 16, 2)
    save_policy(folder, Policy(init_params(jax.random.key(0), config), config, tokenizer))
    return folder


def reinforcing(policy, path, run, **changes):
    rl = settings(path, group_size=2, prompts=8, completion_length=6, steps=2, compare=Comparing(8, 2))
    return reinforce.Config(policy, rl, reward=RewardConfig((f"{__name__}:right",)), run=run, **changes)


def test_reinforce_learns_from_a_file_of_messages(policy, write, tmp_path):
    reinforce.main(reinforcing(policy, write(*sums(20)), tmp_path / "run"))
    pairs = json.loads((tmp_path / "run/completions.json").read_text())["pairs"]
    assert [pair["prompt"] for pair in pairs][:2] == ["What is 0+0?", "What is 2+2?"]
    assert load_policy(tmp_path / "run/policy").tokenizer.chat_template == TEMPLATE


def test_a_reward_that_needs_rows_is_refused_where_there_are_none(policy, write, tmp_path):
    with pytest.raises(InputError, match="right takes the row of its prompt"):
        rl = reinforce.Reinforcing(prompts=8, compare=Comparing(8, 2), completion_length=6)
        reinforce.main(reinforce.Config(policy, rl, RewardConfig((f"{__name__}:right",)), run=tmp_path / "run"))
    with pytest.raises(InputError, match="corpus has no effect with prompt_file"):
        reinforce.main(reinforcing(policy, write(*sums(20)), tmp_path / "run", corpus="sotu"))
    assert not (tmp_path / "run").exists()


def test_evaluate_gives_the_same_rows_to_rewards(policy, write, tmp_path):
    evaluate.main(
        evaluate.Config(
            policies=(policy,),
            reward=RewardConfig((f"{__name__}:right",)),
            prompt_file=write(*sums(4)),
            completions=2,
            length=6,
            run=tmp_path / "run",
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "run/completions.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [f"What is {n}+{n}?" for n in range(4) for _ in range(2)]


def test_data_sets_of_the_hub_are_rows_too(monkeypatch, tmp_path, tokenizer):
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        if name == "org/absent":
            raise ConnectionError("offline")
        return [{"prompt": "ab", "answer": 1}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    for name in ("org/sums", "org/sums:test", "org/sums/main:train[:10]"):
        (each,), _ = read_prompt_rows(Path(name), make_render(tokenizer))
        assert (each.prompt, each.row["answer"], each.place) == ("ab", 1, f"{name}, row 0")
    assert asked == [("org/sums", None, "train"), ("org/sums", None, "test"), ("org/sums", "main", "train[:10]")]
    with pytest.raises(InputError, match=r"no file org/absent, and no such data set can be had from the hub .offline"):
        list(read_rows(Path("org/absent")))
    (tmp_path / "org").mkdir()
    (tmp_path / "org/sums.jsonl").write_text('{"prompt": "local"}')
    assert [row.values["prompt"] for row in read_rows(Path("org/sums.jsonl"))] == ["local"]
    with pytest.raises(InputError, match=r"there is no file org/other\.jsonl"):
        read_rows(Path("org/other.jsonl"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        list(read_rows(Path("org/sums")))
