import dataclasses
import errno
import fcntl
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from rl_jax.errors import InputError
from rl_jax.run import lock
from rl_jax.run.folder import check_run, describe_differences, differences, open_run, write_json


@dataclasses.dataclass(frozen=True)
class Model:
    width: int = 64
    names: tuple[str, ...] = ("a", "b")


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model = Model()
    corpus: Path = Path("text.txt")
    steps: int = 10
    resume: bool = False


def check_and_open(folder, config, **more):
    check_run(folder, config, config.resume, **more)
    return open_run(folder, "s.py", config)


def test_a_new_run_says_what_it_is(tmp_path):
    folder = open_run(tmp_path / "runs" / "one", "experiments/some.py", Config(), estimator={"name": "ppo"})
    written = json.loads((folder / "config.json").read_text())
    assert written["script"] == "experiments/some.py"
    assert written["estimator"] == {"name": "ppo"}
    assert written["config"] == {
        "model": {"width": 64, "names": ["a", "b"]}, "corpus": "text.txt", "steps": 10, "resume": False,
    }  # fmt: skip
    assert written["device"].startswith("cpu x 8 (")
    assert {"jax", "python", "numpy"} <= written["versions"].keys()


def test_a_folder_that_is_taken_is_refused(tmp_path):
    check_and_open(tmp_path / "one", Config())
    with pytest.raises(InputError, match=r"one exists; give another folder, remove it, or continue it with --resume"):
        check_and_open(tmp_path / "one", Config())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file exists"):
        check_and_open(tmp_path / "file", Config())
    (tmp_path / "empty").mkdir()
    check_and_open(tmp_path / "empty", Config())


def test_resuming_asks_for_the_run_that_was_there(tmp_path):
    with pytest.raises(InputError, match="no run to resume"):
        check_and_open(tmp_path / "none", Config(resume=True))
    assert not (tmp_path / "none").exists()
    check_and_open(tmp_path / "one", Config())
    check_and_open(tmp_path / "one", Config(resume=True))
    other = Config(Model(width=32), steps=20, resume=True)
    with pytest.raises(InputError, match=r"model.width was 64 and is now 32; steps was 10 and is now 20"):
        check_and_open(tmp_path / "one", other)
    check_and_open(tmp_path / "one", other, may_differ=("resume", "steps", "model.width"))
    assert json.loads((tmp_path / "one" / "config.json").read_text())["config"]["steps"] == 20
    (tmp_path / "one" / "config.json").write_text('{"config"')
    with pytest.raises(InputError, match="cannot be read"):
        check_and_open(tmp_path / "one", Config(resume=True))


def test_differences_are_named_by_their_path():
    old = {"a": 1, "b": {"c": [1, 2], "d": None}, "gone": True}
    new = {"a": 1, "b": {"c": [1, 3], "d": None}, "new": {"x": 1}}
    found = differences(old, new)
    assert found == {"b.c": ([1, 2], [1, 3]), "gone": (True, "absent"), "new": ("absent", {"x": 1})}
    assert differences(old, old) == {}
    assert describe_differences(found, limit=1) == "b.c was [1, 2] and is now [1, 3]; and 2 more"


def test_json_is_whole_and_has_no_nan(tmp_path):
    path = tmp_path / "summary.json"
    write_json(
        path, {"kl": math.nan, "interval": (jnp.float32(0.5), math.inf), "steps": jnp.arange(2), "where": tmp_path}
    )
    kept = {"kl": None, "interval": [0.5, None], "steps": [0, 1], "where": str(tmp_path)}
    assert json.loads(path.read_text()) == kept
    with pytest.raises(TypeError):
        write_json(path, {"kl": object()})
    assert json.loads(path.read_text()) == kept
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


HOLDER = """
import pathlib, sys
from rl_jax.errors import InputError
from rl_jax.run.lock import lock_folder
try:
    lock_folder(pathlib.Path(sys.argv[1]))
    print("has it", flush=True)
    sys.stdin.read()
except InputError:
    print("refused", flush=True)
"""


@pytest.fixture
def other_process():
    """Starts another process that takes a folder, until it is killed; yields the function that does it."""
    started = []

    def start(folder):
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdin=pipe, stdout=pipe, text=True)
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_folder_that_another_process_writes_to_is_refused_until_it_ends(tmp_path, other_process):
    folder = tmp_path / "one"
    check_and_open(folder, Config())
    shutil.copytree(folder, tmp_path / "copy")
    holder, said = other_process(tmp_path / "copy")
    assert said == "has it", "a copy is another folder"
    before = (tmp_path / "copy" / "config.json").read_bytes()
    refusal = rf"copy is in use: process {holder.pid} on .* give another folder"
    for config in (Config(), Config(resume=True)):
        with pytest.raises(InputError, match=refusal):
            check_run(tmp_path / "copy", config, config.resume)
    with pytest.raises(InputError, match=refusal):
        open_run(tmp_path / "copy", "s.py", Config(steps=11))
    assert (tmp_path / "copy" / "config.json").read_bytes() == before
    holder.kill()
    holder.wait()
    check_and_open(tmp_path / "copy", Config(resume=True))


def test_this_process_keeps_the_folder_it_opened(tmp_path, other_process):
    folder = tmp_path / "one"
    check_and_open(folder, Config())
    check_and_open(folder, Config(resume=True))
    assert other_process(folder)[1] == "refused"
    shutil.rmtree(folder)
    check_and_open(folder, Config())
    assert other_process(folder)[1] == "refused", "the folder that is there now is another"


def test_what_a_run_killed_as_it_began_has_left_is_in_nobodys_way(tmp_path):
    (tmp_path / "config.json.tmp").write_text("{")
    (tmp_path / lock.FILE).write_text("process 1 on a host\n")
    check_and_open(tmp_path, Config())


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=r"cannot be locked \(.*No locks available\)"):
        check_and_open(tmp_path, Config())
    with pytest.warns(UserWarning, match="cannot be locked"):
        check_and_open(tmp_path, Config(resume=True))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/run"):
        check_and_open(tmp_path / "file" / "run", Config())
