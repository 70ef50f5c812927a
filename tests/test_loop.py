import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.errors import InputError
from rl_jax.run import loop
from rl_jax.run.checkpoint import close_checkpoints, open_checkpoints, restore_checkpoint
from rl_jax.run.loop import Interrupted, RewardFailed, RunFailed, run_main, train
from rl_jax.run.progress import describe
from rl_jax.types import TrainState


class Rows(NamedTuple):
    """A writer that keeps its rows."""

    rows: list

    def write(self, stage, step, metrics):
        self.rows.append((stage, step, dict(metrics)))


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = open_checkpoints(tmp_path / "checkpoints", {"seed": 0}, keep=3)
    yield checkpoints
    close_checkpoints(checkpoints)


def make_state():
    return TrainState(jnp.int32(0), {"w": jnp.zeros((4,))}, (), jnp.float32(0), jnp.float32(0), jnp.int32(0))


@jax.jit
def update(state, noise):
    params = jax.tree.map(lambda w: 0.9 * w + noise, state.params)
    return dataclasses.replace(state, step=state.step + 1, params=params), {"loss": jnp.sum(params["w"])}


def step_fn(state, step):
    return update(state, jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (4,)))


def run(step_fn, state, checkpoints, steps=10, every=4, rows=None, writer=None, **kwargs):
    writer = writer or Rows([] if rows is None else rows)
    return train(
        step_fn,
        state,
        stage="rl",
        steps=steps,
        writer=writer,
        checkpoints=checkpoints,
        checkpoint_every=every,
        **kwargs,
    )


def saved(checkpoints):
    return sorted(int(path.name) for path in Path(checkpoints.manager.directory).iterdir())


def test_state_and_rows_are_those_of_a_plain_loop(checkpoints):
    rows, expected, state = [], [], make_state()
    for step in range(10):
        state, metrics = step_fn(state, step)
        expected.append(("rl", step, {"loss": float(metrics["loss"])}))
    trained = run(step_fn, make_state(), checkpoints, rows=rows)
    assert rows == expected
    np.testing.assert_array_equal(trained.params["w"], state.params["w"])
    assert saved(checkpoints) == [4, 8, 10]


def test_a_resumed_run_is_bit_for_bit_the_one_that_was_not_stopped(checkpoints, tmp_path):
    whole = open_checkpoints(tmp_path / "whole", {})
    expected = run(step_fn, make_state(), whole)
    close_checkpoints(whole)

    def stopped_at_6(state, step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step_fn(state, step)

    rows = []
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"rl is saved at step 7 of 10. Add --resume"):
        run(stopped_at_6, make_state(), checkpoints, rows=rows)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    restored = restore_checkpoint(checkpoints, make_state())
    assert int(restored.step) == 7
    resumed = run(step_fn, restored, checkpoints, rows=rows)
    assert [row[1] for row in rows] == list(range(10))
    np.testing.assert_array_equal(resumed.params["w"], expected.params["w"])


def test_no_checkpoint_is_ahead_of_the_rows(checkpoints, monkeypatch):
    """A run that is killed after it goes on from there, and does not make those steps again."""
    rows, saved_with = [], {}

    def save(checkpoints, state):
        saved_with[int(state.step)] = len(rows)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    run(step_fn, make_state(), checkpoints, rows=rows, saved_at=(3, 8))
    assert saved_with == {step: step for step in (3, 4, 8, 10)}


