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

from experiments import pipeline, pretrain, reinforce
from experiments.compare import Comparing
from rl_jax.data.corpus import read_passages
from rl_jax.errors import InputError
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


@pytest.mark.parametrize("reward", [RewardConfig(), RewardConfig(("length", "sentiment"), (1.0, 0.5), target_length=3)])
def test_each_program_compiles_once(config, reward, monkeypatch):
    compiled = {}

    def counting(fn, *args, **kwargs):
        compiled[fn.__name__] = program = pmapped(fn, *args, **kwargs)
        return program

    pmapped = reinforce.pmapped
    monkeypatch.setattr(reinforce, "pmapped", counting)
    monkeypatch.setattr(pretrain, "pmapped", counting)
    pipeline.main(change(config, "reward", reward))
    assert {name for name, program in compiled.items() if program._cache_size()} == {
        "update", "evaluate", "sample", "learn"
    }  # fmt: skip
    assert {program._cache_size() for program in compiled.values()} <= {0, 1}


def test_a_reward_on_tokens_runs_in_one_program_with_rollout_and_update(config, monkeypatch):
    compiled = {}
    pmapped = reinforce.pmapped
    monkeypatch.setattr(
        reinforce, "pmapped", lambda fn, *rest, **more: compiled.setdefault(fn.__name__, pmapped(fn, *rest, **more))
    )
    pipeline.main(change(config, "reward", RewardConfig(("length",), target_length=3)))
    assert {name: program._cache_size() for name, program in compiled.items()} == {
        "sample": 0, "learn": 0, "sample_and_learn": 1
    }  # fmt: skip


@pytest.mark.parametrize("baseline", ["group_mean", "moving_average", "none"])
def test_every_baseline_runs(config, baseline):
    config = change(config, "reinforce.baseline", baseline)
    config = change(config, "reinforce.microbatches", 2)
    pipeline.main(config)
    assert all(np.isfinite(row["grad_norm"]) for (stage, _), row in rows(config.run).items() if stage == "rl")


def command(config) -> list[str]:
    """The config as a command line; only what these tests change need be here."""
    settings = {"run": config.run, "corpus": config.corpus}
    settings |= {f"pretrain.{k.name}": getattr(config.pretrain, k.name) for k in dataclasses.fields(config.pretrain)}
    settings |= {f"reinforce.{k.name}": getattr(config.reinforce, k.name) for k in dataclasses.fields(config.reinforce)}
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
    return subprocess.Popen([*command(config), *more], cwd=root, stdout=pipe, stderr=pipe, text=True, env=os.environ)


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
    "microbatches": ("reinforce.microbatches", 7, "microbatches"),
    "temperature": ("reinforce.temperature", 0.0, "temperature"),
    "heads": ("pretrain.heads", 3, "heads"),
    "vocabulary": ("pretrain.vocab_size", 100_000, "vocabulary"),
    "unknown reward": ("reward", RewardConfig(("sentimant",)), "sentiment"),
    "reward that raises": ("reward", RewardConfig(("tests.rewards_for_tests:broken",)), "broken"),
    "no microbatches": ("reinforce.microbatches", 0, "microbatches"),
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
    "penalty": ("reinforce.kl_coefficient", float("inf"), "kl_coefficient"),
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
