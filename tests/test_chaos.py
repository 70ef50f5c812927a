"""A pipeline that is killed at random moments, as it writes checkpoints too, and resumed until it ends.

What it leaves, bit for bit, is what a run leaves that was never killed: parameters, metrics, judgements and summary.
"""

import json
import os
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from rl_jax.data.corpus import read_passages

ROOT = Path(__file__).parents[1]
STAGES = ("pretrain", "reward", "rl")
KILLS = {"pretrain": 3, "reward": 3, "rl": 4}  # of each run, the first of them in the first stage
BY_THE_CLOCK = {"tokens_per_second", "seconds", "seconds_by_stage"}
PARTIAL = "*/*.orbax-checkpoint-tmp*"  # a checkpoint that is being written
WRITTEN = ("pretrained/model.safetensors", "reward/member_0/model.safetensors", "policy/model.safetensors")
SMALL = shlex.split("""
    --pretrain.vocab-size 300 --pretrain.context 32 --pretrain.layers 1 --pretrain.width 16 --pretrain.heads 2
    --pretrain.steps 70 --pretrain.batch-size 4 --pretrain.checkpoint-every 2 --pretrain.evaluate-every 8
    --preferences.pairs 40 --learn.steps 70 --learn.batch-size 8 --learn.checkpoint-every 2 --learn.evaluate-every 8
    --reinforce.prompts 4 --reinforce.group-size 2 --reinforce.prompt-length 6 --reinforce.completion-length 6
    --reinforce.steps 90 --reinforce.checkpoint-every 2 --reinforce.compare.prompts 8 --reinforce.compare.completions 2
    """)
WAYS = {  # each with a state of its own that has to come back
    "adaptive KL": "--reward learned --reinforce.estimator reinforce_moving_average --reinforce.kl-target 0.5"
    " --reinforce.kl-horizon 64",
    "critic": "--reward learned --reinforce.estimator ppo --reinforce.epochs 2 --reinforce.minibatches 2",
    "rounds": "--reward learned --reinforce.estimator rloo --preferences.rounds 2",
    "text": "--reward learned sentiment --reinforce.estimator remax --gold keyword --gold.keywords the and",
    "refills": "--reward learned regex --reward.pattern a --reinforce.estimator dapo --reinforce.sampling-rounds 3",
}


class Seen(NamedTuple):
    """What a kill hit: the stage under way, whether one of its checkpoints was being written, rows since the start."""

    stage: str
    writing: bool
    rows: int


def command(run: Path, corpus: Path, way: str) -> list[str]:
    words = ["--run", str(run), "--corpus", str(corpus), *SMALL, *WAYS[way].split()]
    return [sys.executable, "experiments/pipeline.py", *words]


def lines(run: Path) -> list[str]:
    """Rows of the metrics, whole ones."""
    path = run / "metrics.jsonl"
    return path.read_text("utf-8").split("\n")[:-1] if path.exists() else []


def rows(run: Path) -> dict[tuple[str, int], dict]:
    """The last row of each step, without what is measured by the clock."""
    found = [json.loads(line) for line in lines(run)]
    return {(row["stage"], row["step"]): {k: v for k, v in row.items() if k not in BY_THE_CLOCK} for row in found}


def summary(run: Path) -> dict:
    return {k: v for k, v in json.loads((run / "summary.json").read_text()).items() if k not in BY_THE_CLOCK}


def kill(process: subprocess.Popen, run: Path, stage: str, writing: bool, rng: random.Random) -> Seen | None:
    """Kills a run some rows into a stage, as it writes a checkpoint or some time later; None where it ended before."""
    before, wanted = len(lines(run)), rng.randint(4, 8)
    deadline, reached = time.monotonic() + 120, False
    while not (reached and (not writing or list((run / "checkpoints").glob(PARTIAL)))):
        if process.poll() is not None:
            return None
        assert time.monotonic() < deadline, f"no {wanted} rows of {stage}"
        found = lines(run)
        reached = len(found) >= before + wanted and STAGES.index(stage) <= STAGES.index(stage_of(found[-1]))
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.005 if writing else 0.25))
    process.kill()
    process.wait()
    found = lines(run)
    return Seen(stage_of(found[-1]), bool(list((run / "checkpoints").glob(PARTIAL))), len(found) - before)


def stage_of(line: str) -> str:
    return json.loads(line)["stage"].partition("_")[0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "prose.txt"
    path.write_text("\n\n".join(read_passages("bbe")[:400]), "utf-8")
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, shared: compiling is most of what a start costs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(cache):
    """A function that starts a run in a process of its own: its command, the file for what it says."""
    processes = []

    def start(words: list[str], log: Path) -> subprocess.Popen:
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache)}
        env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        with log.open("a") as output:
            processes.append(subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=output, env=env))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(way, corpus, start, tmp_path):
    seed = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"\nCHAOS_SEED={seed} repeats these kills, as far as the clock does")
    rng, log, run, whole = random.Random(seed), tmp_path / "log", tmp_path / "run", tmp_path / "whole"
    # First, and by itself: then all programs are compiled, and a start takes seconds.
    assert start(command(whole, corpus, way), log).wait(200) == 0, log.read_text()
    seen, words = [], command(run, corpus, way)
    for number, stage in enumerate(stage for stage, count in KILLS.items() for _ in range(count)):
        process = start(words, log)
        hit = kill(process, run, stage, number % 2 == 0, rng)
        assert hit is not None, f"the run ended before a kill in {stage}: {seen}\n{log.read_text()}"
        seen.append(hit)
        words = [*command(run, corpus, way), "--resume"]
    assert start(words, log).wait(200) == 0, log.read_text()
    print(*seen, sep="\n")

    assert {hit.stage for hit in seen} == set(STAGES)
    assert sum(hit.writing for hit in seen) >= 3, "kills fell while a checkpoint was being written"
    assert len(lines(run)) > len(lines(whole)), "steps were made again"
    for name in WRITTEN:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert rows(run) == rows(whole)
    assert summary(run) == summary(whole)
    assert not list((run / "checkpoints").glob("*/unreadable-*")), log.read_text()
