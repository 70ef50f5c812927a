"""Faults made on purpose to a run of the scripts: what docs/what_survives.md says of them."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import pretrain, reinforce
from experiments.compare import Comparing
from rl_jax.data.corpus import read_passages
from rl_jax.errors import InputError
from rl_jax.rewards.compose import RewardConfig
from rl_jax.run.checkpoint import close_checkpoints, open_checkpoints, restore_checkpoint, wait_for_checkpoints
from rl_jax.run.loop import RewardFailed, run_main
from rl_jax.run.metrics import open_metrics
from rl_jax.types import TrainState
from tests.test_loop import Rows, checkpoints, make_state, saved, step_fn
from tests.test_loop import run as run_loop

__all__ = ["checkpoints"]

ROOT = Path(__file__).parents[1]
NOTHING = RewardConfig(names=())
BOUND = 60  # seconds in which a run that is asked to stop has ended


class Run:
    """A small pretraining run as a process of its own, in a folder beside its corpus."""

    def __init__(self, home: Path, name: str, steps: int) -> None:
        self.folder, self.steps = home / name, steps
        self.corpus = home / "prose.txt"
        if not self.corpus.exists():
            self.corpus.write_text("\n\n".join(read_passages("bbe")[:400]), "utf-8")

    def start(self, *more: str) -> subprocess.Popen:
        settings = {"vocab-size": 300, "context": 32, "layers": 1, "width": 16, "heads": 2, "batch-size": 8}
        settings |= {"steps": self.steps, "checkpoint-every": 2, "run": self.folder, "corpus": self.corpus}
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        pipe = subprocess.PIPE
        command = [sys.executable, "experiments/pretrain.py", *words, *more]
        # A run that is killed as it writes to the cache of compiled programs is no part of this.
        env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=env)

    def lines(self) -> list[str]:
        """Rows of metrics as they stand in the file, a half-written one too."""
        path = self.folder / "metrics.jsonl"
        return path.read_text("utf-8").splitlines() if path.exists() else []

    def wait_for_lines(self, process: subprocess.Popen, count: int) -> None:
        deadline = time.monotonic() + 240
        while len(self.lines()) < count:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def result(self) -> dict[str, np.ndarray]:
        return load_file(self.folder / "policy/model.safetensors")

    def rows(self) -> dict[int, dict]:
        """The last row of each step, without what is measured by the clock."""
        found = [json.loads(line) for line in self.lines()]
        return {row["step"]: {k: v for k, v in row.items() if k != "tokens_per_second"} for row in found}


def assert_same_run(run: Run, expected: Run) -> None:
    result, whole = run.result(), expected.result()
    assert result.keys() == whole.keys()
    assert all(result[name].tobytes() == whole[name].tobytes() for name in whole)
    assert run.rows() == expected.rows()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    run = Run(tmp_path_factory.mktemp("whole"), "whole", steps=60)
    process = run.start()
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return run


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_saves_in_time_and_the_run_goes_on_as_if_there_had_been_none(whole, tmp_path, number):
    run = Run(tmp_path, "run", whole.steps)
    process = run.start()
    run.wait_for_lines(process, 5)
    process.send_signal(number)
    output, errors = process.communicate(timeout=BOUND)
    assert process.returncode == 130, output + errors
    assert errors.startswith("Stopped: pretrain is saved at step ") and len(errors.splitlines()) == 1
    saved = int(errors.split("at step ")[1].split()[0])
    assert (run.folder / "checkpoints/pretrain" / str(saved)).is_dir()
    assert sorted(run.rows()) == list(range(saved)) and saved < whole.steps
    process = run.start("--resume")
    assert process.wait(240) == 0, process.communicate()
    assert len(run.lines()) == whole.steps, "no step was made twice"
    assert_same_run(run, whole)


@pytest.mark.slow
def test_a_second_run_on_the_folder_is_refused_and_the_first_goes_on(whole, tmp_path):
    run = Run(tmp_path, "run", whole.steps)
    first = run.start()
    run.wait_for_lines(first, 1)
    first.send_signal(signal.SIGSTOP)  # so that it is not done before the second has begun
    for more in ([], ["--resume"]):
        second = run.start(*more)
        output, errors = second.communicate(timeout=120)
        assert second.returncode == 2, output + errors
        assert f"error: {run.folder} is in use: process {first.pid} on " in errors and len(errors.splitlines()) == 1
    first.send_signal(signal.SIGCONT)
    assert first.wait(240) == 0, first.communicate()
    assert_same_run(run, whole)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_trained(whole, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "pretrain", lambda *_: pytest.fail("it was trained"))
    words = ["--run", "/proc/self/run", "--corpus", str(whole.corpus), "--vocab-size", "300", "--context", "32"]
    with pytest.raises(SystemExit) as exit_:
        run_main(pretrain.main, pretrain.Config, args=words)
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and "'/proc/self/run'" in errors and len(errors.splitlines()) == 1


FULL = """
import dataclasses, resource, sys
import jax, jax.numpy as jnp
from rl_jax.run.checkpoint import open_checkpoints, wait_for_checkpoints
from rl_jax.run.loop import run_main, train
from rl_jax.run.metrics import open_metrics
from rl_jax.types import TrainState

