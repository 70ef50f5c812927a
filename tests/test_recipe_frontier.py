"""The frontier by bisection, the reward by hand, and the recipe that trains policies to it."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.recipes import frontier as recipe
from rl_jax.errors import InputError
from rl_jax.reinforce.exact import optimal_policy

SMALL = recipe.Config(
    kl_coefficients=(0.5, 0.25, 0.15),
    best_of=(2, 8),
    path=(10, 40),
    seeds=2,
    prompts=2,
    length=2,
    group_size=64,
    updates=80,
    learning_rate=0.2,
)


def test_sentiment_counts_positive_tokens_less_negative_ones():
    # 0, and then 10 11 12 13 20 21 22 23 30 31 32 33.
    rollout = recipe.every_completion(dataclasses.replace(SMALL, prompts=1))
    halves = 2 * np.asarray(recipe.sentiment(rollout))
    np.testing.assert_array_equal(halves, [0, 1, 2, 0, 1, -1, 0, -2, -1, 0, 1, -1, 0])


def two_outcomes(p, kl):
    """The largest q whose KL from p is no more than `kl`, by bisection."""
    low, high = p, 1 - 1e-12
    for _ in range(200):
        q = (low + high) / 2
        if q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)) < kl:
            low = q
        else:
            high = q
    return low


def test_frontier_is_the_most_reward_at_a_kl():
    chances, kls = np.array([0.2, 0.03]), np.array([[0.05, 0.4], [0.8, 2.0]])
    logprobs = jnp.log(jnp.stack([1 - chances, chances], axis=1))
    rewards = jnp.array([[0.0, 1.0]])
    by_coefficient = jax.vmap(lambda row, beta: optimal_policy(row[None], rewards, beta)[1], (None, 0))
    objective = np.stack([by_coefficient(row, recipe.COEFFICIENTS) for row in logprobs])
    expected = [[two_outcomes(p, kl) for p, kl in zip(chances, row, strict=True)] for row in kls]
    np.testing.assert_allclose(recipe.frontier_reward(objective, kls), expected, rtol=1e-3)


def test_gap_is_a_share_of_what_the_frontier_gains():
    objective = np.stack([np.full(600, 2.0), np.full(600, 4.0)])  # a frontier that is nearly flat
    places = recipe.compare(np.array([[1.0, 0.0]]), np.array([[1.5, 0.0]]), objective, np.array([1.0, 0.0]))
    np.testing.assert_allclose(places.most, [[2.001, 4.0]])
    np.testing.assert_allclose(places.gap, [[0.501 / 1.001, np.nan]])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    recipe.main(dataclasses.replace(SMALL, results=folder))
    return folder


def test_trained_policies_come_near_the_frontier_and_none_is_above(results):
    rows = json.loads((results / "table.json").read_text())
    trained, course, best = rows[:3], rows[3:6], rows[6:]
    assert [row["policy"] for row in course] == ["RLOO, 10 updates", "RLOO, 40 updates", "RLOO"]
    assert [row["policy"] for row in best] == ["best of 2", "best of 8"]
    for row in trained:
        assert row["KL, nats"]["value"] == pytest.approx(row["optimum's KL"], rel=0.15)
        assert 0 < row["gap, %"]["value"] < 3
    for above, row in itertools.pairwise(trained):
        assert row["beta"] * 0.95 < row["slope from the last"] < above["beta"] * 1.05
    assert course[0]["gap, %"]["value"] > max(row["gap, %"]["value"] for row in trained)
    assert course[0]["KL, nats"]["value"] < course[1]["KL, nats"]["value"] < course[2]["KL, nats"]["value"]
    for row in best:
        assert row["KL, nats"]["value"] < math.log(8) - 7 / 8 + 1e-6
    for row in rows:
        assert row["reward"]["value"] <= row["most at that KL"] + 1e-6
    settings = json.loads((results / "settings.json").read_text())["settings"]
    assert settings["least_gap"] > -1e-5
    assert (results / "frontier.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_coefficients": ()}, "from 0.001 to 30"),
        ({"kl_coefficients": (0.1, 0.0)}, "from 0.001 to 30"),
        ({"vocab_size": 2}, "Three tokens"),
        ({"group_size": 1}, "groups of 2"),
        ({"seeds": 1}, "two seeds"),
        ({"best_of": (0,)}, "best of 1"),
        ({"path": (50, 3000)}, "from 1 to 2000"),
        ({"length": 30}, "no more than 20000"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, change, message):
    config = dataclasses.replace(recipe.Config(results=tmp_path / "there"), **change)
    with pytest.raises(InputError, match=message):
        recipe.main(config)
    assert not (tmp_path / "there").exists()
