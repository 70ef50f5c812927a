"""The main job from end to end on a small corpus: what it writes, how it is stopped and continued, what it refuses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import collect, pipeline, pretrain, reinforce, rl_programs
from experiments.compare import Comparing
from experiments.options import EstimatorOptions
from rl_jax.data.corpus import read_passages
from rl_jax.errors import InputError
from rl_jax.reinforce.estimators import ESTIMATORS
from rl_jax.rewards.compose import RewardConfig

PRETRAINING = pretrain.Pretraining(
    vocab_size=300, context=32, layers=1, width=16, heads=2, steps=6, batch_size=8, checkpoint_every=2
)
REINFORCING = reinforce.Reinforcing(
    prompts=8, group_size=2, prompt_length=6, completion_length=8, steps=4, checkpoint_every=2, compare=Comparing(8, 2)
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "prose.txt"
    path.write_text("\n\n".join(read_passages("bbe")[:400]), "utf-8")
    return str(path)


@pytest.fixture
def config(tmp_path, corpus):
    return pipeline.Config(run=tmp_path / "run", corpus=corpus, pretrain=PRETRAINING, reinforce=REINFORCING)


def change(config, name, value):
    """The config with the setting of that dotted name changed."""
    first, _, rest = name.partition(".")
    return dataclasses.replace(config, **{first: change(getattr(config, first), rest, value) if rest else value})


def rows(run: Path) -> dict[tuple[str, int], dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(line["stage"], line["step"]): line for line in lines}


def test_the_pipeline_writes_what_the_readme_says(config):
    pipeline.main(config)
    assert set(rows(config.run)) == {("pretrain", i) for i in range(6)} | {("rl", i) for i in range(4)}
    for name in ("config.json", "completions.json", "report.html", "policy/model.safetensors", "policy/tokenizer.json"):
        assert (config.run / name).stat().st_size > 0
    assert list((config.run / "tensorboard").iterdir())
    summary = json.loads((config.run / "summary.json").read_text())
    assert {"reward_before", "reward_after", "kl", "win_rate", "seconds", "held_out_bits_per_byte"} <= set(summary)
    first = rows(config.run)["rl", 0]
    assert first["kl"] == pytest.approx(0, abs=1e-5), "the first update is made by the reference policy itself"
    assert first["logprob_gap"] < 1e-5
    pairs = json.loads((config.run / "completions.json").read_text())["pairs"]
    assert len(pairs) == 8 and all(len(p["after"]["tokens"]) == len(p["after"]["log_ratio"]) for p in pairs)


@pytest.fixture
def programs(monkeypatch):
    """How often each program of the scripts was compiled, where it was called at all."""
    compiled, pmapped = {}, rl_programs.pmapped

    def counting(fn, *args, **kwargs):
        compiled[fn.__name__] = program = pmapped(fn, *args, **kwargs)
        return program

    for module in (rl_programs, collect, pretrain):
        monkeypatch.setattr(module, "pmapped", counting)
    return lambda: {name: count for name, program in compiled.items() if (count := program._cache_size())}


@pytest.mark.parametrize("reward", [RewardConfig(), RewardConfig(("length", "sentiment"), (1.0, 0.5), target_length=3)])
def test_each_program_compiles_once(config, reward, programs):
    pipeline.main(change(config, "reward", reward))
    assert programs() == dict.fromkeys(("update", "evaluate", "sample", "learn"), 1)


def test_a_reward_on_tokens_runs_in_one_program_with_rollout_and_update(config, programs):
    pipeline.main(change(config, "reward", RewardConfig(("length",), target_length=3)))
    assert programs() == dict.fromkeys(("update", "evaluate", "sample_and_learn"), 1)


def estimator_metrics(config, name, **options):
    """The rows of RL's metrics of a run with the estimator."""
    config = change(config, "reinforce.estimator", name)
    config = change(config, "reinforce.options", EstimatorOptions(**options))
    pipeline.main(config)
    found = [row for (stage, _), row in rows(config.run).items() if stage == "rl"]
    assert all(np.isfinite(row["grad_norm"]) and row["nonfinite"] == 0 for row in found)
    assert any(row["grad_norm"] > 0 for row in found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"ppo", "dapo", "remax", "rloo"}))
