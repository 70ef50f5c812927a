"""Chatting with a policy: what is read and sampled, what is shown of it, and what a conversation remembers."""

import dataclasses
import io
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import chatting, generate
from experiments.chatting import Conversation, hear, make_stream, say
from rl_jax.data.conversations import make_render
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError
from rl_jax.models.config import llama
from rl_jax.models.huggingface import Policy, save_policy
from rl_jax.models.transformer import init_params
from rl_jax.rollout import generate as generate_plainly
from rl_jax.rollout import sequence_uniforms
from rl_jax.run.spmd import make_mesh
from rl_jax.sampling import Sampling

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOKENIZER = train_tokenizer(["the cat sat on the mat, the cat sat"] * 2, 264)
TOKENIZER.chat_template = TEMPLATE
VOCAB = 300  # more than the tokenizer's: the others are never to be sampled
CONFIGS = {
    "llama": llama(VOCAB, 128, 1, 16, 2),
    "windows": llama(VOCAB, 128, 2, 16, 2, windows=(5, 0)),
}


def make_policy(name="llama", vocab_size=VOCAB):
    config = dataclasses.replace(CONFIGS[name], vocab_size=vocab_size)
    params = init_params(jax.random.key(1), config)
    return Policy(jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params), config, TOKENIZER, (0, 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save_policy(folder, make_policy())
    return folder


@pytest.fixture
def say_lines(folder, monkeypatch, capsys):
    """What is shown where lines are typed."""

    def run(*lines, **settings):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        generate.main(generate.Config(folder, **{"length": 12, "room": 96} | settings))
        return capsys.readouterr().out

    return run


def streamed(stream, memory, prompt, uniforms):
    """The tokens of a completion, and what has been read."""
    steps = list(stream(memory, prompt, uniforms))
    return [token for token, _ in steps], steps[-1][1]


def generated(policy, sampling, key, prompt):
    rollout = generate_plainly(policy.params, key, jnp.array([prompt]), jnp.ones((1, len(prompt)), bool), *sampling)
    return np.asarray(rollout.completions[0])[np.asarray(rollout.completion_mask[0])].tolist()


@pytest.mark.parametrize("name", ["llama", pytest.param("windows", marks=pytest.mark.slow)])
def test_a_stream_samples_what_generate_does(name, monkeypatch):
    """Token for token, whether the prompt is read in one chunk or in several, or was read in part before."""
    monkeypatch.setattr(chatting, "CHUNK", 8)
    policy = make_policy(name, len(TOKENIZER))
    sampling = Sampling(7, temperature=0.9, top_p=0.99, eos=tuple(range(0, 264, 9)))
    stream, memory = make_stream(policy, policy.params, sampling, 40, make_mesh(jax.devices()[:1]))
    prompt = np.random.default_rng(0).integers(6, 264, 33).tolist()
    for seed, ids in enumerate([prompt[:5], prompt, [9, *prompt[:8]]]):
        key = jax.random.key(seed)
        uniforms = np.asarray(sequence_uniforms(key, jnp.zeros(1, int), sampling))[0]
        tokens, memory = streamed(stream, memory, ids, uniforms)
        assert tokens == generated(policy, (policy.config, sampling), key, ids)
        assert memory.tokens == (*ids, *tokens[:-1])


def test_tokens_that_the_tokenizer_lacks_are_never_sampled():
    policy = make_policy()
    table = policy.params["embedding"]["embedding"]
    towards = jnp.zeros_like(table).at[len(TOKENIZER) :].set(50.0)
    policy = policy._replace(params={**policy.params, "embedding": {"embedding": table + towards}})
    sampling = Sampling(12, eos=())
    stream, memory = make_stream(policy, policy.params, sampling, 40, make_mesh(jax.devices()[:1]))
    sampled, _ = streamed(stream, memory, [7, 8], np.linspace(0, 0.999, 12))
    assert len(sampled) == 12 and max(sampled) < len(TOKENIZER)


def test_nothing_is_compiled_after_the_first_turn(say_lines, monkeypatch, caplog):
    def compiled():
        return sum("Compiling" in record.getMessage() for record in caplog.records)

    def counting(*args, show=generate.show):
        counts.append(compiled())
        return show(*args)

    counts = []
    monkeypatch.setattr(generate, "show", counting)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        say_lines("the cat", "sat on the mat", "/plain the", "/new", "the cat sat on the mat " * 2, length=4)
    assert len(counts) == 4
    assert counts[0] > 0 and counts[1] == compiled()


def test_a_conversation_keeps_the_tokens_that_were_sampled():
    render = make_render(TOKENIZER)
    asked, left_out = say(Conversation(()), "the cat", render, TOKENIZER, 100)
    assert TOKENIZER.decode(list(asked.tokens)) == asked.text == "<user>the cat<|endoftext|>\n<assistant>"
    letters = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "cat"]
    assert TOKENIZER.encode("cat") != letters and not left_out
    answered = hear(asked, [*letters, 0], (0, 5), TOKENIZER)
    assert answered.messages[-1] == {"role": "assistant", "content": "cat"}
    again, _ = say(answered, "mat", render, TOKENIZER, 100)
    assert again.tokens[: len(asked.tokens) + 4] == (*asked.tokens, *letters, 0)
    assert again.text == asked.text + "cat<|endoftext|>\n<user>mat<|endoftext|>\n<assistant>"
    assert TOKENIZER.decode(list(again.tokens)) == again.text
    cut = hear(asked, letters, (0, 5), TOKENIZER)  # at the length: the template ends the turn
    assert say(cut, "mat", render, TOKENIZER, 100)[0].text == again.text


