"""A reward that is learned within the pipeline: preferences, rounds, gold beside it, what is kept, what is refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import pipeline, reinforce
from experiments.finetune import Finetuning
from experiments.judgements import judge_pairs, read_pairs, write_pairs
from experiments.rounds import Preferring
from experiments.train_reward import Learning
from rl_jax.data.preferences import read_preferences
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError
from rl_jax.models.reward_model import load_reward_model
from rl_jax.rewards.compose import RewardConfig
from rl_jax.run.loop import Interrupted
from rl_jax.types import Rollout
from tests.test_pipeline import PRETRAINING, REINFORCING, change, corpus, rows

__all__ = ["corpus"]


@pytest.fixture(scope="module")
def config(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("learned")
    lines = [{"prompt": f"In day {number}", "completion": f" {number} good"} for number in range(40)]
    (folder / "written.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return pipeline.Config(
        run=folder / "run",
        corpus=corpus,
        pretrain=PRETRAINING,
        demonstrations=folder / "written.jsonl",
        finetune=Finetuning(steps=4, batch_size=16, evaluate_every=2),
        reward=RewardConfig(("learned",), combine="minimum"),
        gold=RewardConfig(("keyword",), keywords=("the", "and")),
        preferences=Preferring(pairs=80, rounds=2),
        learn=Learning(members=2, steps=4, batch_size=16, evaluate_every=2, checkpoint_every=2),
        reinforce=REINFORCING,
    )


@pytest.fixture(scope="module")
def run(config):
    pipeline.main(config)
    return config.run


@pytest.mark.slow
def test_what_is_written(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["reward_model"]["train_rows"] == 2 * 72 and summary["reward_model"]["held_out_rows"] == 2 * 8
    assert {"pair_accuracy", "ece", "reliability", "accuracy_by_gap"} <= set(summary["reward_model"])
    assert {"gold_before", "gold_after", "gold_win_rate", "reward_before"} <= set(summary)
    assert summary["gold"] == "keyword" and summary["reward"] == "learned"
    found = rows(run)
    assert {stage for stage, _ in found} == {"pretrain", "finetune", "reward", "reward_2", "rl"}
    assert summary["finetune"]["held_out_loss"] < summary["finetune"]["held_out_loss_before"]
    assert abs(found["rl", 0]["kl"]) < 1e-5, "RL begins with the fine-tuned policy, and is measured from it"
    assert all({"gold", "gold_gain", "reward_gain"} <= set(found["rl", step]) for step in range(4))
    assert {"held_out_loss", "held_out_accuracy", "spread"} <= set(found["reward", 1])


@pytest.mark.slow
def test_each_round_judges_pairs_of_the_policy_as_it_is(run):
    pairs = [read_pairs(run / f"preferences_{number}.safetensors")[0] for number in (1, 2)]
    assert all(part.labels.shape == (80, 2) for part in pairs)
    assert not np.array_equal(pairs[0].completions, pairs[1].completions)
    texts = read_preferences(run / "preferences_1.jsonl")
    assert 0 < len(texts.rows) <= 80 and {row.labels for row in texts.rows} <= {(1.0, 0.0), (0.5, 0.5)}
    models = [load_reward_model(run / name) for name in ("reward", "reward_2")]
    assert all(len(model.params["normalizer"]["mean"]) == 2 for model in models)
    heads = [np.asarray(model.params["reward_head"]["kernel"]) for model in models]
    assert not np.array_equal(*heads), "the second was trained anew"


@pytest.mark.slow
def test_the_second_round_is_rewarded_by_its_own_model(run, config, monkeypatch, tmp_path):
    """With one round the first half of RL is the same, and the second is not."""
    once = change(change(config, "run", tmp_path / "once"), "preferences.rounds", 1)
    pipeline.main(once)
    rewards = [[rows(folder)["rl", step]["reward"] for step in range(4)] for folder in (run, once.run)]
    assert rewards[0][:2] == rewards[1][:2]
    assert rewards[0][2] != rewards[1][2]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_stopped_run_goes_on_bit_for_bit(run, config, monkeypatch, tmp_path, steps):
    """Before its second round, in it, and with all of RL behind it."""
    stopped = change(config, "run", tmp_path / "stopped")
    whole = reinforce.train

    def cut_short(step_fn, state, **settings):
        whole(step_fn, state, **settings | {"steps": steps, "checkpoint_every": 1})
        raise Interrupted("stopped")

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(reinforce, "train", cut_short)
        pipeline.main(stopped)
    pipeline.main(change(stopped, "resume", True))
    parameters = [load_file(folder / "policy" / "model.safetensors") for folder in (run, stopped.run)]
    for name, value in parameters[0].items():
        np.testing.assert_array_equal(value, parameters[1][name])
    timeless = [
        {key: {k: v for k, v in row.items() if k != "tokens_per_second"} for key, row in rows(folder).items()}
        for folder in (run, stopped.run)
    ]
    assert timeless[0] == timeless[1]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, stopped.run)]
    for summary in summaries:
        del summary["seconds"], summary["seconds_by_stage"]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("reward", RewardConfig(), "learn has no effect|preferences has no effect"),
        ("preferences", Preferring(file="none.jsonl", rounds=2), "rounds are of a gold reward"),
        ("preferences", Preferring(file="none.jsonl"), "none.jsonl"),
        ("preferences", Preferring(held_out="none.jsonl"), "no effect without preferences.file"),
        ("reward", RewardConfig(("learned",), weights=(-1.0,)), "learns what judges rejected"),
        ("preferences", Preferring(rounds=9, pairs=80), "9 rounds do not divide 4 updates"),
        ("preferences", Preferring(pairs=8), "fills a batch of 16"),
        ("preferences", Preferring(noise=-1.0), "noise is -1"),
        ("learn.layers", 5, "1 blocks to choose from"),
        ("learn.members", 1, "combine has no effect"),
        ("demonstrations", None, "finetune has no effect without demonstrations"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(config, tmp_path, name, value, message):
    bad = change(change(config, "run", tmp_path / "bad"), name, value)
    with pytest.raises(InputError, match=message):
        pipeline.main(bad)
    assert not bad.run.exists()


@pytest.mark.slow
def test_held_out_pairs_have_prompts_of_their_own(run):
    train, held_out = set(), set()
    for number in (1, 2):
        pairs, _ = read_pairs(run / f"preferences_{number}.safetensors")
        asked = [prompt[mask].tobytes() for prompt, mask in zip(pairs.prompts, pairs.prompt_mask, strict=True)]
        train, held_out = train | set(asked[:72]), held_out | set(asked[72:])
    assert len(train) > 15 and held_out and not train & held_out


def test_pairs_are_read_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    tokens, ones = rng.integers(1, 250, (6, 3)).astype(np.int32), np.ones((6, 3), bool)
    rollout = Rollout(np.repeat(tokens[::2], 2, axis=0), ones, tokens, ones, np.zeros((6, 3)), np.ones(6, bool))
    pairs, gaps = judge_pairs(rollout, rng.normal(size=(3, 2)), 0.25, 0)
    np.testing.assert_array_equal(pairs.prompts, tokens[::2])
    write_pairs(tmp_path / "pairs.safetensors", pairs, gaps, train_tokenizer(["abab abab"], 260))
    again, gaps_again = read_pairs(tmp_path / "pairs.safetensors")
    jax.tree.map(np.testing.assert_array_equal, (again, gaps_again), (pairs, gaps))


def test_a_gold_reward_that_is_always_the_same_cannot_judge():
    tokens = np.zeros((4, 1), np.int32)
    rollout = Rollout(tokens, tokens == 0, tokens, tokens == 0, np.zeros((4, 1)), np.ones(4, bool))
    with pytest.raises(InputError, match="cannot judge any pair"):
        judge_pairs(rollout, np.full((2, 2), 0.5), 0.25, 0)


def test_gold_judges_with_the_noise_that_is_asked_for():
    """Gold is the first token; two candidates a prompt, a standard deviation apart on average."""
    tokens = np.random.default_rng(0).integers(0, 100, (20_000, 1))
    ones = np.ones(tokens.shape, bool)
    rollout = Rollout(tokens, ones, tokens, ones, np.zeros(tokens.shape), ones[:, 0])

    gold = tokens[:, 0].reshape(-1, 2)
    lead = (gold[:, 0] - gold[:, 1]) / gold.std()
    exact, gaps = judge_pairs(rollout, gold, 0.0, 1)
    np.testing.assert_array_equal(exact.labels[:, 0], (np.sign(lead) + 1) / 2)
    np.testing.assert_array_equal(gaps, abs(gold[:, 0] - gold[:, 1]))
    noisy, _ = judge_pairs(rollout, gold, 0.5, 1)
    close = abs(lead - 0.7) < 0.1
    expected = 1 / (1 + np.exp(-0.7 / 0.5))
    assert abs(noisy.labels[close, 0].mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / close.sum())
    np.testing.assert_array_equal(noisy.labels.sum(axis=1), 1)
