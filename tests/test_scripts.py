"""The parts of the scripts that compute something: splits, schedules, units; and completing prompts."""

import io
import math

import jax
import numpy as np
import pytest

from experiments import generate, pretrain, reinforce
from experiments.compare import Comparing
from experiments.reinforcing import split_prompts
from rl_jax.data.prompts import decode_completions
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError
from rl_jax.models.config import llama
from rl_jax.models.huggingface import Policy, save_policy
from rl_jax.models.transformer import init_params

TOKENIZER = train_tokenizer(["abab abab"], 260)


def test_prompts_of_the_comparison_are_never_learned_from_and_span_the_corpus():
    settings = reinforce.Reinforcing(prompts=4, prompt_length=2, compare=Comparing(prompts=5))
    passages = [f"{chr(65 + i)} abab abab" for i in range(20)]
    prompts = split_prompts(settings, TOKENIZER, passages)
    kept, learned = (decode_completions(TOKENIZER, *part) for part in (prompts.held_out, prompts.train))
    assert sorted(kept + learned) == sorted(f"{chr(65 + i)} abab" for i in range(20))
    assert [text[0] for text in kept] == ["A", "E", "I", "M", "Q"]
    with pytest.raises(InputError, match="need 9"):
        split_prompts(settings, TOKENIZER, passages[:8])


def test_learning_rate_rises_and_falls_to_a_tenth():
    rate = pretrain.learning_rate(1.0, steps=100, warmup=4)
    assert [float(rate(step)) for step in (0, 2, 4, 52, 100)] == pytest.approx([0.2, 0.6, 1.0, 0.55, 0.1])


def test_summary_units():
    text = pretrain.Text(TOKENIZER, ["ab", "é"], np.zeros(9, np.int32), np.zeros(5, np.int32))  # 4 targets, 4 bytes
    summary = pretrain.measure_text(8 * math.log(2), text)
    assert summary["held_out_bits_per_byte"] == pytest.approx(2)
    assert summary["held_out_perplexity"] == pytest.approx(4)
    assert summary["held_out_loss"] == pytest.approx(2 * math.log(2))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    config = llama(260, 24, 1, 16, 2)
    save_policy(folder, Policy(init_params(jax.random.key(0), config), config, TOKENIZER))
    return folder


def complete(policy, capsys, **settings) -> str:
    generate.main(generate.Config(policy, length=8, **settings))
    return capsys.readouterr().out


def test_given_prompts_are_completed_the_same_for_the_same_seed(policy, capsys):
    outputs = [complete(policy, capsys, prompts=("abab", "xyz"), completions=2, seed=seed) for seed in (0, 0, 1)]
    assert outputs[0].count("abab") >= 2 and outputs[0].count("xyz") >= 2
    assert outputs[0] == outputs[1] != outputs[2]


def test_typed_prompts_go_on_after_a_mistake(policy, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("abab\n\n" + "x" * 30 + "\nxyz\n"))
    output = complete(policy, capsys)
    assert "abab" in output and "xyz" in output
    assert "is empty" in output and "30 tokens" in output


@pytest.mark.parametrize("mistake", [{"length": 24}, {"length": 0}, {"completions": 0}, {"seed": -1}, {"top_p": 2.0}])
def test_generate_refuses_what_cannot_be(policy, mistake):
    with pytest.raises(InputError):
        generate.main(generate.Config(policy, prompts=("abab",), **mistake))