def test_a_template_that_changes_what_was_said_is_followed():
    words = train_tokenizer(["the cat sat on the mat, the cat sat"] * 2, 264)
    words.chat_template = TEMPLATE.replace("m['content']", "m['content'] | trim")
    render = make_render(words)
    asked, _ = say(Conversation(()), "the cat", render, words, 100)
    answered = hear(asked, [*words.encode(" sat "), 0], (0,), words)
    again, left_out = say(answered, "mat", render, words, 100)
    assert again.tokens == tuple(words.encode(again.text)) and "<assistant>sat<|" in again.text and not left_out


@pytest.mark.parametrize("room", [95, 103, 111, 120])
def test_the_oldest_turns_are_left_out_and_the_system_message_stays(room):
    render, system = make_render(TOKENIZER), {"role": "system", "content": "sat"}
    conversation, left_out = Conversation((system,)), []
    for number in range(6):
        conversation, dropped = say(conversation, f"cat {number}", render, TOKENIZER, room)
        left_out.append(dropped)
        assert len(conversation.tokens) <= room
        assert TOKENIZER.decode(list(conversation.tokens)) == conversation.text
        assert (
            conversation.text.startswith("<system>sat<|endoftext|>\n<user>") and f"cat {number}<" in conversation.text
        )
        conversation = hear(conversation, [9, 0], (0,), TOKENIZER)
    assert left_out == sorted(left_out) and (left_out[0], left_out[-1]) == (False, True)
    assert "cat 0" not in conversation.text
    with pytest.raises(InputError, match="there is room for 20"):
        say(conversation, "cat " * 20, render, TOKENIZER, 20)


def test_a_chat_is_shown_turn_by_turn(say_lines, monkeypatch):
    prompts = []
    monkeypatch.setattr(generate, "show", recorded(prompts))
    say_lines("the cat", "/plain the mat", "sat", "/new", "mat", system="on")
    system = "<system>on<|endoftext|>\n"
    first = f"{system}<user>the cat<|endoftext|>\n<assistant>"
    assert prompts[0] == first
    assert prompts[1] == "the mat"
    assert prompts[2].startswith(first) and prompts[2].endswith("<|endoftext|>\n<user>sat<|endoftext|>\n<assistant>")
    assert prompts[3] == f"{system}<user>mat<|endoftext|>\n<assistant>"


def recorded(prompts, show=generate.show):
    """`show`, which also records the text of its prompts."""

    def recording(console, policy, stream, memory, prompt, uniforms):
        prompts.append(TOKENIZER.decode(list(prompt)))
        return show(console, policy, stream, memory, prompt, uniforms)

    return recording


def test_what_ends_a_reply_is_not_shown_and_mistakes_are_survived(say_lines):
    output = say_lines("the cat", "the cat " * 60, "/plain", "sat")
    assert "<|endoftext|>" not in output
    assert output.count("tokens, the first after") == 2
    assert "there is room for" in output and "is empty" in output


def test_the_same_seed_says_the_same(say_lines):
    outputs = [say_lines("the cat", "the cat", seed=seed) for seed in (0, 0, 1)]
    outputs = [[line for line in output.splitlines() if "the first after" not in line] for output in outputs]
    assert outputs[0] == outputs[1] != outputs[2]


def test_given_prompts_are_messages_where_there_is_a_template(folder, capsys, monkeypatch):
    texts = []

    def recording(tokenizer, prompts, *rest, encode=generate.encode_prompts):
        texts.append(prompts)
        return encode(tokenizer, prompts, *rest)

    monkeypatch.setattr(generate, "encode_prompts", recording)
    for chat in ("auto", "on", "off"):
        generate.main(generate.Config(folder, prompts=("the cat",), chat=chat, length=4))
    assert "the cat" in capsys.readouterr().out
    assert texts == [("<user>the cat<|endoftext|>\n<assistant>",)] * 2 + [("the cat",)]


def test_a_template_that_refuses_a_message_is_an_input_error():
    words = train_tokenizer(["the cat sat on the mat, the cat sat"] * 2, 264)
    words.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(InputError, match=r"The conversation is refused.*no system messages"):
        say(Conversation(()), "the cat", make_render(words), words, 100)


def test_options_without_effect_are_refused(folder):
    with pytest.raises(InputError, match="system message has no effect"):
        generate.main(generate.Config(folder, system="x", chat="off"))
    with pytest.raises(InputError, match="leaves no room"):
        generate.main(generate.Config(folder, length=64, room=64))
