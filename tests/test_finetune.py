"""Learning from prompts with completions: the gradient, and the script from end to end."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from oracles import CONFIG, VOCAB

from experiments import finetune
from experiments.finetune import Finetuning
from rl_jax.data.preferences import padded_batches
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError
from rl_jax.microbatch import sum_over_microbatches
from rl_jax.models.config import llama
from rl_jax.models.huggingface import Policy, load_policy, save_policy
from rl_jax.models.transformer import hidden_states, init_params, logits
from rl_jax.pretraining import completion_nats, finetune_gradient
from rl_jax.run.spmd import make_mesh, pmapped
from rl_jax.types import PreferenceBatch

DRAW = np.random.default_rng(0)
SEQUENCES = DRAW.integers(VOCAB, size=(4, 5))
PROMPTS = (1, 4, 3, 2)  # tokens of each sequence that are its prompt
PAIRS = [(row[:length], row[length:]) for row, length in zip(SEQUENCES, PROMPTS, strict=True)]


def make_batch(extra_prompt=0, extra_completion=0):
    """The pairs, with columns of padding in which anything may stand."""
    P, C = 4 + extra_prompt, 4 + extra_completion
    prompts, completions = DRAW.integers(VOCAB, size=(4, P)), DRAW.integers(VOCAB, size=(4, 1, C))
    lengths = np.array([[len(prompt), len(completion)] for prompt, completion in PAIRS])
    for row, (prompt, completion) in enumerate(PAIRS):
        prompts[row, P - len(prompt) :] = prompt
        completions[row, 0, : len(completion)] = completion
    return PreferenceBatch(
        prompts=prompts.astype(np.int32),
        prompt_mask=np.arange(P) >= P - lengths[:, :1],
        completions=completions.astype(np.int32),
        completion_mask=(np.arange(C) < lengths[:, 1:])[:, None],
        labels=DRAW.normal(size=(4, 1)).astype(np.float32),
        margins=np.ones(4, np.float32),
    )


@jax.jit
@jax.value_and_grad
def by_hand(params):
    """Mean cross-entropy of the completion tokens, of sequences without any padding, by optax."""
    inputs = jnp.asarray(SEQUENCES[:, :-1])
    states = hidden_states(params, inputs, jnp.ones(inputs.shape, bool), CONFIG)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits(params, states, CONFIG), SEQUENCES[:, 1:])
    return jnp.mean(jnp.concatenate([row[length - 1 :] for row, length in zip(nats, PROMPTS, strict=True)]))


@pytest.mark.parametrize(("batch", "microbatches", "devices"), [(make_batch(), 1, 1), (make_batch(2, 1), 2, 2)])
def test_the_gradient_is_that_of_the_completions_alone(batch, microbatches, devices):
    params = oracles.random_params(1)
    loss, expected = by_hand(params)
    sum_parts = functools.partial(sum_over_microbatches, microbatches=microbatches)
    gradient = functools.partial(finetune_gradient, config=CONFIG, sum_parts=sum_parts)
    grads, metrics = pmapped(gradient, make_mesh(jax.devices()[:devices]), (None, 0), None)(params, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert set(metrics) == {"loss"}
    for array, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=1e-4, atol=1e-5)


def test_rows_that_fill_a_batch_cost_nothing():
    params, batch = oracles.random_params(1), make_batch()
    nats = jax.jit(completion_nats, static_argnums=2)
    (filled,) = padded_batches(batch, 5)
    tokens = sum(len(completion) for _, completion in PAIRS)
    np.testing.assert_allclose(nats(params, filled, CONFIG), tokens * by_hand(params)[0], rtol=1e-5)


def test_a_prompt_has_one_completion():
    batch = make_batch()
    two = dataclasses.replace(batch, completions=np.repeat(batch.completions, 2, axis=1))
    with pytest.raises(AssertionError):
        finetune_gradient(oracles.random_params(1), two, CONFIG)


TOKENIZER = train_tokenizer(["abab abab"], 260)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy, and 40 rows of which two cannot be used."""
    folder = tmp_path_factory.mktemp("finetune")
    config = llama(260, 16, 1, 16, 2)
    save_policy(
        folder / "policy", Policy(jax.jit(init_params, static_argnums=1)(jax.random.key(0), config), config, TOKENIZER)
    )
    rows = [{"prompt": f"abab {number}", "completion": f" ab{number % 3}"} for number in range(38)]
    rows += [{"prompt": "abab"}, {"prompt": "abab", "completion": "xyz" * 9}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return folder


@pytest.fixture
def config(folder, tmp_path):
    settings = Finetuning(
        steps=4, batch_size=8, learning_rate=0.03, warmup=1, evaluate_every=2, checkpoint_every=2, microbatches=1
    )
    return finetune.Config(folder / "policy", folder / "rows.jsonl", settings, tmp_path / "run")


def rows_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(line["stage"], line["step"]): line for line in lines}


