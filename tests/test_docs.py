"""README and docs: their programs run and do what they say, their links lead somewhere, their tables are ours."""

import importlib
import inspect
import re
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.reinforce.composition import Estimator
from rl_jax.reinforce.estimators import ESTIMATORS
from tests.pages import FENCE, PAGES, ROOT, defined, programs, prose, slug, spans
from tests.test_house import FLOORS

README, MATHEMATICS, DESIGN = (PAGES[page] for page in ("README.md", "docs/mathematics.md", "docs/design.md"))
FRAGMENT = "state, n = apply_gradients"  # the first screen of the README, which is the body of a program further down
TOLD = ("README.md", "docs/write_your_own.md")  # what their programs do is held against what is said of it
USERS = ("rewards.py",)  # files that are the reader's
FOLDERS = ("", "rl_jax", "experiments", "experiments/recipes", "tests", "docs")
SYMBOLS = {
    "baseline_decay": "d",
    "reward_temperature": r"\tau",
    "weight_cap": r"\mathrm{cap}",
    "discount": r"\gamma",
    "gae_lambda": r"\lambda",
    "clip_low": r"\epsilon_l",
    "clip_high": r"\epsilon_h",
    "dual_clip": "D",
    "ratio_cap": r"\mathrm{cap}",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Whatever a program writes, it writes there."""
    monkeypatch.chdir(tmp_path)


def run_programs(page: str) -> dict:
    """The names that a page's programs have left, which run one after another."""
    names: dict = {}
    for number, code in enumerate(code for code in programs(PAGES[page]) if FRAGMENT not in code):
        exec(compile(code, f"{page}, program {number}", "exec"), names)
    return names


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if programs(text) and name not in TOLD])
def test_programs_run(page):
    run_programs(page)


def test_programs_of_the_readme_do_what_it_says():
    names = run_programs("README.md")
    assert names["exclaims"]("", "Go! Now. Go!") == 2 / 3
    assert names["right"]("", "It is 7.", {"answer": "7"}) == 1
    rollout = type("Rollout", (), {"completion_mask": np.array([[True, True], [True, False]])})
    assert names["brief"](rollout).tolist() == [-2, -1]
    key = names["step_key"](0, names["Purpose"].SAMPLE, 0)
    params = names["init_params"](names["step_key"](0, names["Purpose"].INIT), names["config"])
    state = names["init_state"](params, names["optimizer"], kl_coefficient=0.0)
    _, first = names["step"](state, key, names["prompts"], names["prompts"] > 0)
    assert float(names["reward"]) > float(first) + 3, "tokens a completion"


def test_the_first_screen_is_the_body_of_the_program_below():
    short = next(code for code in programs(README) if FRAGMENT in code)
    whole = next(code for code in programs(README) if "init_state(" in code)
    whole = whole.replace("metrics =", "m =").replace("state, _ =", "state, n =")
    calls = [re.sub(r"\s+", " ", line) for line in short.strip().splitlines()]
    body = re.sub(r"[ ]+", " ", whole)
    assert all(call in body for call in calls)


def test_rewards_of_the_page_are_as_described():
    names = run_programs("docs/write_your_own.md")
    assert names["right"]("", "2 + 5 is 7", {"answer": "7"}) == 1 and names["right"]("", "7 or 8", {"answer": "7"}) == 0
    assert [names["shorter"]("", "a", other) for other in ("", "b", "bc")] == [0, 0.5, 1]
    assert len(Path("sums.jsonl").read_text().splitlines()) == 400


def test_readme_has_the_table_of_the_library():
    lines = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", README, re.MULTILINE)
    assert [line for line in lines if line[0] in ESTIMATORS] == [
        (name, row.equation, row.paper) for name, row in ESTIMATORS.items()
    ]


