"""The problem in which everything is counted, by plain loops; and the recipe that measures every estimator on it."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.recipes import policy_gradient_theorem as recipe
from experiments.recipes.enumerable import expected_returns, make_problem, objective, reward, score_fn
from rl_jax.errors import InputError
from rl_jax.models.tabular import tabular_logits

VOCAB, LENGTH, EOS, BETA = 3, 2, 0, 0.3
PROBLEM = jax.jit(make_problem, static_argnums=(1, 2))(jax.random.key(0), VOCAB, LENGTH, BETA, 0.5, 0.0)
NODES = {(): 0, (0,): 1, (1,): 2, (2,): 3}
PROMPTS = (0, 1)


def table(name):
    found = PROBLEM.params[name] if name in PROBLEM.params else getattr(PROBLEM, name)
    return np.asarray(found, np.float64)


def token_logprob(logits, prompt, prefix, token):
    row = logits[prompt, NODES[prefix]]
    return row[token] - math.log(np.exp(row).sum())


def completions():
    rows = itertools.chain(*(itertools.product(range(VOCAB), repeat=size) for size in range(1, LENGTH + 1)))
    return [y for y in rows if EOS not in y[:-1] and (len(y) == LENGTH or y[-1] == EOS)]


def logprob(logits, prompt, y):
    return sum(token_logprob(logits, prompt, y[:c], y[c]) for c in range(len(y)))


def earned(prompt, y):
    return float(PROBLEM.rewards[prompt, sum(token * VOCAB**c for c, token in enumerate(y))])


def plain_objective(logits, prompts, beta):
    total = 0.0
    for prompt, y in itertools.product(prompts, completions()):
        log_p, log_ref = logprob(logits, prompt, y), logprob(table("ref_table"), prompt, y)
        total += math.exp(log_p) * (earned(prompt, y) - beta * (log_p - log_ref)) / len(prompts)
    return total


@pytest.mark.parametrize(("prompts", "beta"), [(PROMPTS, BETA), (PROMPTS[:1], 0.0)])
def test_objective_and_its_gradient_are_those_of_loops_and_finite_differences(prompts, beta):
    logits = table("policy")
    value = objective(PROBLEM.params["policy"], PROBLEM, len(prompts), beta)
    np.testing.assert_allclose(value, plain_objective(logits, prompts, beta), rtol=1e-5)
    expected = np.zeros(logits.size)
    for i in range(logits.size):
        step = np.zeros(logits.size)
        step[i] = 1e-5
        ends = (plain_objective(logits + x.reshape(logits.shape), prompts, beta) for x in (step, -step))
        expected[i] = (next(ends) - next(ends)) / 2e-5
    np.testing.assert_allclose(recipe.exact_gradient(PROBLEM, len(prompts), beta), expected, rtol=1e-4, atol=1e-6)


def test_rewards_are_numbers_of_their_own_of_each_completion_of_each_prompt():
    found = np.asarray(reward(PROBLEM, PROBLEM.completions))
    np.testing.assert_array_equal(found, [earned(prompt, y) for prompt in PROMPTS for y in completions()])
    assert len(set(found.tolist())) == len(found) == 14


def test_critic_without_an_error_knows_the_returns():
    logits, ref = table("policy"), table("ref_table")

    def value(prompt, prefix):
        if len(prefix) == LENGTH or (prefix and prefix[-1] == EOS):
            return earned(prompt, prefix)
        steps = []
        for token in range(VOCAB):
            log_p, log_ref = (token_logprob(x, prompt, prefix, token) for x in (logits, ref))
            steps.append(math.exp(log_p) * (value(prompt, (*prefix, token)) - BETA * (log_p - log_ref)))
        return sum(steps)

    for prompt, prefix in itertools.product(PROMPTS, ((), (1,), (2,))):
        found = PROBLEM.params["values"][prompt, NODES[prefix]]
        np.testing.assert_allclose(found, value(prompt, prefix), rtol=1e-5)
    wrong = jax.jit(make_problem, static_argnums=(1, 2))(jax.random.key(0), VOCAB, LENGTH, BETA, 0.5, 0.3)
    error = wrong.params["values"] - expected_returns(PROBLEM, BETA)
    assert 0.1 < float(jnp.std(error)) < 0.6


def test_greedy_rewards_are_those_of_the_likeliest_tokens():
    lengths = set()
    for prompt in PROMPTS:
        y = ()
        while len(y) < LENGTH and EOS not in y:
            y += (int(table("policy")[prompt, NODES[y]].argmax()),)
        assert float(PROBLEM.greedy_rewards[prompt]) == earned(prompt, y)
        lengths.add(len(y))
    assert lengths == {1, 2}  # what follows the end may not matter


def test_scores_are_those_of_loops():
    rollout = PROBLEM.completions
    scores = score_fn(PROBLEM.params, rollout, tabular_logits(PROBLEM.ref_table, rollout))
    logits, ref = table("policy"), table("ref_table")
    for b, (prompt, y) in enumerate(itertools.product(PROMPTS, completions())):
        for c in range(len(y)):
            rows = [[token_logprob(x, prompt, y[:c], token) for token in range(VOCAB)] for x in (logits, ref)]
            every = np.array(rows)
            expected = every[0, y[c]], -np.exp(every[0]) @ every[0], np.exp(every[0]) @ (every[0] - every[1])
            np.testing.assert_allclose([x[b, c] for x in scores[:3]], expected, rtol=1e-4)
            assert scores.values[b, c] == PROBLEM.params["values"][prompt, NODES[y[:c]]]


def test_bias_by_hand():
    assert recipe.bias(np.array([3.0, 8.0]), np.array([0.0, 4.0])) == pytest.approx((1.0, 0.75))
    samples = np.array([[1.0, 2.0], [9.0, 6.0], [-4.0, 1.0]], np.float32)
    value, low, high = recipe.sampled_bias(samples, np.array([0.0, 4.0]))
    assert value == pytest.approx((0.5 + 1.5 + 0.25) / 3 - 1)
    assert high - value == pytest.approx(4.302653 * np.std([0.5, 1.5, 0.25], ddof=1) / 3**0.5) == value - low


def test_errors_are_of_means_of_disjoint_runs_and_fall_with_the_root_unless_biased():
    samples = np.arange(18, dtype=np.float32)[:, None] * np.array([[0.0, 1.0]], np.float32)
    counts, found = recipe.errors(samples, np.array([0.0, 2.0]))
    assert counts.tolist() == [1, 2]
    means = np.arange(0.5, 18, 2)
    by_hand = [np.sqrt(np.mean((np.arange(18) - 2) ** 2)) / 2, np.sqrt(np.mean((means - 2) ** 2)) / 2]
    np.testing.assert_allclose(found, by_hand)
    noise = np.random.default_rng(0).normal(size=(2**16, 40)) / 3
    for offset, slope in ((0.0, -0.5), (1.0, 0.0)):
        gradient = np.full(40, 1.0)
        measured = recipe.error_slope(*recipe.errors(noise + gradient + offset, gradient))
        assert measured == pytest.approx(slope, abs=0.03)


def test_error_slope_is_that_of_the_last_hundredfold():
    counts = 2 ** np.arange(15)
    assert recipe.error_slope(counts, np.where(counts < 164, 9.0, counts**-0.25)) == pytest.approx(-0.25)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    config = recipe.Config(
        estimators=("rloo", "dr_grpo", "importance_sequence"),
        length=2,
        group_size=3,
        group_sizes=(2,),
        samples=4096,
        off_policy=1.0,
        results=folder,
    )
    recipe.main(config)
    return folder


def test_recipe_tells_biased_from_unbiased(results):
    rows = {row["estimator"]: row for row in json.loads((results / "table.json").read_text())}
    assert list(rows) == [
        "rloo",
        "dr_grpo",
        "importance_sequence",
        "importance_sequence, no cap",
        "importance_sequence, no cap, no KL",
    ]
    for row in rows.values():
        scale = 2 / 3 / 2 if row["estimator"] == "dr_grpo" else 1
        assert row["bias along, %"] == pytest.approx(100 * (scale - 1), abs=0.01)
        assert row["across, %"] < 0.01
        sampled = row["sampled along, %"]
        half = (sampled["high"] - sampled["low"]) / 2
        assert abs(sampled["value"] - 100 * (scale - 1)) < 2 * half < 10
        assert row["cosine"] == 1 if row["held against"] == "E[r] - beta KL" else 0.9 < row["cosine"] < 1
        assert row["error slope"] == pytest.approx(-0.5 if scale == 1 else 0, abs=0.15)
        assert row["completions"] == 3
        assert row["passes"] == (2 if row["held against"] == "E[r]" else 3)
        assert row["microseconds"] > 0
    away = {name: abs(row["off policy along, %"]) + row["off policy across, %"] for name, row in rows.items()}
    assert away["importance_sequence, no cap, no KL"] < 0.01
    assert away["rloo"] > away["importance_sequence"] > away["importance_sequence, no cap"] > 1
    assert rows["rloo"]["time"] == 1


def test_recipe_measures_variance_over_the_group_size(results):
    lines = {line["advantage"]: line for line in json.loads((results / "group_sizes.json").read_text())}
    half, whole = lines["group mean"], lines["leave one out"]
    assert half["variance"] == pytest.approx(whole["variance"] / 4, rel=0.1)
    assert half["bias along"][0] == pytest.approx(-0.5, abs=0.1)
    assert whole["bias along"][1] < 0 < whole["bias along"][2]
    assert lines["no baseline"]["variance"] > 0


def test_recipe_writes_figures_settings_and_the_table(results):
    for name in ("error.png", "group_sizes.png"):
        assert (results / name).read_bytes()[:4] == b"\x89PNG"
    settings = json.loads((results / "settings.json").read_text())["settings"]
    assert settings["group_size"] == 3 and settings["seconds"] > 0
    assert (results / "table.md").read_text().startswith("| estimator")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimators": ("rloo", "sarsa")}, "No estimator is named 'sarsa'"),
        ({"estimators": ()}, "at least one estimator"),
        ({"samples": 1000}, "samples is 1000; it must be a multiple of 4096"),
        ({"samples": 4097}, "samples is 4097; it must be a multiple of 4096"),
        ({"vocab_size": 1}, "Two tokens"),
        ({"group_sizes": (4, 1)}, "Two tokens"),
        ({"group_size": 5}, "15 completions make 759375 groups of 5"),
        ({"length": 20}, "no more than 20000 can be enumerated"),
        ({"off_policy": -1.0}, "off_policy must be at least 0"),
        ({"seed": -1}, "The seed is -1"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, change, message):
    config = dataclasses.replace(recipe.Config(results=tmp_path / "there"), **change)
    with pytest.raises(InputError, match=message):
        recipe.main(config)
    assert not (tmp_path / "there").exists()
