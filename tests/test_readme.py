"""The README's programs run, and do what it says of them."""

import re
from pathlib import Path

import numpy as np

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text("utf-8"), re.DOTALL)


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
