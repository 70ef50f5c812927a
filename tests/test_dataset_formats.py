"""The dataset formats and types that TRL documents, each with its example, where they mean something here."""

import json

import pytest

from rl_jax.data.conversations import make_render, plain_turns
from rl_jax.data.corpus import read_passages
from rl_jax.data.preferences import read_demonstrations, read_preferences
from rl_jax.data.prompt_rows import read_prompt_rows
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError

USER, BLUE, GREEN = (
    {"role": "user", "content": "What color is the sky?"},
    {"role": "assistant", "content": "It is blue."},
    {"role": "assistant", "content": "It is green."},
)
STRINGS = {
    "language modelling": {"text": "The sky is blue."},
    "prompt only": {"prompt": "The sky is"},
    "prompt-completion": {"prompt": "The sky is", "completion": " blue."},
    "preference": {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    "preference, implicit prompt": {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    "unpaired preference": {"prompt": "The sky is", "completion": " blue.", "label": True},
}
MESSAGES = {
    "language modelling": {"messages": [USER, BLUE]},
    "prompt only": {"prompt": [USER]},
    "prompt-completion": {"prompt": [USER], "completion": [BLUE]},
    "preference": {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
    "preference, implicit prompt": {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
    "unpaired preference": {"prompt": [USER], "completion": [BLUE], "label": False},
}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(params=["plain", "template"])
def render(request):
    if request.param == "plain":
        return plain_turns
    tokenizer = train_tokenizer(["abab"], 258)
    tokenizer.chat_template = TEMPLATE
    return make_render(tokenizer)


@pytest.fixture
def write(tmp_path):
    def to_file(row):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row), "utf-8")
        return path

    return to_file


def texts(render):
    """Of the conversation: its prompt, what follows it when it is blue or green."""
    if render is plain_turns:
        return "user: What color is the sky?\nassistant:", " It is blue.", " It is green."
    return "<user>What color is the sky?<|endoftext|><assistant>", "It is blue.", "It is green."


def test_prompts(write, render):
    for name in ("prompt only", "prompt-completion", "preference", "unpaired preference"):
        (some,), _ = read_prompt_rows(write(STRINGS[name]), render)
        (other,), _ = read_prompt_rows(write(MESSAGES[name]), render)
        assert some.text == "The sky is" and other.text == texts(render)[0]
    (asked,), _ = read_prompt_rows(write(MESSAGES["language modelling"]), render)
    assert asked.text == texts(render)[0]


def test_demonstrations(write, render):
    prompt, blue, _ = texts(render)
    for name in ("language modelling", "prompt-completion"):
        assert read_demonstrations(write(MESSAGES[name]), render).rows[0][:2] == (prompt, (blue,))
    assert read_demonstrations(write(STRINGS["prompt-completion"])).rows[0][:2] == ("The sky is", (" blue.",))
    assert read_demonstrations(write(STRINGS["language modelling"])).rows[0][:2] == ("", ("The sky is blue.",))


def test_preferences(write, render):
    prompt, blue, green = texts(render)
    for name in ("preference", "preference, implicit prompt"):
        assert read_preferences(write(MESSAGES[name]), render).rows[0][:3] == (prompt, (blue, green), (1, 0))
    assert read_preferences(write(STRINGS["preference"])).rows[0][:2] == ("The sky is", (" blue.", " green."))
    implicit = read_preferences(write(STRINGS["preference, implicit prompt"])).rows[0]
    assert implicit[:2] == ("", ("The sky is blue.", "The sky is green.")), "a reward is of the whole text"


def test_unpaired_preferences_are_ratings(write, render):
    prompt, blue, _ = texts(render)
    assert read_preferences(write(STRINGS["unpaired preference"])).rows[0][:3] == ("The sky is", (" blue.",), (1,))
    assert read_preferences(write(MESSAGES["unpaired preference"]), render).rows[0][:3] == (prompt, (blue,), (0,))
    with pytest.raises(InputError, match='has 1 under "label", which is neither true nor false'):
        read_preferences(write(STRINGS["unpaired preference"] | {"label": 1}))


def test_corpora(write, render):
    long = {"messages": [USER | {"content": "The sky is blue. " * 60}, BLUE]}
    assert read_passages(str(write(STRINGS["language modelling"]))) == ["The sky is blue."]
    assert read_passages(str(write(MESSAGES["language modelling"])), render) == ["".join(texts(render)[:2])]
    assert len(read_passages(str(write(long)), render)) == 1, "a conversation is one passage"
    with pytest.raises(InputError, match=r'rows\.jsonl, line 1 has no string under "role" of message 1'):
        read_passages(str(write({"messages": [{"content": "a"}]})), render)
