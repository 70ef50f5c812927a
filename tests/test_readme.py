"""The README's programs run, and do what it says of them."""

import re
from pathlib import Path

import numpy as np
import tyro

from experiments import pipeline
from rl_jax.reinforce.estimators import ESTIMATORS

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(words: str) -> str:
    return next(code for code in BLOCKS if words in code)


def test_the_pure_functions_learn_to_be_brief():
    code = block("init_state(")
    names: dict = {}
    exec(code.replace("range(30)", "range(1)"), names)
    before = float(names["reward"])
    exec(code, names)
    assert float(names["reward"]) > before + 3, "tokens a completion"


def test_the_first_screen_is_the_body_of_that_program():
    short, whole = (
        block("state, n"),
        block("init_state(").replace("metrics =", "m =").replace("state, _ =", "state, n ="),
    )
    calls = [re.sub(r"\s+", " ", line) for line in short.strip().splitlines()]
    body = re.sub(r"[ ]+", " ", whole)
    assert all(call in body for call in calls)


def test_the_rewards_are_rewards():
    names: dict = {}
    exec(block("def exclaims"), names)
    assert names["exclaims"]("", "Go! Now. Go!") == 2 / 3
    exec(block("def brief"), names)
    rollout = type("Rollout", (), {"completion_mask": np.array([[True, True], [True, False]])})
    assert names["brief"](rollout).tolist() == [-2, -1]


def test_the_table_of_estimators_is_that_of_the_library():
    lines = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", README, re.MULTILINE)
    assert [line for line in lines if line[0] in ESTIMATORS] == [
        (name, row.equation, row.paper) for name, row in ESTIMATORS.items()
    ]


def test_every_option_in_a_command_exists():
    config = pipeline.Config()
    for words in re.findall(r"experiments/pipeline.py (--.*)", README):
        words = words.split("#")[0].split()
        if "rewards:exclaims" not in words:
            assert tyro.cli(pipeline.Config, args=words) != config
