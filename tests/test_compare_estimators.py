"""The comparison of estimators: equal samples, a choice that does not see what it is judged by, and what is written."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.recipes import compare_estimators
from experiments.recipes.compare_estimators import PUBLISHED, Config, contenders, judge, make_run
from experiments.recipes.tasks import bandit_task
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
BANDIT = bandit_task(0, TINY.contexts, TINY.arms)


def test_results_are_written(tmp_path, capsys):
    config = dataclasses.replace(TINY, results=tmp_path / "compared", only=("RLOO k=4",))
    compare_estimators.main(config)
    rows = json.loads((tmp_path / "compared/table.json").read_text("utf-8"))
    assert [(row["task"], row["estimator"]) for row in rows] == [("walks", "RLOO k=4"), ("bandit", "RLOO k=4")]
    settings = json.loads((tmp_path / "compared/settings.json").read_text("utf-8"))["settings"]
    for row, rates in zip(rows, (TINY.walk_rates, TINY.bandit_rates), strict=True):
        task = settings["tasks"][row["task"]]
        assert row["learning rate"] in rates and row["published win rate, %"] == 77.9
        assert task["reference reward"] < row["objective"]["value"] < task["best objective"] < task["best reward"]
        objective = row["reward"]["value"] - config.kl_coefficient * row["KL, nats"]["value"]
        assert row["objective"]["value"] == pytest.approx(objective, abs=1e-6)
        way = (objective - task["reference reward"]) / (task["best objective"] - task["reference reward"])
        assert row["of the way to the optimum, %"]["value"] == pytest.approx(100 * way, abs=1e-3)
    for name in ("walks.png", "bandit.png"):
        assert (tmp_path / "compared" / name).read_bytes().startswith(b"\x89PNG")
    assert "RLOO k=4" in capsys.readouterr().out


@pytest.mark.parametrize("contender", contenders(Config()), ids=lambda contender: contender.label)
def test_every_contender_samples_alike_and_pays_for_divergence(contender):
    sampled = []

    def sample(params, key, prompts, group_size):
        sampled.append((prompts * group_size, group_size))
        return BANDIT.sample(params, key, prompts, group_size)

    run = make_run(TINY, BANDIT._replace(sample=sample), contender)
    setting = {"learning_rate": jnp.float32(0.1), "seed": jnp.int32(0)}
    params, metrics = jax.eval_shape(run, setting, BANDIT.ref_params)
    assert sampled == [(TINY.batch, contender.group_size)]
    assert metrics["reward"].shape == metrics["kl_k1"].shape == (4,)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, BANDIT.ref_params)
    assert contender.estimator.kl != "none" and contender.estimator.kl_coefficient == Config().kl_coefficient


def test_published_figures_are_of_contenders():
    assert set(PUBLISHED) <= {contender.label for contender in contenders(Config())}


def test_a_run_learns():
    """With 30 updates the objective comes nearer to the optimum, by the seed's own samples."""
    config = dataclasses.replace(TINY, completions=480)
    run = jax.jit(make_run(config, BANDIT, contenders(TINY)[0]))
    ends = []
    for seed in (0, 1):
        params, metrics = run({"learning_rate": 0.1, "seed": seed}, BANDIT.ref_params)
        end = BANDIT.evaluate(params, BANDIT.ref_params, jax.random.key(0))
        ends.append(float(end["reward"] - config.kl_coefficient * end["kl"]))
        assert len(np.unique(metrics["reward"])) > 10
    start = float(BANDIT.evaluate(BANDIT.ref_params, BANDIT.ref_params, jax.random.key(0))["reward"])
    best = BANDIT.best_objective(config.kl_coefficient)
    assert all(start + 0.3 * (best - start) < end < best for end in ends) and ends[0] != ends[1]


def test_rate_is_chosen_by_other_seeds_than_those_it_is_judged_by():
    config = dataclasses.replace(TINY, seeds=2, selection_seeds=2, kl_coefficient=0.5, points=2)
    reward = np.array([[9.0, 9, 1, 1], [5, 6, 3, 3], [7, 7, np.nan, 9]])  # three rates, four seeds
    kl = np.array([[0.0, 0, 0, 0], [2, 4, 1, 1], [0, 0, 0, 0]])
    metrics = {"reward": np.arange(48.0).reshape(12, 4), "kl_k1": np.ones((12, 4))}
    ends = {"reward": reward.reshape(-1), "kl": kl.reshape(-1)}
    result = judge(config, contenders(config)[0], (0.1, 0.2, 0.3), ends, metrics)
    assert result.rate == 0.2
    assert (result.reward.tolist(), result.kl.tolist(), result.objective.tolist()) == ([5, 6], [2, 4], [4, 4])
    assert result.by_rate.tolist() == [[9, 9], [4, 4], [7, 7]]
    assert result.curve.tolist() == [[16, 18], [20, 22]]


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
