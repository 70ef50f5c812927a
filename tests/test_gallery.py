"""The gallery: what is on the page is what the committed results say, and verdicts follow from tables."""

import json
import re
from pathlib import Path

import pytest

from experiments import claims_exact as exact
from experiments import claims_learned as learned
from experiments import gallery
from experiments.claims import above, column, falls, find, holds, show
from experiments.gallery import CLAIMS, hold, section, short_table, with_table
from experiments.results import RECIPES
from rl_jax.errors import InputError

ROOT = Path(__file__).parents[1]


def interval(value, half):
    return {"value": value, "low": value - half, "high": value + half}


def write(folder, claim, rows):
    """Results of a recipe, as `write_table` leaves them."""
    folder = folder / claim.recipe
    folder.mkdir(parents=True, exist_ok=True)
    about = {"processor_seconds": 150.0, "device": "abacus", "versions": {"jax": "1.2"}}
    for name, value in (("table", rows), ("settings", about)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def parts(folder, claim, rows):
    """Which parts of a claim hold of a table."""
    write(folder, claim, rows)
    return list(hold(claim, folder).parts.values())


def test_page_is_that_of_the_committed_results():
    assert (ROOT / "docs/results.md").read_text("utf-8") == gallery.gallery(ROOT / "results"), (
        "python experiments/gallery.py writes it anew"
    )


def test_readme_has_the_short_table():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert readme == with_table(readme, short_table(ROOT / "results")), "python experiments/gallery.py writes it anew"
    page = f"before\n{gallery.BEGIN}\nold\n{gallery.END}\nafter"
    assert with_table(page, "| new |\n") == f"before\n{gallery.BEGIN}\n\n| new |\n\n{gallery.END}\nafter"
    assert with_table("no marks", "| new |\n") == "no marks"


def test_every_recipe_has_a_claim_and_every_result_its_figure():
    assert {claim.recipe for claim in CLAIMS} == set(RECIPES)
    for claim in CLAIMS:
        assert (ROOT / f"experiments/recipes/{claim.recipe}.py").exists() and claim.parts
        folder = ROOT / "results" / claim.recipe
        if folder.exists():
            for name in (claim.figure, f"{claim.figure}.json", "table.md"):
                assert (folder / name).exists(), name
            told = (folder / "settings.json").read_text("utf-8")
            assert not re.search(r'": "/', told), "a path of somebody's machine"


def test_cells_are_found_and_shown():
    rows = [{"a": 1, "b": interval(0.5, 0.01)}, {"a": 2, "b": interval(0.7, 0.3), "c": 3}]
    assert find(rows, a=2) == rows[1:] and column(rows, "b") == [0.5, 0.7] and column(rows, "c", a=2) == [3]
    assert show(rows, "b", 100, a=1) == "50.0 ± 1.0" and show(rows, "c", a=2) == "3"
    with pytest.raises(LookupError, match="no row has"):
        find(rows, a=3)
    assert above(rows, "b", 0.3) and not above(rows, "b", 0.45)
    assert holds(rows, "b", 0.5) and not holds(rows, "b", 0.6) and holds(rows, "b", 0.6, a=2)
    assert falls([3, 2, 1]) and not falls([3, 3]) and falls([1])


LINE = {"E[reward] at the start": interval(-2, 0.1)}
LINEAR = [
    LINE
    | {"gradient": name, "E[reward] at the end": interval(-0.3, 0.02), "variance at the end": interval(variance, 1)}
    for name, variance in (("score function", 9), ("pathwise", 5))
]


@pytest.mark.parametrize(
    ("reward", "variance", "verdict", "said"),
    [
        (-0.3, 5, "reproduced", "both come near the optimum: yes; the pathwise gradient has less noise: yes"),
        (-0.3, 8, "partly", "both come near the optimum: yes; the pathwise gradient has less noise: no"),
        (-0.4, 8, "not reproduced", "both come near the optimum: no; the pathwise gradient has less noise: no"),
    ],
)
def test_verdict_follows_from_the_table(tmp_path, reward, variance, verdict, said):
    row = LINEAR[1] | {"E[reward] at the end": interval(reward, 0.01), "variance at the end": interval(variance, 1)}
    write(tmp_path, exact.LINEAR, [LINEAR[0], row])
    held = hold(exact.LINEAR, tmp_path)
    assert held.verdict == verdict
    text = section(held)
    assert said in re.sub(r"\s+", " ", text) and f"**{verdict.capitalize()}:**" in text
    assert f"{reward:.3f} ± 0.010 pathwise" in re.sub(r"\s+", " ", text)
    assert "2.5 minutes of processor time, abacus, JAX 1.2" in text
    assert "![REINFORCE" in text and "(../results/linear_policy/learning.png)" in text
    line = next(line for line in short_table(tmp_path).splitlines() if "linear_policy.py" in line)
    assert line.split(" | ")[-2:] == [verdict, "`python experiments/recipes/linear_policy.py` |"]


def test_less_than_half_is_not_partly():
    for count, verdict in ((0, "not reproduced"), (1, "not reproduced"), (2, "partly"), (3, "reproduced")):
        held = gallery.Held(exact.LINEAR, "", {str(n): n < count for n in range(3)}, {})
        assert held.verdict == verdict


def test_what_has_not_run_is_told(tmp_path):
    held = hold(exact.LINEAR, tmp_path)
    assert held.verdict == "not run yet" and not held.parts
    assert "**Not run yet**" in section(held) and ".png" not in section(held)
    assert short_table(tmp_path).count("not run yet") == len(CLAIMS)


@pytest.mark.parametrize("damage", ["[]", "{", '[{"gradient": "pathwise"}]', "null"])
def test_table_that_is_not_the_recipes_is_refused(tmp_path, damage):
    (write(tmp_path, exact.LINEAR, LINEAR) / "table.json").write_text(damage)
    with pytest.raises(InputError, match=r"linear_policy is not what linear_policy writes .*--only linear_policy"):
        hold(exact.LINEAR, tmp_path)


def test_parts_about_gradients(tmp_path):
    def rows(bias=0.0, slope=-0.5, plain=3.7):
        line = {"bias along, %": bias, "across, %": 0.0, "error slope": slope, "variance": 1.9}
        every = [line | {"estimator": name} for name in exact.UNBIASED]
        return [every[0] | {"variance": plain}, *every[1:]]

    assert parts(tmp_path, exact.THEOREM, rows()) == [True, True, True]
    assert parts(tmp_path, exact.THEOREM, rows(bias=-0.1, slope=-0.4, plain=1.8)) == [False, False, False]


def test_parts_about_groups(tmp_path):
    def rows(off=0.0, share=0.0, largest=1.1):
        line = {"completions there are": 7, "furthest off, %": off}
        variances = {1: 3.0, 2: 2.0, 4: largest}
        return [
            line
            | {"G": g, "groups": "every, 7" if g < 4 else "9 sampled", "equal completions": interval(v, 0.1)}
            | {"group mean, along": interval((g - 1) / g + share, 0), "(G-1)/G": (g - 1) / g}
            for g, v in variances.items()
        ]

    assert parts(tmp_path, exact.LEAVE_ONE_OUT, rows()) == [True] * 4
    assert parts(tmp_path, exact.LEAVE_ONE_OUT, rows(0.5, 0.01, 3.5)) == [False] * 4
    assert parts(tmp_path, exact.LEAVE_ONE_OUT, rows(largest=2.5)) == [True, True, True, False]


def test_parts_about_the_frontier(tmp_path):
    def rows(gap=1.0, slope=2.0, most=0.9):
        line = {"policy": "RLOO", "KL, nats": interval(1, 0), "reward": interval(0.8, 0), "most at that KL": most}
        line |= {"gap, %": interval(gap, 1)}
        slopes = [{"beta": 1.0}, {"beta": 0.5, "slope from the last": 3.0}, {"beta": 0.1, "slope from the last": slope}]
        return [line | each for each in slopes] + [line | {"beta": 0.0, "gap, %": interval(50, 1)}]

    assert parts(tmp_path, exact.FRONTIER, rows()) == [True] * 3
    assert parts(tmp_path, exact.FRONTIER, rows(6, 4, 0.7)) == [False] * 3


def test_parts_about_a_steered_coefficient(tmp_path):
    def rows(off=3.0, end=0.1, fixed=1.0):
        line = {"coefficient": "steered to 6 nats", "furthest seed off target, %": off}
        line |= {"KL at the end, nats": interval(6, 0.1)}
        steered = [line | {"start": s, "coefficient at the end": interval(e, 0)} for s, e in ((0.1, 0.1), (1, end))]
        kls = [{"coefficient": "fixed", "start": 0.1, "KL at the end, nats": interval(kl, 0)} for kl in (fixed, 9)]
        return steered + kls

    assert parts(tmp_path, exact.ADAPTIVE, rows()) == [True] * 3
    assert parts(tmp_path, exact.ADAPTIVE, rows(12, 0.2, 8)) == [False] * 3


def test_parts_about_length(tmp_path):
    def rows(longer=1.0, accuracy=0.0, end=5.0):
        line = {"settled": "last", "accuracy, less dr_grpo": interval(accuracy, 0.01)}
        line |= {"length of wrong": interval(end, 1), "length of wrong, before": interval(6, 1)}
        line |= {"length of wrong, less dr_grpo": interval(longer, 0.5)}
        return [line | {"algorithm": name} for name in ("grpo", "only / length", "dr_grpo")]

    assert parts(tmp_path, exact.LENGTH_BIAS, rows()) == [True] * 4
    assert parts(tmp_path, exact.LENGTH_BIAS, rows(0.4, 0.1, 7)) == [False] * 4


def test_parts_about_an_order_of_estimators(tmp_path):
    order = ("RLOO k=4", "RLOO k=2", "RAFT k=4", "RAFT k=2", learned.BASELINE, "REINFORCE", "PPO")

    def rows(names):
        found = []
        for task in ("walks", "bandit"):
            for place, name in enumerate(names):
                mild, hard = interval(90 - 12 * place, 5), interval(50 - 8 * place, 5)  # a share that falls, not a gap
                conditions = {"noise 0": mild, "noise 3": hard, "kl coefficient 0.1": mild, "kl coefficient 1": hard}
                found.append({"task": task, "estimator": name, learned.WAY: interval(9 - place, 5)} | conditions)
        return found

    assert parts(tmp_path, learned.COMPARISON, rows(order)) == [True] * 7
    assert parts(tmp_path, learned.COMPARISON, rows(order[::-1])) == [False] * 7
    on_one_task = rows(order)[: len(order)] + rows(order[::-1])[len(order) :]
    assert parts(tmp_path, learned.COMPARISON, on_one_task) == [False] * 7


def test_parts_about_overoptimization(tmp_path):
    def rows(last=-1.0, form=0.2, bs=(0.4, 0.3), lead=0.0):
        line = {"by": "RL", "highest gold": interval(1, 0.2), "last gold": interval(last, 0.3)}
        line |= {"last proxy": interval(2, 0.1), "error beyond, form": form, "error beyond, line": 1.0}
        every = [line | {"varied": name, "b": interval(b, 0.1)} for name in ("size", "data") for b in bs]
        prices = [{"gold at the same d, less the usual": each} for each in (None, interval(lead, 0.1))]
        return every + [line | {"varied": "KL coefficient"} | price for price in prices]

    assert parts(tmp_path, learned.OVEROPTIMIZATION, rows()) == [True] * 5
    assert parts(tmp_path, learned.OVEROPTIMIZATION, rows(1.5, 2, (0.3, 0.4), 0.2)) == [False] * 5


def test_parts_about_scaling(tmp_path):
    def rows(slope=1.0, bend=0.0):
        cells = {learned.DOUBLING: interval(slope, 0.5), learned.BEND: interval(bend, 0.1)}
        sizes = [{"width": name, "all": cells[name]} for name in cells]
        return [{"width": "all", **cells}, *sizes]

    assert parts(tmp_path, learned.SCALING, rows()) == [True] * 4
    assert parts(tmp_path, learned.SCALING, rows(0.4, 0.2)) == [False] * 4


def test_parts_about_people(tmp_path):
    def rows(wins):
        judges = {f"wins by {name}": interval(wins, 0.1) for name in ("VADER", "ridge, other ratings")}
        return [{"seed": "0", "KL, nats": interval(9, 1)}, {"seed": "all", **judges}]

    assert parts(tmp_path, learned.HUMAN, rows(0.9)) == [True] * 2
    assert parts(tmp_path, learned.HUMAN, rows(0.55)) == [False] * 2


def test_parts_about_answers_that_can_be_checked(tmp_path):
    def rows(after=0.9, wrong=20.0, dr_wrong=15.0, dr_accuracy=0.9):
        found = {"before RL": ("", 0.3, 16.0), "rloo": ("all", after, 0.0)}
        found |= {"grpo": ("all", 0.9, wrong), "dr_grpo": ("all", dr_accuracy, dr_wrong)}
        return [
            {"policy": name, "seed": seed, "length of wrong": length}
            | {column: interval(share, 0.05) for column in ("accuracy", "greedy accuracy")}
            for name, (seed, share, length) in found.items()
        ]

    assert parts(tmp_path, learned.VERIFIABLE, rows()) == [True]
    assert parts(tmp_path, learned.VERIFIABLE, rows(after=0.35)) == [False]
    assert parts(tmp_path, learned.VERIFIABLE_LENGTH, rows()) == [True] * 3
    assert parts(tmp_path, learned.VERIFIABLE_LENGTH, rows(17, 17, 18, 0.5)) == [False] * 3


@pytest.mark.parametrize("claim", [learned.DIALOGUE, learned.STORY], ids=lambda claim: claim.recipe)
def test_parts_about_writing(tmp_path, claim):
    def rows(wins, after, copied):
        near = learned.NEAR_PERSON if claim is learned.DIALOGUE else learned.NEAR_PASSAGE
        judged = [f"wins by {name}" for name in ("the reward", learned.FIT, near)]
        measures = ("relevance", "specificity", "coherence", "tone", "KL, nats")
        every = [{"measure": name, "before": None, "after": interval(wins, 0.1)} for name in judged]
        every += [{"measure": name, "before": interval(0.5, 0.1), "after": interval(after, 0.1)} for name in measures]
        warning = {"before": interval(0.9, 0.1), "without originality": interval(copied, 0.1)}
        return [*every, {"measure": "originality", **warning}]

    assert set(parts(tmp_path, claim, rows(0.7, 0.71, 0.5))) == {True}
    assert set(parts(tmp_path, claim, rows(0.55, 0.69, 0.8))) == {False}
