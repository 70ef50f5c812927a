"""Bias and variance of leaving one out, by loops over every group; and the recipe that tabulates them."""

import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest

from experiments.recipes import leave_one_out as recipe
from experiments.recipes.enumerable import make_problem
from rl_jax.errors import InputError
from rl_jax.keys import Purpose, step_key

SHAPE = (2, 2)
COMPLETIONS = ((0,), (1, 0), (1, 1))
NODES = {(): 0, (1,): 2}  # 0 ends a completion


def plain_problem(seed):
    """Probability, reward and score of each completion of the first prompt, by finite differences."""
    problem = jax.jit(make_problem, static_argnums=(1, 2))(step_key(seed, Purpose.INIT), *SHAPE, 0.0, 0.0, 0.0)
    table = np.asarray(problem.params["policy"], np.float64)
    rewards = [float(problem.rewards[0, sum(token * 2**c for c, token in enumerate(y))]) for y in COMPLETIONS]

    def logprob(table, y):
        rows = [(table[0, NODES[y[:c]]], token) for c, token in enumerate(y)]
        return sum(row[token] - math.log(np.exp(row).sum()) for row, token in rows)

    scores = np.zeros((3, table.size))
    for i, column in itertools.product(range(table.size), range(3)):
        step = np.zeros(table.size)
        step[i] = 1e-5
        ends = [logprob(table + x.reshape(table.shape), COMPLETIONS[column]) for x in (step, -step)]
        scores[column, i] = (ends[0] - ends[1]) / 2e-5
    return np.exp([logprob(table, y) for y in COMPLETIONS]), np.array(rewards), scores


def plain_estimates(p, rewards, scores, size):
    """Mean of the two gradients, and the variance of the first, over every group."""
    leave_one_out, group_mean, square = 0.0, 0.0, 0.0
    for group in itertools.product(range(3), repeat=size):
        weight = math.prod(p[y] for y in group)
        others = [sum(rewards[y] for j, y in enumerate(group) if j != i) for i in range(size)]
        baselines = [total / max(size - 1, 1) for total in others]
        gradient = sum((rewards[y] - b) * scores[y] for y, b in zip(group, baselines, strict=True)) / size
        mean = sum(rewards[y] for y in group) / size
        leave_one_out += weight * gradient
        group_mean += weight * sum((rewards[y] - mean) * scores[y] for y in group) / size
        square += weight * gradient @ gradient
    return leave_one_out, group_mean, square - leave_one_out @ leave_one_out


def test_sums_and_closed_forms_are_those_of_loops():
    size = 3
    found = recipe.make_sweep(recipe.make_run(SHAPE, size, None), recipe.make_mesh(jax.devices()[:1]))(
        {"seed": np.arange(2)}
    )
    found = {name: np.asarray(x, np.float64) for name, x in found.items()}
    for seed in range(2):
        p, rewards, scores = plain_problem(seed)
        leave_one_out, group_mean, variance = plain_estimates(p, rewards, scores, size)
        gradient = (p * rewards) @ scores
        np.testing.assert_allclose(leave_one_out, gradient, atol=1e-9)
        np.testing.assert_allclose(found["gradient"][seed], gradient, atol=1e-5)
        np.testing.assert_allclose(found["leave_one_out"][seed], gradient, atol=1e-5)
        np.testing.assert_allclose(found["group_mean"][seed], group_mean, atol=1e-5)
        np.testing.assert_allclose(group_mean, (size - 1) / size * gradient, atol=1e-9)
        np.testing.assert_allclose(found["variance"][seed], variance, rtol=1e-4)
        np.testing.assert_allclose(recipe.completion_variance(found, size)[seed], size * variance, rtol=1e-4)
        for name, baseline in (("value", p @ rewards), ("none", 0.0)):
            one = p @ np.square((rewards - baseline)[:, None] * scores).sum(axis=1) - gradient @ gradient
            np.testing.assert_allclose(found[name][seed], one, rtol=1e-4)


def test_ratios_are_of_sums_over_problems():
    found = {
        "gradient": np.array([[3.0, 4.0], [0.0, 1.0]]),
        "leave_one_out": np.array([[3.0, 4.5], [7.0, 1.0]]),
        "group_mean": np.array([[1.5, 2.0], [0.0, 0.5]]),
        "variance": np.array([6.0, 2.0]),
        "value": np.array([10.0, 3.0]),
        "none": np.array([40.0, 25.0]),
        "excess": np.array([2.0, 1.0]),
    }
    shares = recipe.ratios(found, 2)
    assert {name: share.value for name, share in shares.items()} == pytest.approx(
        {
            "bias": 2 / 26,
            "group mean": 0.5,
            "group": 8 / 13,
            "equal": 16 / 13,
            "closed form": 16 / 13,
            "prompts": 2 * (8 + 26) / 13,
            "none": 5.0,
        }
    )
    assert shares["group mean"].high - shares["group mean"].low == pytest.approx(0, abs=1e-12)
    # Residuals from the ratio, 6 - 8/13 10 and 2 - 8/13 3, are -2/13 and 2/13; Student's quantile of 1 is 12.7062.
    half = 12.7062 * (2 / 13) * math.sqrt(2) / 6.5 / math.sqrt(2)
    assert shares["group"].high - shares["group"].value == pytest.approx(half, rel=1e-4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    recipe.main(recipe.Config(shapes=(SHAPE,), group_sizes=(16, 1), completions=65_536, problems=4, results=folder))
    return folder


def test_recipe_finds_no_bias_and_the_variance_of_the_closed_form(results):
    one, sixteen = json.loads((results / "table.json").read_text())
    assert [row["G"] for row in (one, sixteen)] == [1, 16]
    assert [row["groups"] for row in (one, sixteen)] == ["every, 3", "4,096 sampled"]
    for row in (one, sixteen):
        half = max(row["bias along, %"]["high"] - row["bias along, %"]["low"], 2e-3) / 2
        assert abs(row["bias along, %"]["value"]) < 2 * half < 20
        assert row["group mean, along"]["value"] == pytest.approx(row["(G-1)/G"], abs=0.03)
        assert row["equal completions"]["value"] == pytest.approx(row["its closed form"]["value"], rel=0.05)
        assert row["variance, a group"]["value"] == pytest.approx(row["equal completions"]["value"] / row["G"])
        assert row["a prompt each"]["value"] > row["equal completions"]["value"]
    assert one["below no baseline, %"] == 0 and sixteen["below no baseline, %"] == 100
    assert 1 < sixteen["equal completions"]["value"] < 1.3 < one["equal completions"]["value"]
    assert (results / "leave_one_out.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((results / "settings.json").read_text())["settings"]["seconds"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": ()}, "one shape"),
        ({"group_sizes": (0,)}, "group size of at least 1"),
        ({"problems": 1}, "two problems"),
        ({"shapes": ((1, 3),)}, "two are the least"),
        ({"shapes": ((3, 30),)}, "no more than 20000"),
        ({"completions": 1000}, "at least 131072"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, change, message):
    config = dataclasses.replace(recipe.Config(results=tmp_path / "there"), **change)
    with pytest.raises(InputError, match=message):
        recipe.main(config)
    assert not (tmp_path / "there").exists()