def described(name: str, row: Estimator) -> str:
    """The line of docs/mathematics.md that is an estimator's."""

    def function(fn) -> str:
        options = fn.keywords if isinstance(fn, partial) else {}
        called = f"`{fn.func.__name__ if isinstance(fn, partial) else fn.__name__}`"
        return ", ".join([called, *(f"${SYMBOLS[option]} = {value:g}$" for option, value in options.items())])

    clipped = f", $\\kappa = {row.value_clip:g}$" if "value_clip" in row.options else ""
    parts = {
        "advantages whitened": row.whiten_advantages,
        f"$V${clipped}": row.critic,
        f"overlong, $u = {row.overlong_share:g}$": row.overlong_share,
        f"groups of equal rewards replaced, up to {row.sampling_rounds - 1} times": row.sampling_rounds > 1,
    }
    kl = f"`{row.kl}`" if row.kl == "none" else f"`{row.kl}`, {row.kl_coefficient:g}"
    cells = [f"`{name}`", function(row.advantages), function(row.loss), f"`{row.normalize}`", kl, str(row.updates)]
    return f"| {' | '.join([*cells, '; '.join(part for part, there in parts.items() if there)])} |"


@pytest.mark.parametrize("name", ESTIMATORS)
def test_mathematics_has_every_estimator(name):
    assert described(name, ESTIMATORS[name]) in MATHEMATICS.splitlines()


def test_mathematics_tells_what_no_estimator_changes():
    assert {row.value_coefficient for row in ESTIMATORS.values()} == {0.1}, "nu"
    assert {row.entropy_coefficient for row in ESTIMATORS.values()} == {0.0}, "eta"
    assert {(row.reward_scale, row.reward_clip, row.whiten_rewards) for row in ESTIMATORS.values()} == {
        (1.0, jnp.inf, False)
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for text, link in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(PAGES[page])):
        if link.startswith(("http://", "https://")):
            continue
        place, _, anchor = link.partition("#")
        path = (ROOT / page).parent / place if place else ROOT / page
        assert path.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(path.read_text("utf-8")), re.MULTILINE)
            assert anchor in map(slug, headings), link
        if path.suffix == ".py" and (name := re.fullmatch(r"`(\w+)`", text)):
            assert name[1] in defined(path), f"{name[1]} in {link}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    for span in spans(PAGES[page]):
        if re.fullmatch(r"[\w./-]+\.py", span) and span not in USERS and "NAME" not in span:
            alone = "/" not in span and list(ROOT.glob(f"[!.b]*/**/{span}"))
            assert alone or any((ROOT / folder / span).is_file() for folder in FOLDERS), span


@pytest.mark.parametrize("page", PAGES)
def test_mathematics_survives_markdown(page):
    """Outside blocks Markdown takes backslashes before punctuation, stars and some underscores for its own."""
    for line in FENCE.sub("", PAGES[page]).splitlines():
        if not line.startswith("    "):
            for inline in re.findall(r"\$[^$`]+\$", re.sub(r"`[^`]*`", "", line)):
                assert not re.search(r"\\[^a-zA-Z]|[})\]]_|\*|<[a-z]", inline), inline


def test_design_has_the_floors_of_the_house():
    drawn = [tuple(line.split()) for line in fenced(DESIGN, "experiments\n").splitlines()]
    assert drawn == [tuple(room.removeprefix("rl_jax.") for room in floor) for floor in FLOORS[:-1]]


def test_contracts_are_those_of_the_functions():
    for line in fenced(DESIGN, "generate(").splitlines():
        name, arguments = re.match(r"(\w+)\((.*?)\) -> ", line).groups()
        named = re.sub(r" \[[^\]]*\]", "", arguments).split(", ")
        (path,) = (path for path in ROOT.glob("rl_jax/**/*.py") if f"\ndef {name}(" in path.read_text("utf-8"))
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        parameters = inspect.signature(getattr(module, name)).parameters
        assert [parameter for parameter in parameters if parameter in named] == named, name
        needed = {p for p, about in parameters.items() if about.default is inspect.Parameter.empty}
        assert needed <= set(named), name


def fenced(page: str, beginning: str) -> str:
    """The block of text of a page that begins so."""
    return next(block for _, block in FENCE.findall(page) if block.startswith(beginning))
