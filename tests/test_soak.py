"""Thousands of updates in one process: memory, open files and threads stay as they are, and nothing compiles again."""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from rl_jax.data.corpus import read_passages
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.models.config import llama
from rl_jax.models.huggingface import Policy, save_policy
from rl_jax.models.transformer import init_params

ROOT = Path(__file__).parents[1]
STEPS = 3000
WARM = 500  # updates in which allocators and caches fill
ROOM = {"memory": 8 << 20, "files": 0, "threads": 2}
"""What the last third may hold more than the first after those: 5 kB an update, a checkpoint's open files, and threads
of pools that come and go."""
COMPILED = re.compile(r"Finished XLA compilation of (\S+)")


class Sample(NamedTuple):
    """What the kernel says of a process: updates so far, bytes of its own, open files, threads."""

    step: int
    memory: int
    files: int
    threads: int


def sample(process: subprocess.Popen, step: int) -> Sample:
    place = Path(f"/proc/{process.pid}")
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
    memory = 1024 * int(status["RssAnon"].split()[0])
    return Sample(step, memory, len(list((place / "fd").iterdir())), int(status["Threads"]))


def count_rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what a process holds is read as Linux tells it")
def test_a_long_run_holds_no_more_at_its_end_than_at_its_beginning(tmp_path):
    passages = read_passages("bbe")[:400]
    (tmp_path / "prose.txt").write_text("\n\n".join(passages), "utf-8")
    config = llama(300, 16, 1, 8, 2)
    policy = Policy(init_params(jax.random.key(0), config), config, train_tokenizer(passages, 300))
    save_policy(tmp_path / "policy", policy)
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {"policy": tmp_path / "policy", "run": run, "corpus": tmp_path / "prose.txt", "steps": STEPS}
    settings |= {"prompts": 2, "group-size": 2, "prompt-length": 4, "completion-length": 4, "checkpoint-every": 100}
    settings |= {"reward": "sentiment", "gold": "regex", "gold.pattern": "a", "compare.prompts": 2}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_LOG_COMPILES": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        command = [sys.executable, "experiments/reinforce.py", *words]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=env)
    samples, compiled = [], []
    try:
        while (step := count_rows(run / "metrics.jsonl")) < STEPS and process.poll() is None:
            if step > WARM:
                samples.append(sample(process, step))
                compiled.append(len(COMPILED.findall(log.read_text())))
            time.sleep(0.2)
        assert process.wait(120) == 0, log.read_text()[-3000:]
    finally:
        process.kill()

    early = [each for each in samples if each.step < WARM + (STEPS - WARM) // 3]
    late = [each for each in samples if each.step >= STEPS - (STEPS - WARM) // 3]
    print(f"\n{len(samples)} samples, compiled {compiled[0]}", *samples[:: max(len(samples) // 20, 1)], sep="\n")
    assert len(early) > 10 and len(late) > 10
    for held, room in ROOM.items():  # medians, for a checkpoint that is being written holds more for a moment
        before, after = (statistics.median(getattr(each, held) for each in part) for part in (early, late))
        assert after <= before + room, f"{held} grew from {before} to {after}"
    assert set(compiled) == {compiled[0]}, "a program was compiled again"
    programs = COMPILED.findall(log.read_text())
    counts = {name: programs.count(f"jit({name})") for name in ("sample", "learn")}
    assert counts == {"sample": 2, "learn": 1}, "the reference, once, is sampled by a program of its own"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS)) and all(row["gold"] is not None for row in rows)
