"""Trackers: they are given what the files have, and no step waits for them, whatever they do."""

import json
import math
import os
import sys
import threading
import time
import types
import warnings

import pytest

from rl_jax.errors import InputError
from rl_jax.run import metrics, tracking
from rl_jax.run.metrics import open_metrics
from rl_jax.run.tracking import check_tracker

CONFIG = {"script": "experiments/pipeline.py", "config": {"seed": 3, "reinforce": {"steps": 8}}, "device": "cpu x 1"}


class FakeRun:
    """A run of either tracker, with the methods that both have, and W&B's own."""

    def __init__(self, **about):
        self.about, self.rows, self.steps_of, self.finished = about, [], [], threading.Event()
        self.id, self.name = about.get("id"), about["name"]

    def define_metric(self, name, step_metric=None, step_sync=None, hidden=None, summary=None, goal=None):
        self.steps_of.append((name, step_metric))

    def log(self, data, step=None, commit=None):
        self.rows.append((data, step))

    def finish(self, exit_code=None):
        self.finished.set()


class Refused(Exception):
    """W&B's own kind of error."""


@pytest.fixture
def wandb(monkeypatch):
    """W&B, as far as it is used, with its signatures of 0.20 to 0.31."""
    module = types.ModuleType("wandb")
    module.runs, module.logins, module.Error = [], [], Refused

    def init(*, entity=None, project=None, dir=None, id=None, name=None, config=None, reinit=None, resume=None):
        about = {"project": project, "dir": dir, "id": id, "name": name, "config": config}
        module.runs.append(FakeRun(**about, reinit=reinit, resume=resume))
        return module.runs[-1]

    def login(key=None, relogin=None, host=None, force=None, timeout=None, verify=True):
        module.logins.append(verify)
        return True

    module.init, module.login = init, login
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("WANDB_MODE", "WANDB_PROJECT", *tracking.WANDB):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def trackio(monkeypatch):
    """Trackio, as far as it is used, with its signatures of 0.10 to 0.43."""
    module = types.ModuleType("trackio")
    module.runs = []

    def init(project, name=None, group=None, space_id=None, config=None, resume="never", settings=None, private=None):
        module.runs.append(FakeRun(project=project, name=name, config=config, resume=resume))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    return module


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "first run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def write_rows(writer):
    writer.write("pretrain", 7, {"loss": 4.25, "held_out_loss": None})
    writer.write("rl", 0, {"reward": 0.5, "kl": math.inf})
    writer.write("rl", 1, {"reward": 0.75})
    writer.close()


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_wandb_has_the_rows_over_the_steps_of_their_stage(folder, wandb):
    write_rows(open_metrics(folder, "wandb"))
    (run,) = wandb.runs
    assert run.rows == [
        ({"pretrain/loss": 4.25, "pretrain/step": 7}, None),
        ({"rl/reward": 0.5, "rl/kl": math.inf, "rl/step": 0}, None),
        ({"rl/reward": 0.75, "rl/step": 1}, None),
    ]
    assert run.steps_of == [("pretrain/*", "pretrain/step"), ("rl/*", "rl/step")]
    assert run.finished.is_set()


def test_trackio_has_the_rows(folder, trackio):
    write_rows(open_metrics(folder, "trackio"))
    (run,) = trackio.runs
    assert run.rows == [
        ({"pretrain/loss": 4.25}, 7),
        ({"rl/reward": 0.5, "rl/kl": math.inf}, 0),
        ({"rl/reward": 0.75}, 1),
    ]
    assert run.finished.is_set()


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_run_is_named_as_its_folder_and_brings_its_settings(folder, wandb, trackio, monkeypatch, tracker):
    monkeypatch.chdir(folder)
    open_metrics(".", tracker).close()
    monkeypatch.setenv(f"{tracker.upper()}_PROJECT", "mine")
    open_metrics(".", tracker).close()
    first, second = sys.modules[tracker].runs
    assert first.about["name"] == "first run"
    expected = {"seed": 3, "reinforce": {"steps": 8}, "script": "experiments/pipeline.py", "device": "cpu x 1"}
    assert first.about["config"] == expected
    assert (first.about["project"], second.about["project"]) == ("rl_jax", "mine")


def test_a_resumed_run_goes_on_in_the_tracked_run(folder, wandb, trackio):
    for tracker in ("wandb", "trackio", "trackio", "wandb"):
        open_metrics(folder, tracker).close()
    first, again = (run.about for run in wandb.runs)
    assert first["id"] == again["id"] and first["resume"] == again["resume"] == "allow"
    assert first["reinit"] == "create_new" and first["dir"] == str(folder)
    assert [run.about["resume"] for run in trackio.runs] == ["never", "allow"]
    assert json.loads((folder / "tracked.json").read_text()) == {"wandb": first["id"], "trackio": "first run"}


