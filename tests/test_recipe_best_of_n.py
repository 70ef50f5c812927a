"""The closed form of the best of n against every tuple of n outcomes, and the recipe that tabulates it."""

import dataclasses
import itertools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.recipes import best_of_n as recipe
from rl_jax.best_of_n import best_of_n_kl_bound
from rl_jax.errors import InputError
from rl_jax.evaluation import mean_interval
from rl_jax.reinforce.exact import best_of_n_logprobs

TASK = recipe.Task(
    np.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.0, 0.5]]), np.array([[1.0, 2.0, 2.0, -1.0], [5.0, 1.0, 7.0, 1.0]])
)

SMALL = recipe.Config(prompts=2, vocab_size=3, length=3)


def every_tuple(probabilities, rewards, n):
    """The KL, the win rate and the reward of the best of n, a tie going to the first, over every n outcomes."""
    best = np.zeros(len(rewards))
    for drawn in itertools.product(range(len(rewards)), repeat=n):
        best[max(drawn, key=lambda i: rewards[i])] += math.prod(probabilities[i] for i in drawn)
    kl = sum(b * math.log(b / p) for b, p in zip(best, probabilities, strict=True) if b > 0)
    wins = sum(
        best[i] * probabilities[j] * (0.5 if rewards[i] == rewards[j] else rewards[i] > rewards[j])
        for i, j in itertools.product(range(len(rewards)), repeat=2)
    )
    return kl, wins, best @ rewards


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_closed_form_is_the_sum_over_every_tuple(n):
    expected = np.mean([every_tuple(*prompt, n) for prompt in zip(*TASK, strict=True)], axis=0)
    np.testing.assert_allclose(recipe.best_of_n(TASK, n), expected, atol=1e-12)


@pytest.mark.slow
def test_closed_form_is_that_of_the_enumeration_of_policies():
    for ties in (False, True):
        task = recipe.tabular_task(SMALL, 1.0, ties)
        logprobs = np.log(task.probabilities)
        best = np.asarray(best_of_n_logprobs(jnp.asarray(logprobs), jnp.asarray(task.rewards), 16), np.float64)
        kl = np.mean(np.sum(np.exp(best) * (best - logprobs), axis=1))
        assert recipe.best_of_n(task, 16).kl == pytest.approx(kl, rel=1e-5)


def test_tabular_tasks_are_distributions_and_count_the_token():
    plain, sharp, tied = (recipe.tabular_task(SMALL, *x) for x in ((1.0, False), (recipe.SHARP, False), (1.0, True)))
    for task in (plain, sharp, tied):
        np.testing.assert_allclose(task.probabilities.sum(axis=1), 1)
        assert task.probabilities.shape == (2, 15)  # 0; 10 20; four openings, each with any of three tokens
    assert len(np.unique(plain.rewards)) == 30
    # 0, 10, 20, then 110 111 112 120 121 122 210 211 212 220 221 222.
    np.testing.assert_array_equal(tied.rewards, [[0, 1, 0, 2, 3, 2, 1, 2, 1, 1, 2, 1, 0, 1, 0]] * 2)
    entropies = [-np.sum(task.probabilities * np.log(task.probabilities)) for task in (plain, sharp)]
    assert entropies[1] < 0.8 * entropies[0]


def test_kl_of_large_n_keeps_its_precision():
    many = recipe.Task(np.ones((1, 100_000)) / 100_000, np.arange(100_000.0)[None, :])
    assert recipe.best_of_n(many, 256).kl == pytest.approx(best_of_n_kl_bound(256), rel=1e-5)
    rare = recipe.Task(np.array([[1 - 1e-12, 1e-12]]), np.array([[0.0, 1.0]]))
    n = 1000
    p = n * 1e-12
    assert recipe.best_of_n(rare, n).reward == pytest.approx(p, rel=1e-6, abs=0)
    assert recipe.best_of_n(rare, n).kl == pytest.approx(p * math.log(n) - (n - 1) * 1e-12, rel=1e-3, abs=0)


def test_estimates_are_those_of_every_subset_and_of_blocks():
    sampled = np.array([[[1.0, 2.0, 3.0, 4.0, 9.0], [0, 0, 1, 0, 5]], [[2, 2, 2, 2, 2], [1, 5, 3, 0, 0]]])
    every, blocks = recipe.estimates(sampled, 2)
    subsets = [[[max(x) for x in itertools.combinations(row, 2)] for row in rows] for rows in sampled.tolist()]
    assert every == pytest.approx(mean_interval(np.mean(subsets, axis=2)))
    assert blocks == pytest.approx(mean_interval(np.array([[3, 0.5], [2, 4]])))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    settings = {"numbers": (1, 4, 16), "samples": 64, "repeats": 40, "outcomes": 2000, "results": folder}
    recipe.main(dataclasses.replace(SMALL, **settings))
    return folder


def test_recipe_finds_the_bound_tight_for_many_outcomes_and_loose_for_few(results):
    rows = json.loads((results / "table.json").read_text())
    assert len(rows) == 3 * 7
    for row in rows:
        assert row["KL, nats"] <= row["log n - (n-1)/n"] + 1e-12
        assert row["win rate"] <= row["n / (n+1)"] + 1e-12
        interval = row["sampled, every subset"]
        half = (interval["high"] - interval["low"]) / 2
        assert abs(interval["value"] - row["reward"]) <= 2 * half + 1e-3
    shares = {row["task"]: row["KL / bound"] for row in rows if row["n"] == 16}
    assert shares["2,000 outcomes, as likely"] > 0.999
    assert 0.4 < shares["sequences"] < 0.9
    assert shares["sequences, sharp policy"] < shares["sequences"]
    assert shares["a fair coin"] == pytest.approx(math.log(2) / best_of_n_kl_bound(16), rel=1e-3)
    widths = [
        [row[name]["high"] - row[name]["low"] for name in ("sampled, every subset", "sampled, blocks of n")]
        for row in rows
        if row["n"] == 4
    ]
    assert sum(every < blocks for every, blocks in widths) >= 6
    assert (results / "best_of_n.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((results / "settings.json").read_text())["settings"]["seconds"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": ()}, "at least one"),
        ({"numbers": (0,)}, "from 1 to samples, 512"),
        ({"numbers": (513,)}, "from 1 to samples, 512"),
        ({"repeats": 1}, "two repeats"),
        ({"vocab_size": 1}, "two tokens"),
        ({"length": 30}, "no more than 20000"),
        ({"seed": -1}, "The seed is -1"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, change, message):
    config = dataclasses.replace(recipe.Config(results=tmp_path / "there"), **change)
    with pytest.raises(InputError, match=message):
        recipe.main(config)
    assert not (tmp_path / "there").exists()
