"""Scripts in several processes on loopback: the same answers as in one, and no hang where one of them is lost."""

import contextlib
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from rl_jax.data.corpus import read_passages
from rl_jax.errors import InputError
from rl_jax.run.processes import HEARTBEAT, PATIENCE, agreed, anywhere, start_processes
from tests.test_checkpoint import cut, flip

ROOT = Path(__file__).parents[1]
DEVICES = 4  # in all
SLURM_PORTS = (1 << 16) - (1 << 12)  # the first of those that JAX takes under SLURM, by the number of the job
BOUND = HEARTBEAT + PATIENCE + 50  # seconds in which the others have ended when one has; this machine is busy
PRETRAIN = shlex.split("""
    --pretrain.vocab-size 300 --pretrain.context 32 --pretrain.layers 1 --pretrain.width 16 --pretrain.heads 2
    --pretrain.steps 12 --pretrain.batch-size 8 --pretrain.checkpoint-every 5 --pretrain.evaluate-every 6
    """)
PIPELINE = PRETRAIN + shlex.split("""
    --reinforce.prompts 8 --reinforce.group-size 2 --reinforce.prompt-length 6 --reinforce.completion-length 8
    --reinforce.steps 12 --reinforce.checkpoint-every 3 --reinforce.compare.prompts 8
    --reward tests.rewards_for_tests:vowels
    """)


def free_port() -> int:
    """A port of those that a SLURM job may have."""
    for port in random.sample(range(SLURM_PORTS, 1 << 16), 4096):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    output: str
    errors: str