@dataclasses.dataclass(frozen=True)
class Config:
    folder: str
    room: int

def main(config):
    def step_fn(state, step):
        if step == 5:  # from here on no file can be longer
            wait_for_checkpoints(checkpoints)
            resource.setrlimit(resource.RLIMIT_FSIZE, (config.room, resource.RLIM_INFINITY))
        key = jax.random.fold_in(jax.random.key(0), step)
        params = {"w": state.params["w"] + jax.random.normal(key, (50_000,))}
        return dataclasses.replace(state, step=state.step + 1, params=params), {"loss": state.baseline}

    zero = jnp.float32(0)
    state = TrainState(jnp.int32(0), {"w": jnp.zeros((50_000,))}, (), zero, zero, jnp.int32(0))
    checkpoints, writer = open_checkpoints(config.folder + "/checkpoints", {}), open_metrics(config.folder)
    train(step_fn, state, stage="rl", steps=100, writer=writer, checkpoints=checkpoints, checkpoint_every=4)

run_main(main, Config)
"""


@pytest.mark.parametrize(("room", "named"), [(20_000, "checkpoints"), (10, "metrics.jsonl")])
def test_a_full_disk_ends_the_run_with_what_it_had(tmp_path, room, named):
    """The kernel refuses to let a file grow, as it does on a full disk; the code that it gives is another."""
    command = [sys.executable, "-c", FULL, "--folder", str(tmp_path), "--room", str(room)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    line = done.stderr.strip()
    assert line.startswith("error: ") and f"{tmp_path}/{named}" in line and "File too large" in line
    assert line.endswith("The last good checkpoint is kept, at step 4. When that is mended, add --resume to continue.")
    zero = jnp.float32(0)
    like = TrainState(jnp.int32(0), {"w": jnp.zeros((50_000,))}, (), zero, zero, jnp.int32(0))
    checkpoints = open_checkpoints(tmp_path / "checkpoints", {})
    restored = restore_checkpoint(checkpoints, like)
    close_checkpoints(checkpoints)
    assert restored is not None and int(restored.step) == 4
    assert float(jnp.abs(restored.params["w"]).max()) > 0


@pytest.fixture
def writer(tmp_path):
    writer = open_metrics(tmp_path)
    yield writer
    writer.close()


def written(tmp_path, name="metrics"):
    return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()]


TEXTS = [{"prompt": "a", "completion": "é\n"}, {"prompt": "b", "completion": ""}]


def failing_at(*steps):
    def fails(state, step):
        if step in steps:
            raise RewardFailed("the reward mine gave nan", TEXTS)
        return step_fn(state, step)

    return fails


def test_a_reward_that_fails_loses_nothing(checkpoints, writer, tmp_path):
    expected, state = [], make_state()
    for step in range(10):
        state, metrics = step_fn(state, step)
        expected.append((step, float(metrics["loss"])))
    saying = (
        r"^the reward mine gave nan. The texts are in \S*unrewarded_rl_6\.jsonl; rl is saved at step 6 of 10\. Mend"
    )
    with pytest.raises(InputError, match=saying):
        run_loop(failing_at(6), make_state(), checkpoints, writer=writer)
    assert written(tmp_path, "unrewarded_rl_6") == TEXTS
    assert saved(checkpoints) == [4, 6]
    restored = restore_checkpoint(checkpoints, make_state())
    resumed = run_loop(step_fn, restored, checkpoints, writer=writer)
    assert [(row["step"], row["loss"]) for row in written(tmp_path)] == [
        (step, pytest.approx(loss)) for step, loss in expected
    ]
    np.testing.assert_array_equal(resumed.params["w"], state.params["w"])


def test_one_that_fails_at_once_leaves_what_there_was(checkpoints, writer):
    with pytest.raises(InputError, match="rl is at its beginning"):
        run_loop(failing_at(0), make_state(), checkpoints, writer=writer)
    assert saved(checkpoints) == []


@pytest.mark.parametrize(("bad", "step"), [(5, 7), (8, 10), (9, 10)])
def test_a_metric_on_text_that_fails_is_null_and_stops_the_run_with_all_else_kept(
    checkpoints, writer, tmp_path, bad, step
):
    def watched(state, number):
        def gold():
            if number == bad:
                raise RewardFailed("gold failed", TEXTS)
            return np.float32(number)

        return step_fn(state, number)[0], {"gold": gold, "gold_gain": lambda: 2 * gold()}

    with pytest.raises(InputError, match=rf"gold failed.*unrewarded_rl_{step}.jsonl; rl is saved at step {step}"):
        run_loop(watched, make_state(), checkpoints, writer=writer)
    assert saved(checkpoints)[-1] == step
    assert [(row["step"], row["gold"], row["gold_gain"]) for row in written(tmp_path)] == [
        (i, None, None) if i == bad else (i, i, 2 * i) for i in range(step)
    ]


def test_a_row_that_cannot_be_written_ends_the_run_and_says_what_is_kept(checkpoints):
    class Full(Rows):
        def write(self, stage, step, metrics):
            if step == 6:
                raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    with pytest.raises(OSError, match=r"No space left on device: 'metrics.jsonl'. .* is kept, at step 4. .* --resume"):
        run_loop(step_fn, make_state(), checkpoints, writer=Full([]))
    assert saved(checkpoints) == [4]


@pytest.mark.parametrize("jump", [-1e7, 1e7])
def test_a_clock_that_jumps_changes_nothing(checkpoints, writer, tmp_path, monkeypatch, jump):
    expected = run_loop(step_fn, make_state(), checkpoints, steps=8)
    others, true, offset, readings = open_checkpoints(tmp_path / "others", {}), time.time, 0.0, []

    def jumping():
        readings.append(true() + offset)
        return readings[-1]

    def timed(state, step):
        nonlocal offset
        wait_for_checkpoints(others)  # Orbax's own timeouts are of the clock that jumps
        offset += jump
        state, metrics = step_fn(state, step)
        return state, metrics | {"tokens": 100}

    monkeypatch.setattr(time, "time", jumping)
    trained = run_loop(timed, make_state(), others, steps=8, writer=writer)
    assert abs(readings[-1] - readings[0]) > 6 * abs(jump)
    np.testing.assert_array_equal(trained.params["w"], expected.params["w"])
    restored = restore_checkpoint(others, make_state())
    close_checkpoints(others)
    np.testing.assert_array_equal(restored.params["w"], expected.params["w"])
    rates = [row["tokens_per_second"] for row in written(tmp_path)]
    assert len(rates) == 8 and all(rate > 0 for rate in rates[1:-1])


REWARDS = """
import os, time
calls, hangs_at, fails_at = 0, None, None