def test_interrupted_at_a_checkpoint_saves_it_once(checkpoints):
    def stopped_at_3(state, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_fn(state, step)

    with pytest.raises(Interrupted, match="step 4 of 10"):
        run(stopped_at_3, make_state(), checkpoints)
    assert saved(checkpoints) == [4]


def test_a_second_signal_ends_the_step_itself(checkpoints, capsys):
    reached = []

    def twice(state, step):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        reached.append(step)
        return step_fn(state, step)

    with pytest.raises(KeyboardInterrupt):
        run(twice, make_state(), checkpoints)
    assert not reached
    assert "Stopping after this step" in capsys.readouterr().out


def test_trains_away_from_the_main_thread(checkpoints):
    states = []
    thread = threading.Thread(target=lambda: states.append(run(step_fn, make_state(), checkpoints)))
    thread.start()
    thread.join()
    assert int(states[0].step) == 10


def test_metrics_are_fetched_one_step_late(checkpoints):
    events = []

    class OnDevice:
        def __init__(self, step):
            self.step = step

        def __array__(self, dtype=None, copy=None):
            events.append(f"fetch {self.step}")
            return np.array(self.step, np.float32)

    def watched(state, step):
        events.append(f"dispatch {step}")
        return step_fn(state, step)[0], {"loss": OnDevice(step)}

    run(watched, make_state(), checkpoints, steps=4)
    assert events == [
        "dispatch 0", "dispatch 1", "fetch 0", "dispatch 2", "fetch 1", "dispatch 3", "fetch 2", "fetch 3",
    ]  # fmt: skip


def test_a_metric_that_is_a_function_is_called_when_the_next_step_is_under_way(checkpoints):
    calls, rows = [], []

    def step(state, number):
        calls.append(f"step {number}")
        state, metrics = step_fn(state, number)

        def gold():
            calls.append(f"gold {number}")
            return np.float32(number / 2)

        return state, metrics | {"gold": gold}

    run(step, make_state(), checkpoints, steps=3, rows=rows)
    assert calls == ["step 0", "step 1", "gold 0", "step 2", "gold 1", "gold 2"]
    assert [row["gold"] for _, _, row in rows] == [0.0, 0.5, 1.0]


def test_tokens_become_tokens_per_second(checkpoints):
    def slow(state, step):
        time.sleep(0.05)
        return step_fn(state, step)[0], {"tokens": 100}

    rows = []
    run(slow, make_state(), checkpoints, steps=4, rows=rows)
    assert [row[2] for row in (rows[0], rows[-1])] == [{"tokens_per_second": None}] * 2
    for _, _, row in rows[1:3]:
        assert row.keys() == {"tokens_per_second"}
        assert 200 < row["tokens_per_second"] <= 2000


def nonfinite_at(*bad):
    def step_fn(state, step):
        count = state.nonfinite + 1 if step in bad else jnp.zeros_like(state.nonfinite)
        return dataclasses.replace(state, step=state.step + 1, nonfinite=count), {"loss": jnp.nan, "nonfinite": count}

    return step_fn


def test_three_updates_that_are_not_finite_fail_the_run(checkpoints, capsys):
    rows = []
    with pytest.raises(RunFailed, match=r"rl failed at step 7: 3 updates .* kept, at step 5\."):
        run(nonfinite_at(5, 6, 7), make_state(), checkpoints, every=1, rows=rows)
    assert saved(checkpoints) == [3, 4, 5]
    assert [row[1] for row in rows] == list(range(8))
    logged = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert logged == [
        f"rl step {step}: the update was not finite and was skipped ({count} in a row)."
        for step, count in ((5, 1), (6, 2), (7, 3))
    ]


def test_at_the_last_step_too(checkpoints):
    with pytest.raises(RunFailed, match="There was no checkpoint yet"):
        run(nonfinite_at(0, 1, 2), make_state(), checkpoints, steps=3)
    assert saved(checkpoints) == []


def test_fewer_than_three_in_a_row_do_not(checkpoints):
    state = run(nonfinite_at(1, 2, 4, 5, 8, 9), make_state(), checkpoints)
    assert int(state.nonfinite) == 2
    assert saved(checkpoints) == [4, 8, 10]


def test_impossible_requests_are_refused(checkpoints):
    done = dataclasses.replace(make_state(), step=jnp.int32(11))
    with pytest.raises(InputError, match="at step 11 already, and cannot end at step 10"):
        run(step_fn, done, checkpoints)
    with pytest.raises(InputError, match="checkpoint_every is 0"):
        run(step_fn, make_state(), checkpoints, every=0)
    at_the_end = dataclasses.replace(make_state(), step=jnp.int32(10))
    assert run(step_fn, at_the_end, checkpoints) is at_the_end
    assert saved(checkpoints) == []


def test_without_a_terminal_a_tenth_is_a_line(checkpoints, capsys):
    run(step_fn, make_state(), checkpoints, steps=40, every=100, shown=("loss", "absent"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/40" for step in range(4, 41, 4)]
    assert all(" loss " in line and line.endswith(" left") for line in lines)


def test_metrics_are_described_shortly():
    assert describe({"loss": 3.14159, "kl": None, "tokens_per_second": 12345.6}) == "loss 3.142  tokens/s 12,346"


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 3


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 0, ""),
        (InputError("prompt [2] is empty"), 2, "error: prompt [2] is empty\n"),
        (RunFailed("rl failed"), 1, "error: rl failed\n"),
        (Interrupted("Stopped: saved."), 130, "Stopped: saved.\n"),
        (KeyboardInterrupt(), 130, "Stopped.\n"),
        (RewardFailed("the reward mine failed", []), 2, "error: the reward mine failed\n"),
        (OSError(28, "No space left on device", "a.json"), 2, "error: [Errno 28] No space left on device: 'a.json'\n"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(error, code, message, capsys, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    seen = []

    def main(config):
        seen.append(config)
        if error:
            raise error

    with pytest.raises(SystemExit) as exit_:
        run_main(main, Config, args=["--steps", "7"])
    assert exit_.value.code == code
    assert seen == [Config(steps=7)]
    assert capsys.readouterr().err == message


SCRIPT = """
import dataclasses, hashlib, time
import jax, jax.numpy as jnp
from rl_jax.run.checkpoint import open_checkpoints
from rl_jax.run.loop import run_main, train
from rl_jax.run.metrics import open_metrics
from rl_jax.types import TrainState

@dataclasses.dataclass(frozen=True)
class Config:
    folder: str
    step: str = "short"

def slow_to_compile(x):
    for i in range(3000):
        x = jnp.sin(x @ x) + i * jnp.cos(x)[::-1]
    return x

def main(config):
    lowered = jax.jit(slow_to_compile).lower(jnp.ones((8, 8))) if config.step == "compiling" else None

    def step_fn(state, step):
        print("working", flush=True)
        if config.step == "compiling":
            lowered.compile()
        elif config.step == "stuck":  # in C, where no Python handler runs
            hashlib.pbkdf2_hmac("sha256", b"", b"", 400_000_000)
        time.sleep(0.1)
        return dataclasses.replace(state, step=state.step + 1), {"loss": state.baseline}

    state = TrainState(jnp.int32(0), {}, (), jnp.float32(0), jnp.float32(0), jnp.int32(0))
    checkpoints, writer = open_checkpoints(config.folder, {}), open_metrics(config.folder)
    train(step_fn, state, stage="rl", steps=1000, writer=writer, checkpoints=checkpoints, checkpoint_every=1000)

run_main(main, Config)
"""


def start(*args):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.stdout.readline() != "working\n":
        assert process.poll() is None
    return process


def test_ctrl_c_saves_and_says_how_to_continue(tmp_path):
    process = start("--folder", str(tmp_path))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.startswith("Stopped: rl is saved at step ")
    assert errors.endswith("Add --resume to continue from there.\n")
    assert len(errors.splitlines()) == 1
    checkpoints = open_checkpoints(tmp_path, {})
    assert checkpoints.manager.latest_step() == int(errors.split("at step ")[1].split()[0])
    close_checkpoints(checkpoints)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == checkpoints.manager.latest_step()


@pytest.mark.parametrize("way", ["compiling", "stuck"])
def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path, way):
    process = start("--folder", str(tmp_path), "--step", way)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline().startswith("Stopping after this step")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert output == "Ending the run.\n"
    assert errors in ("", "Stopped.\n")
    assert not (tmp_path / "0").exists()
