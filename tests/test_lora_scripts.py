"""The scripts that train adapters: policies by reinforcement and by fine-tuning, and reward models."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import oracles
import pytest
from jax.tree_util import Partial
from safetensors.numpy import load_file
from test_finetune import make_batch
from test_lora import random_adapters

from experiments import finetune, reinforce, train_reward
from experiments.compare import Comparing
from experiments.mapped import make_sum_microbatches
from experiments.reinforcing import Reinforcing
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError
from rl_jax.models.config import llama
from rl_jax.models.huggingface import Policy, load_policy, save_policy
from rl_jax.models.lora import LoRA, merge_adapters, with_adapters
from rl_jax.models.peft import load_adapters
from rl_jax.models.reward_model import load_reward_model
from rl_jax.models.transformer import init_params
from rl_jax.pretraining import finetune_gradient
from rl_jax.run.spmd import make_mesh, pmapped

TOKENIZER = train_tokenizer(["abab abab"], 260)
MODEL = llama(260, 24, 1, 16, 2)
ADAPTED = LoRA(2, targets=("query", "up"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), MODEL)
    save_policy(folder, Policy(params, MODEL, TOKENIZER))
    return folder


def assert_equal(tree, expected, atol=0.0):
    for array, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=0, atol=atol)


def check_adapters(policy, run):
    """The policy is the base with the adapters added, and nothing else of it has changed."""
    base, tuned = load_policy(policy).params, load_policy(run / "policy").params
    assert_equal(tuned, merge_adapters(base, load_adapters(run / "adapters", MODEL), 1.0), atol=1e-6)
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(tuned), jax.tree.leaves(base), strict=True)
        if np.max(np.abs(new - old)) > 0.001
    }
    assert changed == {"block_0/attention/query/kernel", "block_0/mlp/up/kernel"}


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("estimator", "noise_every"), [("rloo", 0), pytest.param("ppo", 2, marks=pytest.mark.slow)])
def test_reinforcement_writes_the_policy_and_its_adapters_and_resumes(estimator, noise_every, policy, tmp_path):
    (tmp_path / "texts.txt").write_text("\n\n".join(f"{word} abab abab abab" for word in map(str, range(400))))
    rl = Reinforcing(
        prompts=8,
        group_size=2,
        prompt_length=4,
        completion_length=6,
        steps=4,
        learning_rate=0.05,
        checkpoint_every=2,
        estimator=estimator,
        noise_every=noise_every,
        compare=Comparing(prompts=4),
        lora=ADAPTED,
    )
    settings = reinforce.Config(policy, rl, run=tmp_path / "run", corpus=str(tmp_path / "texts.txt"), seed=1)
    reinforce.main(settings)
    check_adapters(policy, settings.run)
    assert max(row["logprob_gap"] for row in rows_of(settings.run)) < 1e-5
    assert all(np.isfinite(row["value_loss"]) for row in rows_of(settings.run) if estimator == "ppo")
    weights = settings.run / "adapters/adapter_model.safetensors"
    found, tuned = load_file(weights), load_policy(settings.run / "policy").params
    for part in ("checkpoints/rl/4", "policy", "adapters"):
        shutil.rmtree(settings.run / part)
    reinforce.main(dataclasses.replace(settings, resume=True))
    assert_equal(load_file(weights), found)
    assert_equal(load_policy(settings.run / "policy").params, tuned)


def test_fine_tuning(policy, tmp_path):
    rows = [{"prompt": f"abab {number}", "completion": f" ab{number % 3}"} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    learn = finetune.Finetuning(
        steps=6, batch_size=8, learning_rate=0.1, warmup=1, evaluate_every=6, checkpoint_every=6, lora=ADAPTED
    )
    settings = finetune.Config(policy, tmp_path / "rows.jsonl", learn, tmp_path / "run")
    finetune.main(settings)
    check_adapters(policy, settings.run)
    summary = json.loads((settings.run / "summary.json").read_text())["finetune"]
    assert summary["held_out_loss"] < summary["held_out_loss_before"] - 0.05
    with pytest.raises(InputError, match="no layer 'q_proj'"):
        wrong = dataclasses.replace(learn, lora=LoRA(2, targets=("q_proj",)))
        finetune.main(dataclasses.replace(settings, finetune=wrong, run=tmp_path / "other"))


@pytest.mark.slow
def test_an_ensemble_of_reward_models_on_one_base(policy, tmp_path):
    pairs = [{"prompt": f"{number}", "chosen": " abab", "rejected": " xyx"} for number in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), "utf-8")
    learn = train_reward.Learning(
        members=2, steps=24, batch_size=8, learning_rate=0.03, warmup=1, evaluate_every=24, checkpoint_every=24
    )
    settings = train_reward.Config(
        policy,
        tmp_path / "pairs.jsonl",
        learn=dataclasses.replace(learn, lora=ADAPTED),
        run=tmp_path / "run",
        normalize_prompts=8,
        completion_length=4,
    )
    train_reward.main(settings)
    summary = json.loads((settings.run / "summary.json").read_text())["reward_model"]
    assert summary["pair_accuracy"] == 1.0
    learned, base = load_reward_model(settings.run / "reward").params, load_policy(policy).params
    up, query = learned["block_0"]["mlp"]["up"]["kernel"], learned["block_0"]["attention"]["query"]["kernel"]
    for kernel, start in ((up, base["block_0"]["mlp"]["up"]), (query, base["block_0"]["attention"]["query"])):
        change = np.asarray(kernel) - np.asarray(start["kernel"])[None]
        assert np.linalg.matrix_rank(change, tol=1e-5).tolist() == [2, 2]
        assert np.max(np.abs(change[0] - change[1])) > 0.001  # members differ
    np.testing.assert_array_equal(
        learned["block_0"]["mlp"]["down"]["kernel"][1], base["block_0"]["mlp"]["down"]["kernel"]
    )


def test_the_gradient_of_fine_tuning_is_that_of_merged_matrices():
    config, base, batch = oracles.CONFIG, oracles.random_params(1), make_batch()
    adapters = jax.tree.map(lambda x: 5 * x, random_adapters(config, 2))
    mesh = make_mesh(jax.devices()[:2])

    def gradient(adapters, base, batch):
        whole = Partial(lambda base, trained: with_adapters(base, trained, 0.5), base)
        return finetune_gradient(adapters, batch, config, make_sum_microbatches(mesh, 2), whole)

    grads, metrics = pmapped(gradient, mesh, (None, None, 0), None)(adapters, base, batch)
    merged = merge_adapters(base, adapters, 0.5)
    full, expected = pmapped(functools.partial(finetune_gradient, config=config), mesh, (None, 0), None)(merged, batch)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    by_kernel = full["block_0"]["attention"]["out"]["kernel"]
    found, got = (tree["block_0"]["attention"]["out"] for tree in (adapters, grads))
    np.testing.assert_allclose(got["lora_a"], 0.5 * by_kernel @ found["lora_b"].T, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(got["lora_b"], 0.5 * found["lora_a"].T @ by_kernel, rtol=1e-3, atol=1e-5)
