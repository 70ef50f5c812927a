"""The comparison of estimators: equal samples, a choice that does not see what it is judged by, and what is written."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.recipes import compare_estimators
from experiments.recipes.compare_estimators import PUBLISHED, RIVAL, Config, Field, contenders, judge, make_run
from experiments.recipes.compare_estimators_tasks import bandit_task
from rl_jax.errors import InputError

TINY = Config(
    completions=32,
    batch=8,
    points=2,
    seeds=2,
    selection_seeds=1,
    walk_rates=(0.003, 0.01),
    bandit_rates=(0.1, 0.3, 1.0),
    nodes=5,
    length=3,
    width=8,
    pretraining_updates=5,
    contexts=3,
    arms=4,
    only=("RLOO k=4", "PPO"),
)
BANDIT = bandit_task(2, TINY.contexts, TINY.arms)
PROBLEM = jax.tree.map(lambda x: x[0], BANDIT.problems)


@pytest.mark.slow
def test_results_are_written(tmp_path, capsys):
    config = dataclasses.replace(TINY, results=tmp_path / "compared", only=("RLOO k=4",))
    compare_estimators.main(config)
    rows = json.loads((tmp_path / "compared/table.json").read_text("utf-8"))
    assert [(row["task"], row["estimator"]) for row in rows] == [("walks", "RLOO k=4"), ("bandit", "RLOO k=4")]
    for row, rates in zip(rows, (TINY.walk_rates, TINY.bandit_rates), strict=True):
        assert row["learning rate"] in rates and row["published win rate, %"] == 77.9
        assert -5 < row["way to the optimum, %"]["value"] < 100
    runs = json.loads((tmp_path / "compared/runs.json").read_text("utf-8"))
    assert np.shape(runs["walks"]["RLOO k=4"]["by_rate"]) == (2, 2)
    assert np.mean(runs["bandit"]["RLOO k=4"]["way"]) == pytest.approx(rows[1]["way to the optimum, %"]["value"])
    for name in ("walks.png", "bandit.png"):
        assert (tmp_path / "compared" / name).read_bytes().startswith(b"\x89PNG")
    assert "RLOO k=4" in capsys.readouterr().out


@pytest.mark.parametrize("contender", contenders(Config()), ids=lambda contender: contender.label)
def test_every_contender_samples_alike_and_pays_for_divergence(contender):
    sampled = []

    def sample(params, problem, key, prompts, group_size):
        sampled.append((prompts * group_size, group_size))
        return BANDIT.sample(params, problem, key, prompts, group_size)

    run = make_run(TINY, BANDIT._replace(sample=sample), contender)
    setting = {"learning_rate": jnp.float32(0.1), "seed": jnp.int32(0)}
    params, metrics = jax.eval_shape(run, (setting, PROBLEM))
    assert sampled == [(TINY.batch, contender.group_size)]
    assert metrics["reward"].shape == metrics["kl_k1"].shape == (4,)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, PROBLEM.ref_params)
    assert contender.estimator.kl != "none" and contender.estimator.kl_coefficient == Config().kl_coefficient


def test_published_figures_are_of_contenders():
    assert {*PUBLISHED, RIVAL} <= {contender.label for contender in contenders(Config())}


def test_a_run_learns_its_own_problem():
    config = dataclasses.replace(TINY, completions=480)
    run = jax.jit(make_run(config, BANDIT, contenders(TINY)[0]))
    ends = []
    for seed in (0, 1):
        problem = jax.tree.map(lambda x, seed=seed: x[seed], BANDIT.problems)
        params, metrics = run(({"learning_rate": 0.1, "seed": seed}, problem))
        end = BANDIT.evaluate(params, problem, jax.random.key(0))
        start = float(BANDIT.evaluate(problem.ref_params, problem, jax.random.key(0))["reward"])
        best = float(BANDIT.best(problem, config.kl_coefficient))
        ends.append(float(end["reward"] - config.kl_coefficient * end["kl"]))
        assert start + 0.3 * (best - start) < ends[-1] < best
        assert len(np.unique(metrics["reward"])) > 10
    other = run(({"learning_rate": 0.1, "seed": 2}, problem))[1]
    assert np.any(other["reward"] != metrics["reward"])


def test_divergence_costs_what_the_comparison_says():
    ends = []
    for coefficient in (0.05, 5.0):
        config = dataclasses.replace(TINY, completions=240, kl_coefficient=coefficient)
        run = jax.jit(make_run(config, BANDIT, contenders(config)[0]))
        params, _ = run(({"learning_rate": 0.1, "seed": 0}, PROBLEM))
        ends.append(float(BANDIT.evaluate(params, PROBLEM, jax.random.key(0))["kl"]))
    assert ends[1] < 0.3 * ends[0]


def test_field_says_where_each_run_starts_and_how_far_it_may_get():
    field = compare_estimators.make_field(TINY, bandit_task(3, TINY.contexts, TINY.arms), (0.1, 0.2))
    assert field.grid["seed"].tolist() == [0, 1, 2, 0, 1, 2]
    np.testing.assert_allclose(field.grid["learning_rate"], [0.1] * 3 + [0.2] * 3)
    np.testing.assert_array_equal(field.problems.rewards[4], BANDIT.problems.rewards[1])
    problem = jax.tree.map(lambda x: x[1], BANDIT.problems)
    start = BANDIT.evaluate(problem.ref_params, problem, jax.random.key(0))["reward"]
    np.testing.assert_allclose([field.start[1], field.start[4]], start, rtol=1e-5)
    np.testing.assert_allclose(field.best[4], BANDIT.best(problem, TINY.kl_coefficient), rtol=1e-5)
    ends = field.evaluate((field.problems.ref_params, field.problems, compare_estimators.run_keys(field.grid)))
    np.testing.assert_allclose(ends["kl"], 0, atol=1e-6)


def test_rate_is_chosen_by_other_seeds_than_those_it_is_judged_by():
    config = dataclasses.replace(TINY, seeds=2, selection_seeds=2, kl_coefficient=0.5, points=2)
    reward = np.array([[9.0, 9, 1, 1], [5, 6, 3, 3], [7, 7, np.nan, 9]])  # three rates, four seeds
    kl = np.array([[0.0, 0, 0, 0], [2, 4, 1, 1], [0, 0, 0, 0]])
    metrics = {"reward": np.arange(48.0).reshape(12, 4), "kl_k1": np.ones((12, 4))}
    ends = {"reward": reward.reshape(-1), "kl": kl.reshape(-1)}
    start, best = np.tile([1.0, 2, 0, 0], 3), np.tile([11.0, 22, 1, 10], 3)
    field = Field((0.1, 0.2, 0.3), {}, None, start, best, evaluate=dict)
    result = judge(config, contenders(config)[0], field, ends, metrics)
    assert result.rate == 0.2
    assert (result.reward.tolist(), result.kl.tolist(), result.way.tolist()) == ([5, 6], [2, 4], [30, 10])
    assert result.by_rate.tolist() == [[80, 35], [30, 10], [60, 25]]
    np.testing.assert_allclose(result.curve, [[150, 170], [90, 100]])


def test_table_is_ranked_and_compares_the_same_seeds():
    ways = {"RLOO k=4": [50.0, 90], "PPO": [70.0, 80], "REINFORCE": [40.0, 70]}
    results = [
        compare_estimators.Result(contender, 0.1, *np.ones((2, 2)), np.array(ways[contender.label]), None, None)
        for contender in contenders(Config(only=tuple(ways)))
    ]
    rows = compare_estimators.table_rows("walks", results)
    assert [row["estimator"] for row in rows] == ["PPO", "RLOO k=4", "REINFORCE"]
    assert [row["way to the optimum, %"].value for row in rows] == [75, 70, 55]
    assert rows[0]["less RLOO k=4"].value == 5 and rows[2]["less RLOO k=4"].value == -15
    np.testing.assert_allclose(
        rows[2]["less RLOO k=4"].low, -15 - 12.706 * 5, rtol=1e-3
    )  # Student, one degree of freedom
    assert "less RLOO k=4" not in rows[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 6}, "multiple of 4"),
        ({"batch": 0}, "multiple of 4"),
        ({"completions": 40}, "multiple of batch times points, 16"),
        ({"completions": 0}, "multiple of batch times points, 16"),
        ({"points": 0}, "multiple of batch times points"),
        ({"seeds": 1}, "seeds must be at least 2"),
        ({"selection_seeds": 0}, "selection_seeds 1"),
        ({"bandit_rates": ()}, "a rate for each task"),
        ({"kl_coefficient": 0.0}, "above 0"),
        ({"only": ("RLOO",)}, "only names RLOO; there are REINFORCE, "),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, changes, message):
    config = dataclasses.replace(TINY, results=tmp_path / "compared", **changes)
    with pytest.raises(InputError, match=message):
        compare_estimators.main(config)
    assert not config.results.exists()
