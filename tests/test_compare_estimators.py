"""The comparison of estimators: equal samples, a choice that does not see what it is judged by, and what is written."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.recipes import compare_estimators
from experiments.recipes.compare_estimators import RIVAL, Field, judge, learned_reward, make_run
from experiments.recipes.compare_estimators_config import PUBLISHED, USUAL, Condition, Config, conditions, contenders
from experiments.recipes.compare_estimators_tasks import bandit_task
from rl_jax.errors import InputError

TINY = Config(
    completions=32,
    batch=8,
    points=2,
    noise=0.0,
    kl_coefficient=0.05,
    offsets=(0.0,),
    noises=(),
    kl_coefficients=(0.1,),
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
PLAIN = Condition(offset=0.0, noise=0.0, kl_coefficient=0.05)


def setting(condition: Condition = PLAIN, **given: float) -> dict[str, float]:
    return {"learning_rate": 0.1, "seed": 0} | condition._asdict() | given


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
    assert np.shape(runs["walks"][USUAL]["RLOO k=4"]["by_rate"]) == (2, 2)
    for condition, column in ((USUAL, "way to the optimum, %"), *[(name, name) for name in list(conditions(TINY))[1:]]):
        found = runs["bandit"][condition]["RLOO k=4"]["way"]
        assert np.mean(found) == pytest.approx(rows[1][column]["value"])
    for name in ("walks.png", "walks_conditions.png", "bandit.png", "bandit_conditions.png"):
        assert (tmp_path / "compared" / name).read_bytes().startswith(b"\x89PNG")
    assert "RLOO k=4" in capsys.readouterr().out


@pytest.mark.parametrize("contender", contenders(Config()), ids=lambda contender: contender.label)
def test_every_contender_samples_alike_and_pays_for_divergence(contender):
    sampled = []

    def sample(params, problem, key, prompts, group_size):
        sampled.append((prompts * group_size, group_size))
        return BANDIT.sample(params, problem, key, prompts, group_size)

    run = make_run(TINY, BANDIT._replace(sample=sample), contender)
    params, metrics = jax.eval_shape(run, (setting(), PROBLEM))
    assert sampled == [(TINY.batch, contender.group_size)]
    assert metrics["reward"].shape == metrics["kl_k1"].shape == (4,)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, PROBLEM.ref_params)
    assert contender.estimator.kl != "none"


def test_published_figures_are_of_contenders():
    assert {*PUBLISHED, RIVAL} <= {contender.label for contender in contenders(Config())}


def test_a_run_learns_its_own_problem():
    config = dataclasses.replace(TINY, completions=480)
    run = jax.jit(make_run(config, BANDIT, contenders(TINY)[0]))
    ends = []
    for seed in (0, 1):
        problem = jax.tree.map(lambda x, seed=seed: x[seed], BANDIT.problems)
        params, metrics = run((setting(seed=seed), problem))
        end = BANDIT.evaluate(params, problem, jax.random.key(0))
        start = float(BANDIT.evaluate(problem.ref_params, problem, jax.random.key(0))["reward"])
        best = float(BANDIT.best(problem, PLAIN.kl_coefficient))
        ends.append(float(end["reward"] - PLAIN.kl_coefficient * end["kl"]))
        assert start + 0.3 * (best - start) < ends[-1] < best
        assert len(np.unique(metrics["reward"])) > 10
    other = run((setting(seed=2), problem))[1]
    assert np.any(other["reward"] != metrics["reward"])


def test_divergence_costs_what_the_condition_says():
    run = jax.jit(make_run(dataclasses.replace(TINY, completions=240), BANDIT, contenders(TINY)[0]))
    ends = []
    for coefficient in (0.05, 5.0):
        params, _ = run((setting(kl_coefficient=coefficient), PROBLEM))
        ends.append(float(BANDIT.evaluate(params, PROBLEM, jax.random.key(0))["kl"]))
    assert ends[1] < 0.3 * ends[0]


def test_learned_reward_is_off_by_a_number_of_each_prompt_and_by_noise():
    task, prompts = BANDIT._replace(prompts=2000, unit=0.5), jnp.tile(jnp.arange(2000)[::-1], 2)
    true = jnp.linspace(0.0, 1.0, 4000)

    def errors(condition, seed=0, step=0):
        return np.asarray(learned_reward(task, true, prompts, setting(condition, seed=seed), step) - true)

    np.testing.assert_array_equal(errors(PLAIN), 0)
    offsets, noise = errors(PLAIN._replace(offset=3.0)), errors(PLAIN._replace(noise=2.0))
    np.testing.assert_allclose((offsets.mean(), offsets.std(), noise.mean(), noise.std()), (1.5, 1.5, 0, 1), atol=0.1)
    np.testing.assert_allclose(offsets[:2000], offsets[2000:], atol=1e-5)
    assert abs(np.corrcoef(offsets[:2000][::-1], noise[:2000])[0, 1]) < 0.1  # as they were drawn
    np.testing.assert_allclose(errors(Condition(3.0, 2.0, 0.05)), offsets + noise, atol=1e-5)
    np.testing.assert_allclose(errors(PLAIN._replace(offset=3.0), step=1), offsets, atol=1e-5)
    assert abs(np.corrcoef(errors(PLAIN._replace(noise=2.0), step=1), noise)[0, 1]) < 0.1
    assert abs(np.corrcoef(errors(PLAIN._replace(offset=3.0), seed=1), offsets)[0, 1]) < 0.1


@pytest.mark.parametrize(("label", "indifferent"), [("RLOO k=4", True), ("RAFT k=2", True), ("REINFORCE", False)])
def test_offsets_of_prompts_do_nothing_to_who_compares_within_them(label, indifferent):
    config = dataclasses.replace(TINY, only=(label,))
    run = jax.jit(make_run(config, BANDIT, contenders(config)[0]))
    (plain, true), (offset, judged) = (run((setting(offset=offset), PROBLEM)) for offset in (0.0, 8.0))
    assert np.allclose(plain["table"], offset["table"], atol=1e-3) == indifferent
    assert true["reward"][0] == judged["reward"][0]  # of the same completions, and without the offsets


def test_prices_and_what_is_added_are_in_units_of_the_task():
    """With rewards, and so the unit, ten times as high, every gradient is too, and Adam goes the same way."""
    higher = BANDIT._replace(unit=10 * BANDIT.unit, reward=lambda *given: 10 * BANDIT.reward(*given))
    runs = [jax.jit(make_run(TINY, task, contenders(TINY)[0])) for task in (BANDIT, higher)]
    (table, metrics), (other, scaled) = (run((setting(Condition(1.0, 1.0, 0.5)), PROBLEM)) for run in runs)
    np.testing.assert_allclose(table["table"], other["table"], atol=2e-3)
    np.testing.assert_allclose(10 * metrics["reward"], scaled["reward"], rtol=1e-4)


def test_conditions_differ_from_the_usual_one_in_one_thing():
    usual, *others = conditions(TINY).items()
    assert usual == (USUAL, Condition(TINY.offset, TINY.noise, TINY.kl_coefficient))
    assert dict(others) == {
        "offset 0": Condition(0.0, TINY.noise, TINY.kl_coefficient),
        "kl coefficient 0.1": Condition(TINY.offset, TINY.noise, 0.1),
    }


def test_fields_say_where_each_run_starts_and_how_far_it_may_get():
    fields = compare_estimators.make_fields(
        TINY, bandit_task(3, TINY.contexts, TINY.arms)._replace(unit=2.0), (0.1, 0.2)
    )
    assert list(fields) == list(conditions(TINY))
    for name, field in fields.items():
        condition = conditions(TINY)[name]
        assert field.settings["seed"].tolist() == [0, 1, 2, 0, 1, 2] and field.price == 2 * condition.kl_coefficient
        np.testing.assert_allclose(field.settings["learning_rate"], [0.1] * 3 + [0.2] * 3)
        assert {key: field.settings[key].tolist() for key in Condition._fields} == {
            key: [np.float32(x)] * 6 for key, x in condition._asdict().items()
        }
        np.testing.assert_array_equal(field.problems.rewards[4], BANDIT.problems.rewards[1])
        problem = jax.tree.map(lambda x: x[1], BANDIT.problems)
        start = BANDIT.evaluate(problem.ref_params, problem, jax.random.key(0))["reward"]
        np.testing.assert_allclose([field.start[1], field.start[4]], start, rtol=1e-5)
        np.testing.assert_allclose(field.best[4], BANDIT.best(problem, field.price), rtol=1e-5)
        ends = field.evaluate((field.problems.ref_params, field.problems, compare_estimators.run_keys(field.settings)))
        np.testing.assert_allclose(ends["kl"], 0, atol=1e-6)


def test_rate_is_chosen_by_other_seeds_than_those_it_is_judged_by():
    config = dataclasses.replace(TINY, seeds=2, selection_seeds=2, points=2)
    reward = np.array([[9.0, 9, 1, 1], [5, 6, 3, 3], [7, 7, np.nan, 9]])  # three rates, four seeds
    kl = np.array([[0.0, 0, 0, 0], [2, 4, 1, 1], [0, 0, 0, 0]])
    metrics = {"reward": np.arange(48.0).reshape(12, 4), "kl_k1": np.ones((12, 4))}
    ends = {"reward": reward.reshape(-1), "kl": kl.reshape(-1)}
    start, best = np.tile([1.0, 2, 0, 0], 3), np.tile([11.0, 22, 1, 10], 3)
    field = Field((0.1, 0.2, 0.3), {}, None, 0.5, start, best, evaluate=dict)
    result = judge(config, contenders(config)[0], field, ends, metrics)
    assert result.rate == 0.2
    assert (result.reward.tolist(), result.kl.tolist(), result.way.tolist()) == ([5, 6], [2, 4], [30, 10])
    assert result.by_rate.tolist() == [[80, 35], [30, 10], [60, 25]]
    np.testing.assert_allclose(result.curve, [[150, 170], [90, 100]])


def test_table_is_ranked_and_compares_the_same_seeds():
    ways = {"RLOO k=4": [50.0, 90], "PPO": [70.0, 80], "REINFORCE": [40.0, 70]}
    every = []
    for contender in contenders(Config(only=tuple(ways))):
        result = compare_estimators.Result(
            contender, 0.1, *np.ones((2, 2)), np.array(ways[contender.label]), None, None
        )
        every.append({USUAL: result, "noise 0": result._replace(way=100 - result.way)})
    rows = compare_estimators.table_rows("walks", every)
    assert [row["estimator"] for row in rows] == ["PPO", "RLOO k=4", "REINFORCE"]
    assert [row["way to the optimum, %"].value for row in rows] == [75, 70, 55]
    assert rows[0]["less RLOO k=4"].value == 5 and rows[2]["less RLOO k=4"].value == -15
    np.testing.assert_allclose(
        rows[2]["less RLOO k=4"].low, -15 - 12.706 * 5, rtol=1e-3
    )  # Student, one degree of freedom
    assert "less RLOO k=4" not in rows[1]
    assert [row["noise 0"].value for row in rows] == [25, 30, 45]


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
        ({"kl_coefficients": (1.0, 0.0)}, "above 0"),
        ({"offset": -1.0}, "offset is -1.0 and noise 0.0; neither"),
        ({"noises": (1.0, -1.0)}, "noise -1.0; neither"),
        ({"only": ("RLOO",)}, "only names RLOO; there are REINFORCE, "),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, changes, message):
    config = dataclasses.replace(TINY, results=tmp_path / "compared", **changes)
    with pytest.raises(InputError, match=message):
        compare_estimators.main(config)
    assert not config.results.exists()
