"""Results of recipes on disk: the same table as JSON and as Markdown, and what it was made with."""

import dataclasses
import json
import math
import os
import time

import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.errors import InputError
from rl_jax.evaluation import Estimate
from rl_jax.run.tables import format_cell, markdown_table, open_results, write_table

ROWS = [
    {"estimator": "rloo", "k": 4, "reward": Estimate(0.7051, 0.676, 0.7342), "kl": np.float32(5.5)},
    {"estimator": "raft | best", "k": 2, "reward": (0.5, 0.25, 0.55), "note": "slow"},
]


@dataclasses.dataclass(frozen=True)
class Settings:
    seeds: int = 10
    rates: tuple[float, ...] = (0.1, 1e-3)


def test_files_hold_the_table_and_its_settings(tmp_path, capsys):
    folder = tmp_path / "results" / "name"
    write_table(folder, ROWS, Settings())
    write_table(folder, ROWS, Settings())  # over what is there
    assert sorted(path.name for path in folder.iterdir()) == ["settings.json", "table.json", "table.md"]
    first, second = json.loads((folder / "table.json").read_text("utf-8"))
    assert first == {
        "estimator": "rloo",
        "k": 4,
        "reward": {"value": 0.7051, "low": 0.676, "high": 0.7342},
        "kl": 5.5,
    }
    assert second["reward"] == {"value": 0.5, "low": 0.25, "high": 0.55}
    about = json.loads((folder / "settings.json").read_text("utf-8"))
    assert about["settings"] == {"seeds": 10, "rates": [0.1, 0.001]}
    assert about["device"].startswith("cpu x 8") and "jax" in about["versions"]
    assert 0 < about["processor_seconds"] <= time.process_time()
    text = (folder / "table.md").read_text("utf-8")
    assert text in capsys.readouterr().out
    assert text == (
        "| estimator    |   k |            reward |  kl | note |\n"
        "| ------------ | --: | ----------------: | --: | ---- |\n"
        "| rloo         |   4 |     0.705 ± 0.029 | 5.5 |      |\n"
        "| raft \\| best |   2 | 0.50 [0.25, 0.55] |     | slow |\n"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234, "1234"),
        (np.int64(1_048_576), "1,048,576"),
        (0.123456, "0.1235"),
        (jnp.float32(0.25), "0.25"),
        (3e-7, "3e-07"),
        (math.nan, "–"),
        (None, "–"),
        (True, "yes"),
        (np.bool_(False), "no"),
        ((0.1, 0.2), "[0.100, 0.200]"),
        ((10.0, -2.0, 22.0), "10 ± 12"),
        ((-0.001234, -0.001334, -0.001134), "-0.00123 ± 0.00010"),
        ((0.5, 0.40, 0.55), "0.500 [0.400, 0.550]"),
        ((0.5, -math.inf, math.inf), "0.5"),
        ((1.0, 1.0, 1.0), "1.0000 ± 0.0000"),
        ("two\nlines", "two lines"),
    ],
)
def test_cells_read_well(value, text):
    assert format_cell(value) == text


def test_no_rows_make_no_table():
    assert markdown_table([]) == ""


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Results cannot be written to .*/file/below \(Not a directory\)"):
        write_table(tmp_path / "file" / "below", ROWS, {})
    with pytest.raises(InputError, match=r"Results cannot be written to .*/file \(File exists\)"):
        open_results(tmp_path / "file")


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    write_table(tmp_path, ROWS, {})
    before = (tmp_path / "table.md").read_text("utf-8")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        write_table(tmp_path, ROWS[:1], {})
    assert (tmp_path / "table.md").read_text("utf-8") == before
    assert len(json.loads((tmp_path / "table.json").read_text("utf-8"))) == 2