def test_every_estimator_runs(config, name):
    common = {"kl", "kl_k1", "entropy", "zero_signal_groups", "clipped", "ratio_min", "ratio_max", "truncated"}
    common |= {"effective_sample_size", "logprob_gap", "grad_norm", "kl_coefficient"}
    config = change(config, "reward", RewardConfig(("keyword",), keywords=("a",)))
    row = estimator_metrics(config, name)[-1]
    assert common <= set(row)
    assert ("explained_variance" in row) == ESTIMATORS[name].critic


@pytest.mark.slow
def test_ppo_runs_with_its_critic_minibatches_and_a_target(config):
    found = estimator_metrics(config, "ppo", epochs=2, minibatches=2, kl_target=1e-9, kl_horizon=64.0)
    assert found[0]["ratio_max"] > 1.00001 and found[0]["logprob_gap"] < 1e-5
    assert {"explained_variance", "value_loss"} <= set(found[0])
    assert found[0]["kl_coefficient"] == pytest.approx(0.05) != pytest.approx(found[-1]["kl_coefficient"])
    assert set(load_file(config.run / "policy/model.safetensors")) == set(
        load_file(config.run / "pretrained/model.safetensors")
    ), "the critic stays with the run"


@pytest.mark.slow
def test_remax_runs_with_a_reward_on_text(config):
    config = change(config, "reward", RewardConfig(("keyword",), keywords=("a",)))
    assert max(row["reward_std"] for row in estimator_metrics(config, "remax")) > 0


@pytest.mark.slow
def test_dapo_fills_the_batch_with_groups_that_have_a_signal(config, programs):
    rare = change(config, "reward", RewardConfig(("keyword",), keywords=("a",)))
    found = estimator_metrics(change(rare, "run", config.run.with_name("filled")), "dapo", sampling_rounds=6)
    assert set(programs().values()) == {1}
    once = estimator_metrics(change(rare, "run", config.run.with_name("once")), "dapo", sampling_rounds=1)
    assert 1 < found[0]["rounds"] <= 6 and "rounds" not in once[0]
    assert found[0]["zero_signal_groups"] == once[0]["zero_signal_groups"] > 0, "of what was sampled first"
    assert found[0]["reward_std"] > once[0]["reward_std"], "of what was learned from"


@pytest.mark.slow
def test_noise_is_measured_when_it_is_asked_for(config):
    found = estimator_metrics(change(config, "reinforce.noise_every", 2), "rloo")
    assert ["critical_batch_size" in row for row in found] == [True, False, True, False]


def command(config) -> list[str]:
    """The config as a command line; only what these tests change need be here."""
    settings = {"run": config.run, "corpus": config.corpus}
    settings |= {f"pretrain.{k.name}": getattr(config.pretrain, k.name) for k in dataclasses.fields(config.pretrain)}
    settings |= {f"reinforce.{k.name}": getattr(config.reinforce, k.name) for k in dataclasses.fields(config.reinforce)}
    for name in ("options", "lora"):
        settings.pop(f"reinforce.{name}")
    settings |= {f"reinforce.compare.{k}": v for k, v in dataclasses.asdict(settings.pop("reinforce.compare")).items()}
    words = [sys.executable, "experiments/pipeline.py"]
    for name, value in settings.items():
        flag = name.replace("_", "-")
        head, _, tail = flag.rpartition(".")
        no = f"--{head}.no-{tail}" if head else f"--no-{tail}"
        words += [no if value is False else f"--{flag}"] + ([] if isinstance(value, bool) else [str(value)])
    return words


def start(config, *more: str) -> subprocess.Popen:
    root = Path(__file__).parents[1]
    pipe = subprocess.PIPE
    env = os.environ | {"XLA_FLAGS": ""}  # the program that users run, not the tests' quickly compiled one
    return subprocess.Popen([*command(config), *more], cwd=root, stdout=pipe, stderr=pipe, text=True, env=env)


def wait_for_step(process, run: Path, stage: str, step: int) -> None:
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or (stage, step) not in rows(run):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def long_config(config):
    """So many updates that a signal arrives in the middle of them."""
    return change(config, "reinforce.steps", 60)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(long_config, tmp_path):
    whole = change(long_config, "run", tmp_path / "whole")
    process = start(whole)
    assert process.wait(300) == 0, process.communicate()
    process = start(long_config)
    wait_for_step(process, long_config.run, "rl", 7)
    process.kill()
    process.communicate()
    assert ("rl", 59) not in rows(long_config.run)
    process = start(long_config, "--resume")
    assert process.wait(300) == 0, process.communicate()
    tuned, expected = (load_file(run / "policy/model.safetensors") for run in (long_config.run, whole.run))
    assert all(np.array_equal(tuned[name], expected[name]) for name in expected)
    timing = ("tokens_per_second",)
    for key, row in rows(whole.run).items():
        again = rows(long_config.run)[key]
        assert {k: v for k, v in again.items() if k not in timing} == {k: v for k, v in row.items() if k not in timing}


