"""What length division does to lengths: against a closed form, enumeration in plain Python, and the course of a run."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.recipes import length_bias as recipe
from rl_jax.errors import InputError
from rl_jax.run.spmd import make_mesh

LENGTH, GROUP = 3, 3
TINY = recipe.Config(
    problems=2,
    counted_length=LENGTH,
    counted_group=GROUP,
    length=8,
    prompts=8,
    updates=80,
    odds=-2.0,
    seeds=2,
)
TASKS = {settled: recipe.make_task(settled, 1, LENGTH) for settled in recipe.SETTLED}
GO, RIGHT, WRONG, END = recipe.GO, recipe.RIGHT, recipe.WRONG, recipe.END
WRITTEN = {  # every completion of up to 3 tokens, and whether it is right
    "last": {
        (RIGHT,): True, (WRONG,): False, (GO, RIGHT): True, (GO, WRONG): False, (GO, GO, RIGHT): True,
        (GO, GO, WRONG): False, (GO, GO, GO): False,
    },
    "first": {
        (RIGHT, END): True, (RIGHT, GO, END): True, (RIGHT, GO, GO): True, (WRONG, END): False,
        (WRONG, GO, END): False, (WRONG, GO, GO): False,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """There are few runs, which eight devices would only compile longer for."""
    monkeypatch.setattr(recipe, "make_mesh", lambda: make_mesh(jax.devices()[:1]))


def completions(task):
    rollout = task.completions
    rows = zip(rollout.completions.tolist(), rollout.completion_mask.tolist(), strict=True)
    return [tuple(itertools.compress(row, mask)) for row, mask in rows]


@pytest.mark.parametrize("settled", recipe.SETTLED)
def test_every_completion_there_is_and_whether_it_is_right(settled):
    task, written = TASKS[settled], WRITTEN[settled]
    assert dict(zip(completions(task), task.right.tolist(), strict=True)) == written
    assert len(task.right) == len(written)  # none of them twice
    assert task.lengths.tolist() == [len(row) for row in completions(task)]
    cut = dict(zip(completions(task), task.completions.truncated.tolist(), strict=True))
    assert {row for row, is_cut in cut.items() if is_cut} == {row for row in written if row[-1] == GO}
    both = recipe.make_task(settled, 2, LENGTH).completions
    assert both.prompts[:, 0].tolist() == [0] * len(written) + [1] * len(written)


@pytest.mark.parametrize("settled", recipe.SETTLED)
def test_measures_are_those_of_the_products_of_token_probabilities(settled):
    task, logits = recipe.make_task(settled, 2, LENGTH), np.random.default_rng(1).normal(size=(2, 3, LENGTH, 4))
    allowed = np.asarray(task.allowed)
    found = dict.fromkeys(((prompt, row) for prompt in range(2) for row in WRITTEN[settled]), 1.0)
    for prompt, row in found:
        for place, token in enumerate(row):
            here = np.exp(logits[prompt, row[0] if place else 0, place]) * allowed[place]
            found[prompt, row] *= here[token] / here.sum()
    assert sum(found.values()) == pytest.approx(2)
    right = {key: p for key, p in found.items() if WRITTEN[settled][key[1]]}
    wrong = {key: p for key, p in found.items() if key not in right}
    lengths = [sum(p * len(row) for (_, row), p in part.items()) / sum(part.values()) for part in (wrong, right)]
    got = jax.jit(recipe.measure)(logits.astype(np.float32), task)
    np.testing.assert_allclose([got[name] for name in recipe.MEASURES], [sum(right.values()) / 2, *lengths], rtol=1e-5)


def test_policy_begins_with_the_odds_and_the_steps_it_is_asked_for():
    table = np.asarray(recipe.init_policy(jax.random.key(0), 400, 6, -3.0)).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(table, [math.log(2), -3.0, 0.0, 0.0], atol=0.05)


def mean_advantages(p, standardise):
    """Of a right and of a wrong completion, over how many of the other G - 1 are right."""
    found = []
    for own in (1, 0):
        total = 0.0
        for others in range(GROUP):
            rewards = np.array([own] + [1] * others + [0] * (GROUP - 1 - others))
            spread = rewards.std(ddof=1) + 1e-4 if standardise else 1.0
            chance = math.comb(GROUP - 1, others) * p**others * (1 - p) ** (GROUP - 1 - others)
            total += chance * (own - rewards.mean()) / spread
        found.append(total)
    return found


@pytest.mark.parametrize(
    ("settled", "name", "standardise", "power"),
    [("last", "grpo", True, 1), ("first", "only / length", False, 1), ("last", "dr_grpo", False, 0)],
)
def test_expected_update_along_the_natural_gradient_is_a_covariance(settled, name, standardise, power):
    """Every distribution can be had, so that the natural gradient changes log p by a / length less its mean."""
    task = TASKS[settled]
    counted = recipe.count(TINY, task, recipe.algorithms()[name])
    for n in range(TINY.problems):
        one = jax.tree.map(lambda x, n=n: x[n], counted)
        p, right, lengths = np.asarray(one.probabilities, float), np.asarray(task.right), np.asarray(task.lengths)
        advantage = np.where(right, *mean_advantages(p @ right, standardise)) / (lengths**power if power else LENGTH)
        np.testing.assert_allclose(one.gradient, (p * advantage) @ one.scores, atol=2e-5)
        change = advantage - p @ advantage
        step = math.sqrt(p @ change**2)
        wrong, chosen = np.where(right, 0, p) / (p @ ~right), np.where(right, p, 0) / (p @ right)
        expected = [
            p @ (right * change),
            *(w @ (lengths * change) - (w @ lengths) * (w @ change) for w in (wrong, chosen)),
        ]
        effects = recipe.effects(one)
        got = [effects["natural gradient"][measure] for measure in recipe.MEASURES]
        np.testing.assert_allclose(got, np.array(expected) / step, atol=2e-3)
        assert (got[1] > 2e-3 and got[2] < -2e-3) if power else max(map(abs, got[1:])) < 2e-3
        along = effects["gradient"]["length of wrong"]
        direction = np.asarray(one.gradient, float) / np.linalg.norm(one.gradient)
        scores = np.asarray(one.scores, float)
        assert along == pytest.approx(sum(w * x * (s @ direction) for w, x, s in zip(
            wrong, lengths - wrong @ lengths, scores, strict=True)), abs=1e-5)  # fmt: skip
        if settled == "first":
            assert along > 5e-4 if power else abs(along) < 1e-4


def test_what_is_compared_differs_in_what_it_says():
    made = recipe.algorithms()
    assert {name: made[name].normalize for name in made} == {
        "grpo": "sequence", "only / length": "sequence", "only / std": "constant", "dr_grpo": "constant",
        "rloo": "completion",
    }  # fmt: skip
    advantages = {name: estimator.advantages.__name__ for name, estimator in made.items()}
    assert advantages["grpo"] == advantages["only / std"] != advantages["dr_grpo"] == advantages["only / length"]
    assert {estimator.kl for estimator in made.values()} == {"none"}


def test_columns_are_means_and_paired_differences():
    rival = {name: np.array([[0.0, 1.0], [0.0, 5.0]]) for name in recipe.MEASURES}
    runs = {name: np.array([[7.0, 3.0], [9.0, 7.0]]) for name in recipe.MEASURES}
    columns = recipe.trained_columns(runs, rival)
    assert columns["accuracy"].value == 5 and columns["length of wrong, before"].value == 8
    assert columns["length of wrong, less dr_grpo"] == pytest.approx((2, 2, 2))
    found = [{"gradient": {"length of wrong": x, "length of right": 0.0, "accuracy": 1.0}} for x in (-1.0, 2.0)]
    columns = recipe.counted_columns(found)
    assert columns["length of wrong, along the gradient"].value == 0.5
    assert columns["problems with wrong ones longer"] == 1


@pytest.mark.slow
def test_recipe_in_miniature(tmp_path, monkeypatch):
    few = {name: recipe.algorithms()[name] for name in ("only / length", "dr_grpo")}
    monkeypatch.setattr(recipe, "algorithms", lambda: few)
    monkeypatch.setattr(recipe, "SETTLED", ("first",))
    recipe.main(dataclasses.replace(TINY, results=tmp_path))
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [(row["settled"], row["algorithm"]) for row in rows] == [("first", name) for name in few]
    assert [row["problems with wrong ones longer"] for row in rows] == [2, 0]
    longer, usual = (row["length of wrong"]["value"] - row["length of wrong, before"]["value"] for row in rows)
    assert longer > 0.3 > abs(usual)
    assert rows[0]["length of wrong, less dr_grpo"]["value"] == pytest.approx(longer - usual)
    for name, found in json.loads((tmp_path / "runs.json").read_text())["first"].items():
        accuracy = np.array(found["accuracy"])
        assert accuracy.shape == (2, TINY.updates + 1) and (accuracy[:, -1] > accuracy[:, 0] + 0.1).all(), name
    assert (tmp_path / "settled_first.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 1}, "two seeds"),
        ({"length": 1}, "two tokens"),
        ({"group_size": 1}, "groups of two"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"counted_length": 30}, "groups of 3"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        recipe.main(dataclasses.replace(TINY, results=tmp_path / "there", **changes))
    assert not (tmp_path / "there").exists()


def test_what_is_under_a_false_mask_is_not_rewarded():
    rollout = recipe.make_task("last", 1, 3).completions
    hidden = jnp.where(rollout.completion_mask, rollout.completions, recipe.RIGHT)
    np.testing.assert_array_equal(
        recipe.rewards(dataclasses.replace(rollout, completions=hidden)), recipe.rewards(rollout)
    )