def test_runs_have_ids_of_their_own(folder, tmp_path, wandb):
    open_metrics(folder, "wandb").close()
    open_metrics(tmp_path, "wandb").close()
    assert wandb.runs[0].id != wandb.runs[1].id
    assert wandb.runs[1].about["config"] == {}  # a folder without config.json is tracked too


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_warned_of_once_and_dropped(folder, wandb, monkeypatch, broken):
    monkeypatch.setattr(tracking, "WAITING", 4)
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        raise ConnectionError("no route to host")

    if broken == "init":
        wandb.init = fail
    else:
        real = wandb.init

        def init(**about):
            run = real(**about)
            setattr(run, broken, fail)
            return run

        wandb.init = init
    with pytest.warns(UserWarning) as warned:
        writer = open_metrics(folder, "wandb")
        if broken != "finish":
            writer.write("rl", 9, {"reward": 0.0})
            writer.tracked.thread.join(60)
            for step in range(10, 15):  # more than would have a place to wait
                writer.write("rl", step, {"reward": 0.0})
        write_rows(writer)
    (warning,) = warned
    assert str(warning.message).startswith("wandb has failed (ConnectionError: no route to host). The run goes on")
    assert len(calls) == 1
    assert len(rows_of(folder)) == (3 if broken == "finish" else 9)


def test_no_step_waits_for_a_tracker(folder, trackio, monkeypatch):
    released, began = threading.Event(), threading.Event()
    monkeypatch.setattr(tracking, "WAITING", 20)
    monkeypatch.setattr(tracking, "PATIENCE", 0.1)
    real = trackio.init

    def init(*args, **about):
        began.set()
        released.wait(300)
        return real(*args, **about)

    trackio.init = init
    writer = open_metrics(folder, "trackio")
    assert began.wait(60)
    start = time.perf_counter()
    with pytest.warns(UserWarning) as warned:
        for step in range(25):
            writer.write("rl", step, {"reward": 0.5})
        writer.close()
    assert time.perf_counter() - start < 60
    texts = {str(warning.message) for warning in warned}
    assert texts == {
        "trackio cannot keep up, and goes without some of the metrics.",
        "trackio has not taken all metrics in 0 seconds.",
    }
    assert len(rows_of(folder)) == 25
    released.set()
    writer.tracked.rows.put(None)
    writer.tracked.thread.join(60)
    assert [step for _, step in trackio.runs[0].rows] == list(range(20))


def test_a_run_that_stops_gives_the_tracker_its_rows_at_exit(folder, wandb, monkeypatch):
    at_exit = []
    monkeypatch.setattr(tracking.atexit, "register", at_exit.append)
    writer = open_metrics(folder, "wandb")
    writer.write("rl", 0, {"reward": 0.5})
    for _ in range(1000):
        if not at_exit:
            time.sleep(0.01)
    at_exit[0]()
    assert len(wandb.runs[0].rows) == 1 and wandb.runs[0].finished.is_set()
    writer.close()  # again is without harm
    assert len(at_exit) == 1


def test_without_a_tracker_there_is_none(folder, wandb):
    assert open_metrics(folder).tracked is None
    check_tracker(None)
    assert not wandb.runs and not wandb.logins and not (folder / "tracked.json").exists()


def test_the_first_of_several_processes_alone_tracks(folder, wandb, monkeypatch):
    monkeypatch.setattr(metrics, "is_first", lambda: False)
    write_rows(open_metrics(folder, "wandb"))
    assert not wandb.runs


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_package_that_is_missing_is_told_with_the_command(monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)  # as if it were not installed
    with pytest.raises(InputError, match=rf"{tracker}.*: pip install {tracker}, or leave out track\."):
        check_tracker(tracker)


def test_wandb_is_logged_in_to_before_the_work(wandb, monkeypatch):
    check_tracker("wandb")
    assert wandb.logins == [False]  # not verified: that would take a network
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracker("wandb")
    assert wandb.logins == [False]
    monkeypatch.delenv("WANDB_MODE")

    def login(verify):
        raise Refused("No API key configured. Use `wandb login` to log in.")

    wandb.login = login
    with pytest.raises(InputError, match=r"wandb: No API key .* log in\. Or set WANDB_MODE=offline, or"):
        check_tracker("wandb")


def test_wandb_leaves_the_terminal_alone_unless_it_is_told_otherwise(wandb, monkeypatch):
    monkeypatch.setenv("WANDB_CONSOLE", "wrap")
    check_tracker("wandb")
    assert {name: os.environ[name] for name in tracking.WANDB} == {
        "WANDB_CONSOLE": "wrap",
        "WANDB_FINISH_TIMEOUT": "20",
    }


def test_a_failure_is_told_without_a_traceback(folder, trackio):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trackio.init = None
        open_metrics(folder, "trackio").close()
    assert "trackio has failed (TypeError: 'NoneType' object is not callable)" in str(warned[0].message)