@pytest.mark.slow
def test_control_c_saves_and_says_how_to_continue(long_config):
    process = start(long_config)
    wait_for_step(process, long_config.run, "rl", 3)
    process.send_signal(signal.SIGINT)
    output = "".join(process.communicate(timeout=120))
    assert process.returncode == 130
    assert "--resume" in output and "Traceback" not in output
    assert "Unfinished" in (long_config.run / "report.html").read_text("utf-8")
    saved = max(int(path.name) for path in (long_config.run / "checkpoints/rl").iterdir() if path.name.isdigit())
    assert saved == max(step for stage, step in rows(long_config.run) if stage == "rl") + 1


MISTAKES = {
    "corpus": ("corpus", "/nowhere/prose.txt", "/nowhere/prose.txt"),
    "short corpus": ("pretrain.batch_size", 10_000_000, "too short"),
    "long prompt": ("reinforce.prompt_length", 30, "context"),
    "long completion": ("reinforce.completion_length", 31, "context"),
    "devices": ("reinforce.prompts", 9, "9"),
    "group": ("reinforce.group_size", 1, "group_size"),
    "slots": ("reinforce.slots", -1, "slots"),
    "temperature": ("reinforce.temperature", 0.0, "temperature"),
    "heads": ("pretrain.heads", 3, "heads"),
    "vocabulary": ("pretrain.vocab_size", 100_000, "vocabulary"),
    "unknown reward": ("reward", RewardConfig(("sentimant",)), "sentiment"),
    "reward that raises": ("reward", RewardConfig(("tests.rewards_for_tests:broken",)), "broken"),
    "tokens at once": ("reinforce.tokens_at_once", -1, "tokens_at_once"),
    "no comparison": ("reinforce.compare.completions", 0, "compare.completions"),
    "no layers": ("pretrain.layers", 0, "layers"),
    "no heads": ("pretrain.heads", 0, "heads"),
    "pretraining devices": ("pretrain.batch_size", 12, "devices"),
    "pretraining microbatches": ("pretrain.microbatches", 3, "microbatches"),
    "seed": ("seed", -1, "seed"),
    "large seed": ("seed", 2**32, "seed"),
    "warmup": ("reinforce.warmup", -1, "warmup"),
    "clipping": ("pretrain.clip_norm", -1.0, "clip_norm"),
    "learning rate": ("reinforce.learning_rate", float("nan"), "learning_rate"),
    "penalty": ("reinforce.options", EstimatorOptions(kl_coefficient=float("inf")), "kl_coefficient"),
    "estimator": ("reinforce.estimator", "grppo", "grpo, dr_grpo"),
    "option without effect": ("reinforce.options", EstimatorOptions(clip_high=0.2), "clip_high has no effect for rloo"),
    "epochs on policy": ("reinforce.options", EstimatorOptions(epochs=2), "one update from a batch"),
    "horizon": ("reinforce.options", EstimatorOptions(kl_target=1.0, kl_horizon=2.0), "kl_horizon is 2.0"),
    "noise": ("reinforce.noise_every", -1, "noise_every"),
    "prompts": ("reinforce.compare.prompts", 8_000, "passages"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_error_before_anything_is_trained(config, name):
    setting, value, shown = MISTAKES[name]
    with pytest.raises(InputError, match=shown):
        pipeline.main(change(config, setting, value))
    assert not (config.run / "metrics.jsonl").exists()
    pipeline.check_run(config.run, config, resume=False)  # the folder is free again


def test_a_run_folder_is_not_written_over(config):
    config.run.mkdir()
    (config.run / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        pipeline.main(config)
    assert [path.name for path in config.run.iterdir()] == ["notes.txt"]


def test_the_command_line_shows_a_mistake_without_a_traceback(config):
    process = start(change(config, "corpus", "/nowhere"))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "/nowhere" in errors and "Traceback" not in output + errors


def test_several_devices_are_used():
    assert jax.device_count() == 8, "so that the runs above were mapped over them"