def picky(prompt, completion):
    if len(completion) % 3 == 0:
        raise KeyError(len(completion))
    return 1.0

def moody(prompt, completion):
    global calls
    calls += 1
    if calls == fails_at:
        raise KeyError("no answer")
    while hangs_at is not None and calls > hangs_at:
        time.sleep(0.01)
    return completion.count("a")
"""


def tuning(whole, tmp_path, reward, gold=NOTHING):
    """A small RL run of the pretrained policy."""
    settings = reinforce.Reinforcing(
        prompts=8, group_size=2, prompt_length=6, completion_length=8, steps=6, checkpoint_every=50,
        compare=Comparing(8, 2),
    )  # fmt: skip
    where = {"run": tmp_path / "run", "corpus": str(whole.corpus)}
    return reinforce.Config(whole.folder / "policy", settings, reward, gold, **where)


@pytest.mark.slow
def test_a_reward_that_hangs_is_ended_and_the_run_goes_on_when_it_is_mended(whole, tmp_path, monkeypatch):
    (tmp_path / "moody_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    config = tuning(whole, tmp_path, RewardConfig(("moody_rewards:moody",), time_limit=0.5))
    undisturbed = dataclasses.replace(config, run=tmp_path / "undisturbed")
    reinforce.main(undisturbed)

    import moody_rewards

    moody_rewards.calls, moody_rewards.hangs_at = 0, 4 + 3 * 16 + 5  # 4 calls try it out, 16 are a step
    with pytest.raises(InputError) as refusal:
        reinforce.main(config)
    message = str(refusal.value)
    assert message.startswith("completion 5 of 16: the reward moody took longer than 0.5 s; the completion was ")
    assert f"{config.run}/unrewarded_rl_3.jsonl; rl is saved at step 3 of 6. Mend the reward" in message
    kept = [json.loads(line) for line in (config.run / "unrewarded_rl_3.jsonl").read_text("utf-8").splitlines()]
    assert len(kept) == 16 and all(set(row) == {"prompt", "completion"} for row in kept)
    moody_rewards.hangs_at = None
    patient = RewardConfig(("moody_rewards:moody",), time_limit=30.0)  # which a resumed run may have changed
    reinforce.main(dataclasses.replace(config, reward=patient, resume=True))
    tuned, expected = (load_file(run / "policy/model.safetensors") for run in (config.run, undisturbed.run))
    assert all(tuned[name].tobytes() == expected[name].tobytes() for name in expected)
    rows = [json.loads(line)["step"] for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(6))


def kept_rows(run, name):
    return [json.loads(line) for line in (run / f"unrewarded_{name}.jsonl").read_text("utf-8").splitlines()]


def test_a_run_goes_on_past_rewards_that_fail_where_that_is_asked_for(whole, tmp_path, monkeypatch, capsys):
    (tmp_path / "picky_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    picky = RewardConfig(("picky_rewards:picky",), on_failure=-2.0)
    config = tuning(whole, tmp_path, picky, gold=dataclasses.replace(picky, on_failure=0.5))
    reinforce.main(config)
    told = capsys.readouterr().out
    rows = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["failed_rewards"] for row in rows) > 3
    for row in rows:
        count = row["failed_rewards"]
        assert row["reward"] == pytest.approx((16 - count - 2 * count) / 16)
        assert row["gold"] == pytest.approx((16 - count + 0.5 * count) / 16) and row["failed_gold_rewards"] == count
        for name in (f"rl_{row['step']}", f"gold_{row['step']}") if count else ():
            kept = kept_rows(config.run, name)
            assert len(kept) == count and all(len(each["completion"]) % 3 == 0 for each in kept)
            assert all("the reward picky failed with KeyError" in each["failure"] for each in kept)
            assert f"warning: {name}: {count:.0f} rewards failed and were replaced, completion " in told
    summary = json.loads((config.run / "summary.json").read_text())
    gaps = [summary[f"gold_{side}"] - summary[f"reward_{side}"] for side in ("before", "after")]
    # Of 16 completions each, by two rewards that differ by 2.5 where they fail.
    assert 2 * sum(gaps) / 2.5 * 16 == pytest.approx(len(kept_rows(config.run, "compare")))
    assert "warning: compare: " in told and "warning: reference: " in told


@pytest.mark.parametrize(("name", "steps", "gold"), [("reference", 0, ("sentiment",)), ("compare", 6, ())])
def test_rewards_that_fail_outside_the_updates_keep_their_texts(whole, tmp_path, monkeypatch, name, steps, gold):
    (tmp_path / "moody_rewards_too.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "moody_rewards_too", raising=False)
    import moody_rewards_too

    moody_rewards_too.fails_at = 4 + steps * 16 + 3
    config = tuning(whole, tmp_path, RewardConfig(("moody_rewards_too:moody",)), RewardConfig(gold))
    with pytest.raises(InputError) as refusal:
        reinforce.main(config)
    message = str(refusal.value)
    assert message.startswith("completion 2 of 16: the reward moody failed with KeyError: 'no answer'; ")
    assert message.endswith(
        f"The texts are in {config.run}/unrewarded_{name}.jsonl. Mend the reward, then add --resume to continue."
    )
    assert [set(row) for row in kept_rows(config.run, name)] == [{"prompt", "completion"}] * 16
    reinforce.main(dataclasses.replace(config, resume=True))
    assert (config.run / "summary.json").exists()