class Processes:
    """The processes of one run, which share four devices; told of each other by options, or as SLURM does."""

    def __init__(self, home: Path, count: int, command: list[str], *, slurm: bool = False) -> None:
        flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={DEVICES // count}"
        # A run that is killed as it writes to the cache of compiled programs is no part of this.
        env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        self.logs, self.processes = [], []
        joined, port = "", free_port()
        for number in range(count):
            if slurm:
                joined = "--coordinator auto"
                about = {"JOB_ID": port - SLURM_PORTS, "NTASKS": count, "PROCID": number, "LOCALID": number}
                about |= {"STEP_NODELIST": "localhost", "STEP_NUM_NODES": 1}
                env |= {f"SLURM_{name}": str(value) for name, value in about.items()}
            elif count > 1:
                joined = f"--coordinator 127.0.0.1:{port} --processes {count} --process {number}"
            words = [sys.executable, *command, *joined.split()]
            logs = [home / f"{name}_{number}_of_{count}_{time.monotonic_ns()}" for name in ("output", "errors")]
            with logs[0].open("w") as output, logs[1].open("w") as errors:
                self.processes.append(subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=errors, env=env))
            self.logs.append(logs)

    def wait(self, seconds: float = 240) -> list[Ended]:
        deadline = time.monotonic() + seconds
        try:
            codes = [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        texts = [[log.read_text() for log in logs] for logs in self.logs]
        return [Ended(code, *text) for code, text in zip(codes, texts, strict=True)]

    def wait_for_rows(self, run: Path, stage: str, count: int) -> None:
        deadline = time.monotonic() + 240
        while sum(row["stage"] == stage for row in rows(run)) < count:
            assert all(process.poll() is None for process in self.processes), self.wait(BOUND)
            assert time.monotonic() < deadline
            time.sleep(0.02)


def rows(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def params(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "policy/model.safetensors")


def texts(run: Path) -> list:
    pairs = json.loads((run / "completions.json").read_text())["pairs"]
    return [[pair["prompt"], *("".join(pair[side]["tokens"]) for side in ("before", "after"))] for pair in pairs]


def assert_all_well(ended: list[Ended]) -> None:
    assert [each.code for each in ended] == [0] * len(ended), ended
    assert all(each.output == "" for each in ended[1:]), "the first alone speaks"


def assert_alike(run: Path, whole: Path) -> None:
    """The same completions and metrics as of a run in one process, which adds up in another order."""
    for name, array in params(run).items():
        np.testing.assert_allclose(array, params(whole)[name], rtol=1e-3, atol=2e-4, err_msg=name)
    assert texts(run) == texts(whole)
    found, expected = rows(run), rows(whole)
    assert [(row["stage"], row["step"]) for row in found] == [(row["stage"], row["step"]) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert row.keys() == wanted.keys()
        for name in ("loss", "reward", "length", "held_out_loss"):
            if name in row:
                assert row[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-3), (row["step"], name)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "prose.txt"
    path.write_text("\n\n".join(read_passages("bbe")[:600]), "utf-8")
    return path


@pytest.fixture(scope="module")
def pipeline(corpus):
    """Words of a small pipeline that writes to a folder."""
    return lambda run, *more: ["experiments/pipeline.py", "--corpus", str(corpus), "--run", str(run), *PIPELINE, *more]


@pytest.fixture(scope="module")
def pretraining(corpus):
    """Words of its first part alone."""
    words = ["experiments/pretrain.py", "--corpus", str(corpus)]
    words += [word.replace("--pretrain.", "--") for word in PRETRAIN]
    return lambda run, *more: [*words, "--run", str(run), *more]


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    """A run in one process, with as many devices."""
    home = tmp_path_factory.mktemp("whole")
    assert_all_well(Processes(home, 1, pipeline(home / "run")).wait())
    return home / "run"


@pytest.fixture(scope="module")
def of_two(pipeline, tmp_path_factory):
    """The same in two processes."""
    home = tmp_path_factory.mktemp("two")
    assert_all_well(Processes(home, 2, pipeline(home / "run")).wait())
    return home / "run"


def test_two_processes_of_a_slurm_job_pretrain_as_one_does(pretraining, tmp_path):
    for count in (1, 2):
        started = Processes(tmp_path, count, pretraining(tmp_path / str(count)), slurm=count > 1)
        assert_all_well(started.wait())
    for name, array in params(tmp_path / "2").items():
        np.testing.assert_allclose(array, params(tmp_path / "1")[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_do_what_one_does(of_two, whole):
    assert_alike(of_two, whole)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["", "data=2,fsdp=2", "tensor=2"])
def test_four_processes_do_what_one_does(mesh, pipeline, whole, tmp_path):
    assert_all_well(Processes(tmp_path, 4, pipeline(tmp_path / "run", "--mesh", mesh)).wait(400))
    assert_alike(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("after", ["in as many", "in one"])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(victim, after, pipeline, of_two, whole, tmp_path):
    run = tmp_path / "run"
    started = Processes(tmp_path, 2, pipeline(run))
    started.wait_for_rows(run, "rl", 5)
    started.processes[victim].kill()
    ended = started.wait(BOUND)
    assert ended[victim].code == -signal.SIGKILL
    assert ended[1 - victim].code in (3, -signal.SIGABRT)
    said = ended[1 - victim].errors.strip().splitlines()[-1]
    assert "start all processes again, with --resume" in said
    assert len(rows(run)) < len(rows(whole))
    count = {"in as many": 2, "in one": 1}[after]
    assert_all_well(Processes(tmp_path, count, pipeline(run, "--resume")).wait())
    if count == 1:
        unique = {(row["stage"], row["step"]): row for row in rows(run)}
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unique.values()))
        assert_alike(run, whole)
    else:
        assert {name: array.tobytes() for name, array in params(run).items()} == {
            name: array.tobytes() for name, array in params(of_two).items()
        }
        assert texts(run) == texts(of_two)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_four_on_another_mesh(pipeline, whole, tmp_path):
    run = tmp_path / "run"
    started = Processes(tmp_path, 1, pipeline(run, "--mesh", "fsdp=2,tensor=2"))
    started.wait_for_rows(run, "rl", 5)
    started.processes[0].send_signal(signal.SIGTERM)
    assert started.wait(BOUND)[0].code == 130
    assert_all_well(Processes(tmp_path, 4, pipeline(run, "--resume")).wait(400))
    assert_alike(run, whole)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_the_run_in_all(pipeline, of_two, tmp_path):
    run = tmp_path / "run"
    started = Processes(tmp_path, 2, pipeline(run))
    started.wait_for_rows(run, "rl", 3)
    started.processes[1].send_signal(signal.SIGTERM)
    ended = started.wait(BOUND)
    assert [each.code for each in ended] == [130, 130], ended
    assert "Stopped: rl is saved at step" in ended[0].errors
    assert_all_well(Processes(tmp_path, 2, pipeline(run, "--resume")).wait())
    assert {name: array.tobytes() for name, array in params(run).items()} == {
        name: array.tobytes() for name, array in params(of_two).items()
    }
    assert len(rows(run)) == len(rows(of_two)), "no step was made twice"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["", "fsdp=4"])
@pytest.mark.parametrize("damage", [cut, lambda path: flip(path, path.stat().st_size // 2)], ids=["cut", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_by_all(mesh, damage, pretraining, tmp_path):
    run, more = tmp_path / "run", ["--mesh", mesh] if mesh else []
    assert_all_well(Processes(tmp_path, 2, pretraining(run, *more)).wait())
    newest = run / "checkpoints/pretrain/12"
    before = params(run)
    for path in newest.rglob("d/*"):  # the arrays of both processes
        damage(path)
    ended = Processes(tmp_path, 2, pretraining(run, *more, "--resume")).wait(BOUND)
    assert_all_well(ended)
    assert "is set aside as unreadable-12, and the one of step 10 is restored" in ended[0].errors
    assert newest.is_dir() and (newest.parent / "unreadable-12").is_dir()
    assert {name: x.tobytes() for name, x in params(run).items()} == {name: x.tobytes() for name, x in before.items()}


@pytest.mark.slow
def test_a_reward_that_fails_in_one_process_ends_all_and_keeps_its_texts(pipeline, tmp_path):
    run = tmp_path / "run"
    command = pipeline(run, "--reward", "tests.rewards_for_tests:fails_in_the_second_process")
    ended = Processes(tmp_path, 2, command).wait(BOUND + 60)
    assert [each.code for each in ended] == [2, 2], ended
    assert "failed in another process" in ended[0].errors and "no such word" in ended[1].errors
    kept = [json.loads(line) for path in run.glob("unrewarded_rl_*_process_1.jsonl") for line in path.open()]
    assert len(kept) == 8, "the texts of its own half of the completions"


@pytest.mark.slow
def test_a_mistake_is_told_in_each_process_and_ends_all(pipeline, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    ended = Processes(tmp_path, 2, pipeline(tmp_path / "run")).wait(BOUND)
    assert [each.code for each in ended] == [2, 2], ended
    assert all("exists; give another folder" in each.errors for each in ended)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("node1", 2, 0), "give the address of process 0"),
        (("node1:12", 2, 2), "This is process 2 of 2"),
        (("node1:12", 0, -1), "This is process -1 of 0"),
        (("", 2, 0), "give the address of process 0"),
        (("auto", 2, -1), "leave them out"),
    ],
)
def test_processes_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        start_processes(*arguments)


def test_an_environment_without_processes(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(InputError, match=r"do not find each other .* by a scheduler that JAX knows"):
        start_processes("auto", 0, -1)


def test_a_process_by_itself_answers_at_once():
    class Event:
        happened = False

        def is_set(self):
            return self.happened

    event = Event()
    ask = agreed(event)
    assert anywhere(True) is True and not ask()
    event.happened = True
    assert ask()