def test_the_script_from_end_to_end_and_resumed(config, capsys, monkeypatch):
    drawn, shuffled_batch = [], finetune.shuffled_batch

    def recording(data, batch_size, seed, step, *more):
        drawn.append((len(data.prompts), batch_size, seed, step))
        return shuffled_batch(data, batch_size, seed, step, *more)

    monkeypatch.setattr(finetune, "shuffled_batch", recording)
    config = dataclasses.replace(config, seed=3)
    finetune.main(config)
    assert drawn == [(34, 8, 3, step) for step in range(4)]
    said = capsys.readouterr().out
    assert "2 rows are left out" in said
    assert "line 39 has neither" in said and "'xyzxyzxyzxyz" in said and "is longer than 16" in said
    rows = rows_of(config.run)
    assert set(rows) == {("finetune", step) for step in range(4)}
    assert [("held_out_loss" in rows["finetune", step]) for step in range(4)] == [False, True, False, True]
    summary = json.loads((config.run / "summary.json").read_text())["finetune"]
    assert (summary["train_rows"], summary["held_out_rows"], summary["rows_left_out"]) == (34, 4, 2)
    assert summary["held_out_loss_before"] == pytest.approx(np.log(260), abs=0.1)  # it knows nothing yet
    assert rows["finetune", 0]["loss"] == pytest.approx(np.log(260), abs=0.1)
    assert summary["held_out_loss"] == pytest.approx(rows["finetune", 3]["held_out_loss"], rel=1e-5)
    assert summary["held_out_loss"] < summary["held_out_loss_before"] - 0.5
    assert summary["held_out_perplexity"] == pytest.approx(np.exp(summary["held_out_loss"]))
    tuned = load_policy(config.run / "policy")
    assert tuned.config.vocab_size == 260
    assert (config.run / "report.html").stat().st_size > 0

    for part in ("checkpoints/finetune/4", "policy"):  # as if it had been stopped after two updates
        shutil.rmtree(config.run / part)
    finetune.main(dataclasses.replace(config, resume=True))
    assert drawn[4:] == drawn[2:4]
    again = load_policy(config.run / "policy")
    for array, wanted in zip(jax.tree.leaves(again.params), jax.tree.leaves(tuned.params), strict=True):
        np.testing.assert_array_equal(array, wanted)
    assert json.loads((config.run / "summary.json").read_text())["finetune"] == summary


def test_rows_are_held_out_for_good(config):
    rows = finetune.load_demonstrations(config.data, TOKENIZER, 16)
    parts = [{tuple(row[mask]) for row, mask in zip(x.prompts, x.prompt_mask, strict=True)} for x in rows[:2]]
    assert len(parts[0]) == 34 and len(parts[1]) == 4 and not parts[0] & parts[1]
    again = finetune.load_demonstrations(config.data, TOKENIZER, 16)
    for part, same in zip(jax.tree.leaves(rows), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(part, same)
    ends = [
        row[mask][-1] for row, mask in zip(rows.train.completions[:, 0], rows.train.completion_mask[:, 0], strict=True)
    ]
    assert set(ends) == {TOKENIZER.eos_token_id}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 12}, "does not divide into 1 microbatches over 8 devices"),
        ({"microbatches": 2}, "does not divide into 2 microbatches over 8 devices"),
        ({"batch_size": 40}, "There are 34 rows to learn from, too few for a batch of 40"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"evaluate_every": 0}, "evaluate_every is 0"),
    ],
)
def test_settings_that_cannot_work(config, change, message):
    config = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, **change))
    with pytest.raises(InputError, match=message):
        finetune.main(config)
    assert not config.run.exists()


def test_too_few_rows(config, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"completion": "a"}\n' * 4, "utf-8")
    with pytest.raises(InputError, match=r"has 4 rows that can be used; give at least 10"):
        finetune.main(dataclasses.replace(config, data=tmp_path / "rows.jsonl"))
