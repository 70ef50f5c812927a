"""Gao's forms where a and b are known, the curve of best of n by counting, and the whole recipe in miniature."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.recipes import overoptimization as recipe
from experiments.recipes import overoptimization_curves as curves
from experiments.recipes import overoptimization_models as models
from experiments.recipes.overoptimization_curves import BEST_OF_N, RL, Curve, Line, common_grid
from experiments.recipes.overoptimization_rl import EVALUATED, Tuning, tune
from rl_jax.errors import InputError
from rl_jax.rewards.learned import minimum_reward
from rl_jax.types import PreferenceBatch, Rollout

D = np.linspace(0.0, 4.0, 21)
KNOWN = {  # d (a - b d) and d (a - b log d) written out, a = 1.5
    BEST_OF_N: lambda d, b: np.array([x * (1.5 - b * x) for x in d]),
    RL: lambda d, b: np.array([x * (1.5 - b * math.log(x)) if x else 0.0 for x in d]),
}


@pytest.mark.parametrize("method", [BEST_OF_N, RL])
@pytest.mark.parametrize("b", [0.4, -0.2])
def test_known_a_and_b_are_found(method, b):
    np.testing.assert_allclose(curves.fit(curves.FORMS[method], D, KNOWN[method](D, b)), [1.5, b], atol=1e-12)


@pytest.mark.parametrize("method", [BEST_OF_N, RL])
def test_form_that_made_a_curve_foretells_it_and_a_line_does_not(method):
    noise = 0.02 * np.random.default_rng(0).normal(size=(3, len(D)))
    d, gold = np.tile(D, (3, 1)), KNOWN[method](D, 0.4) + noise
    (other,) = set(curves.FORMS) - {method}
    for errors in (
        lambda form: curves.beyond(form, d, gold, 0.6),
        lambda form: curves.other_seeds(form, d, gold),
    ):
        right, wrong = errors(curves.FORMS[method]), errors(curves.FORMS[other])
        assert right.form < 0.08 and right.line > 5 * right.form and wrong.form > 1.5 * right.form
    straight = curves.beyond(curves.FORMS[method], d, 0.7 * d + noise, 0.6)
    assert straight.line < 0.05


def test_held_out_points_are_foretold_and_not_fitted():
    d, rewards = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 5.0, 0.0])
    found = curves.held_out(curves.best_of_n_form, d, rewards, np.array([True, True, False, False]))
    np.testing.assert_allclose(found, [math.sqrt((2**2 + 4**2) / 2)] * 2, atol=1e-12)  # both are the line R = d
    far = curves.beyond(curves.best_of_n_form, np.stack([d, d]), np.stack([rewards, rewards]), 0.5)
    np.testing.assert_allclose(far, found, atol=1e-12)
    # Of slopes 1, 1 and 3 the others have a mean of 2, 2 and 1.
    left_out = curves.other_seeds(curves.line_form, np.stack([d, d, d]), np.stack([d, d, 3 * d]))
    np.testing.assert_allclose(left_out, [math.sqrt((1 + 1 + 4) / 3 * 30 / 4)] * 2)


def test_best_of_n_curve_is_the_mean_over_every_subset():
    rng = np.random.default_rng(0)
    rewards, gold = rng.normal(size=(2, 3, 8)).astype(np.float32), rng.normal(size=8)  # two seeds, three members
    line = Line(8, 32, combination="minimum")
    found = curves.best_of_n_curve(line, np.ones(2), rewards, gold, minimum_reward, samples=4)
    np.testing.assert_allclose(found.d[0] ** 2, [0, math.log(2) - 1 / 2, math.log(4) - 3 / 4], atol=1e-12)
    assert (found.method, found.line, found.d.shape) == (BEST_OF_N, line, (2, 3))
    for seed, place in itertools.product(range(2), range(3)):
        chosen = [
            max(subset, key=lambda i: min(rewards[seed, :, i]))
            for prompt in (range(4), range(4, 8))
            for subset in itertools.combinations(prompt, 2**place)
        ]
        assert found.gold[seed, place] == pytest.approx(np.mean(gold[chosen]))
        assert found.proxy[seed, place] == pytest.approx(np.mean(rewards[seed].min(axis=0)[chosen]))


def curve(gold, d=((0.0, 1.0, 2.0),) * 2, method=BEST_OF_N):
    gold = np.array(gold, float)
    return Curve(method, Line(8, 32), np.array([0.6, 0.8]), np.array(d, float), gold, 2 * gold)


def test_lead_is_at_the_same_d_and_of_the_same_seed():
    usual = curve([[0, 1, 2], [0, 2, 4]])
    other = curve([[1.5, 2.5], [2.0, 9.0]], [[0.5, 1.5], [0.5, 5.0]])
    lead = curves.lead(other, usual)
    assert lead.value == pytest.approx(1.0)  # 1 and 1 of the first seed; 1 of the second, whose other point is beyond
    assert lead.low == pytest.approx(1.0) and lead.high == pytest.approx(1.0)
    early = curves.lead(curve([[1.0], [1.5]], [[0.5], [0.5]]), curve([[2.0], [3.0]], [[1.0], [1.0]]))
    assert early.value == pytest.approx(0.0)  # below its first point a curve is a line from 0


def test_table_says_where_gold_is_highest_and_where_it_ends():
    usual = curve([[0, 3, 2], [0, 1, 2]])
    row = curves.table_row("size", curve([[0, 5, 2], [0, 3, 2]]), usual, 0.5)
    assert (row["highest gold"].value, row["at d"], row["last gold"].value, row["last d"]) == (4, 1, 2, 2)
    assert (row["last proxy"].value, row["accuracy, %"].value, row["fall"].value) == (4, 70, 2)
    assert row["fall"].high == pytest.approx(2 + 12.706, rel=1e-3)  # 3 and 1 of the two seeds
    assert row["gold at the same d, less the usual"].value == pytest.approx(1.0)
    assert curves.table_row("size", usual, usual, 0.5)["gold at the same d, less the usual"] is None
    both = [curves.fit(curves.best_of_n_form, D[[0, 5, 10]], np.array(gold)) for gold in ([0, 5, 2], [0, 3, 2])]
    np.testing.assert_allclose([row["a"].value, row["b"].value], np.mean(both, axis=0))
    assert row["error beyond, line"] == pytest.approx(6.0)  # at d = 2: the line of 5 and 3 at d = 1 says 8, gold is 2


def test_seeds_are_brought_together_at_the_same_d():
    d, gold, proxy = common_grid(curve([[1, 2], [2, 4]], [[0.5, 1.0], [2.0, 1.0]]))
    assert (d[0], d[-1], gold.shape) == (0, 1, (2, 40))
    np.testing.assert_allclose(gold[0], 2 * d, atol=1e-12)
    np.testing.assert_allclose(gold[1], 4 * d, atol=1e-12)
    np.testing.assert_allclose(proxy[0], np.where(d < 0.5, np.nan, 2 * gold[0]))
    assert np.isnan(proxy[1][d < 1]).all() and proxy[1, -1] == 8


def rollout(completions):
    rows, length = completions.shape
    whole = np.ones((rows, length), bool)
    return Rollout(
        np.ones((rows, 2), np.int32), whole[:, :2], completions, whole, np.zeros((rows, length)), ~whole[:, 0]
    )


GOLD = models.Gold(
    words=np.array([0.5, 1.0, -1.0], np.float32),
    before=np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], np.float32),
    after=np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]], np.float32),
    bigrams=np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], np.float32)),
    mean=np.array([1.0, -1.0, 0.25], np.float32),
    std=np.array([2.0, 0.5, 4.0], np.float32),
)


def test_gold_is_what_it_says():
    batch = rollout(np.array([[1, 2, 1], [1, 1, 1]], np.int32))  # after prompts that end with token 1
    worth, language, loops = models.gold_parts(GOLD, batch)
    # Words 1 - 1 + 1; pairs (1, 1), (1, 2), (2, 1): 0, 1 and 1. And words 3, pairs 0.
    np.testing.assert_allclose(worth, [(3 - 1) / 2, (3 - 1) / 2], atol=1e-6)
    logs = [(math.log(0.8) + math.log(0.1) + math.log(0.2)) / 3, math.log(0.8)]
    np.testing.assert_allclose(language, [(x + 1) / 0.5 for x in logs], atol=1e-5)
    np.testing.assert_allclose(loops, [0, -0.5])
    low = (logs[0] + 1) / 0.5
    high = 1 / math.sqrt(1.25)
    expected = [high + low / math.sqrt(1 + low**2 / 4), high + 0 - 2 * 0.5]
    np.testing.assert_allclose(models.gold_reward(GOLD, batch), [(x - 0.25) / 4 for x in expected], atol=1e-5)


def test_gold_has_mean_0_and_variance_1_where_it_is_measured_and_likes_the_language_of_the_corpus():
    corpus = np.random.default_rng(0).integers(0, 40, 6000).cumsum().astype(np.int32) % 50
    corpus[1::2] = (corpus[::2] + 1) % 50  # what follows a token in an even place is known
    gold = models.make_gold(corpus, 50, 0)
    np.testing.assert_allclose(np.exp(gold.bigrams).sum(axis=1), 1, rtol=1e-4)
    assert gold.bigrams[3, 4] > gold.bigrams[3, 6] + 1
    batch = rollout(corpus[:4000].reshape(-1, 8))
    measured = models.measure_gold(gold, batch)
    rewards = np.asarray(models.gold_reward(measured, batch))
    np.testing.assert_allclose([rewards.mean(), rewards.std()], [0, 1], atol=1e-4)
    assert np.all(models.make_gold(corpus, 50, 1).words != gold.words)


TINY = recipe.Config(
    vocab_size=300,
    prompt_length=4,
    completion_length=6,
    pretraining=models.Learning(20, 8, 3e-3),
    layers=1,
    policy_width=8,
    widths=(8,),
    pairs=(16, 32),
    width=8,
    default_pairs=32,
    learning=models.Learning(10, 8, 1e-3),
    held_out_pairs=32,
    members=2,
    prompts=8,
    samples=32,
    kl_coefficients=(0.1,),
    tuning=Tuning(2, 20, 4, 1e-2),
    seeds=2,
)
SHAPE = recipe.shape_of(TINY, 8)
POLICY = models.init_params(jax.random.key(0), SHAPE)


def judged_pairs(count):
    """Pairs of which the one that begins with token 5 is preferred, and the other begins with token 6."""
    rng = np.random.default_rng(0)
    completions = rng.integers(10, 300, (count, 2, 6)).astype(np.int32)
    first = rng.random(count) < 0.5
    completions[:, 0, 0], completions[:, 1, 0] = np.where(first, 5, 6), np.where(first, 6, 5)
    whole = np.ones((count, 2, 6), bool)
    return PreferenceBatch(
        np.ones((count, 4), np.int32),
        np.ones((count, 4), bool),
        completions,
        whole,
        np.stack([first, ~first], axis=1).astype(np.float32),
        np.zeros(count, np.float32),
    )


def test_every_proxy_learns_its_own_judgements_and_no_more_of_them():
    pairs = judged_pairs(64)
    broken = dataclasses.replace(pairs, labels=np.where(np.arange(64)[:, None] < 32, pairs.labels, np.nan))
    opposite = dataclasses.replace(pairs, labels=1 - pairs.labels)
    data = jax.tree.map(lambda *x: np.stack(x), broken, opposite)
    rows = {"seed": [0, 0, 0, 0], "source": [0, 1, 0, 0], "pairs": [32, 64, 32, 32], "member": [0, 0, 0, 1]}
    rows = {name: np.array(values, np.int32) for name, values in rows.items()}
    params = models.train_rewards(POLICY, SHAPE, rows, data, recipe.preference_loss, models.Learning(80, 16, 1e-2))
    flat = rollout(pairs.completions.reshape(-1, 6))
    flat = dataclasses.replace(flat, prompts=np.ones((128, 4), np.int32), prompt_mask=np.ones((128, 4), bool))
    rewards = models.make_scorer(SHAPE)(params, flat)
    assert rewards.shape == (4, 1, 128) and np.isfinite(rewards).all()
    better = 2 * (pairs.completions[:, 0, 0] == 5) - 1
    agree = np.mean(np.sign(rewards[:, 0, ::2] - rewards[:, 0, 1::2]) == better, axis=1)
    assert agree[0] > 0.8 and agree[1] < 0.2 and agree[3] > 0.8
    np.testing.assert_allclose(rewards[2], rewards[0], atol=1e-4)
    assert np.max(np.abs(rewards[3] - rewards[0])) > 0.1


class Finished(NamedTuple):
    """The recipe in miniature: the folder of its results, and what RL against ensembles was called with."""

    folder: Path
    called: tuple[Any, ...]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder, calls = tmp_path_factory.mktemp("overoptimization"), []
    sentence = "the king said to his son that a good day is happy and a bad day is sad for war is evil"
    rng = np.random.default_rng(0)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n\n".join(" ".join(rng.choice(sentence.split(), 20)) for _ in range(300)), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "tune", lambda *args: calls.append(args) or tune(*args))
        recipe.main(dataclasses.replace(TINY, corpus=str(corpus), results=folder / "results"))
    return Finished(folder / "results", calls[-1])


@pytest.mark.slow
def test_results_are_written(finished):
    rows = json.loads((finished.folder / "table.json").read_text("utf-8"))
    lines = [(row["by"], row["varied"], row["pairs"], row["KL coefficient"], row["members"]) for row in rows]
    assert lines == [
        *[(by, "size", 32, 0, "single") for by in (BEST_OF_N, RL)],
        *[(by, "data", pairs, 0, "single") for by in (BEST_OF_N, RL) for pairs in (16, 32)],
        *[(RL, "KL coefficient", 32, price, "single") for price in (0, 0.1)],
        *[(by, "ensemble", 32, 0, name) for by in (BEST_OF_N, RL) for name in recipe.combinations(1.0)],
    ]
    found = json.loads((finished.folder / "curves.json").read_text("utf-8"))
    of_line = {(x["method"], *x["line"].values()): x for x in found}
    best, tuned = of_line[BEST_OF_N, 8, 32, 0, "single"], of_line[RL, 8, 32, 0, "single"]
    assert np.shape(best["gold"]) == (2, 6) and np.shape(tuned["gold"]) == (2, TINY.tuning.points)
    np.testing.assert_allclose(np.array(best["gold"])[:, 0], 0, atol=1e-5)  # the pool is what gold is measured in
    np.testing.assert_allclose(np.array(best["proxy"])[:, 0], 0, atol=1e-4)
    assert np.all(np.diff(best["proxy"], axis=1) > 0) and np.max(np.array(best["proxy"])[:, -1]) < 6
    assert not np.allclose(best["proxy"][0], best["proxy"][1])  # every seed has judgements of its own
    assert not np.allclose(of_line[BEST_OF_N, 8, 16, 0, "single"]["gold"], best["gold"])
    assert not np.allclose(of_line[RL, 8, 32, 0.1, "single"]["d"], tuned["d"])
    for name in ("size", "data", "kl_coefficient", "ensemble", "coefficients"):
        assert (finished.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "best of n" in (finished.folder / "table.md").read_text("utf-8")


@pytest.mark.slow
def test_rl_climbs_its_own_proxy_and_pays_for_divergence(finished):
    shapes, problem, tuning, length, spread_weight, rows = finished.called
    feature = np.where(np.arange(300) < 150, 3.0, -3.0)[:, None] * np.eye(8)[:1]  # that tells the tokens apart
    embedding = np.asarray(POLICY["embedding"]["embedding"])

    def features(size):
        return {**POLICY, "embedding": {"embedding": (embedding + size * feature).astype(np.float32)}}

    def ensemble(*weights):
        params = models.init_reward_params(jax.random.key(1), features(1.0), SHAPE)
        every = [{**params, "reward_head": {"kernel": jnp.zeros((8, 1)).at[0, 0].set(weight)}} for weight in weights]
        return jax.tree.map(lambda *x: np.stack(x), *every)

    likes, dislikes = ensemble(1.0, 2.0), ensemble(-1.0, -2.0)
    rows = {
        "seed": np.zeros(6, np.int32),
        "kl_coefficient": np.array([0, 0, 0, 0, 0, 1000], np.float32),
        "combination": np.array([0, 1, 2, 3, 1, 1], np.int32),
        "proxy": jax.tree.map(lambda *x: np.stack(x), *[likes] * 4, dislikes, likes),
    }
    problem = problem._replace(policy=features(0.1))
    means, completions = tune(shapes, problem, tuning, length, spread_weight, rows)
    gold, proxy, kl = (means[name][:, -1] for name in ("gold", "proxy", "kl"))
    liked = np.mean(completions[:, :, -1] < 150, axis=1)  # the last token is where rewards are read
    assert liked[0] > 0.8 and liked[4] < 0.15 and liked[5] < 0.6
    np.testing.assert_array_equal(completions[0], completions[1])  # "single" is the mean, of one
    values = np.where(completions[:4, :, -1] < 150, 1, -1) * 8**0.5  # what the head of weight 1 reads, nearly
    for run, expected in enumerate([1.5 * values[0], 1.5 * values[1], np.minimum(values[2], 2 * values[2])]):
        np.testing.assert_allclose(proxy[run], expected.mean(), atol=0.2)
    np.testing.assert_allclose(proxy[3], np.mean(1.5 * values[3] - 0.5 * np.abs(values[3])), atol=0.2)
    last = dataclasses.replace(rollout(completions[2]), prompts=np.repeat(problem.evaluated.tokens, EVALUATED, axis=0))
    np.testing.assert_allclose(gold[2], np.mean(models.gold_reward(problem.gold, last)), rtol=1e-3)
    assert kl[0] > 0.5 and kl[5] < 0.1 * kl[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"widths": ()}, "widths is 0"),
        ({"pairs": (0, 32)}, "pairs is 0"),
        ({"seeds": 1}, "seeds is 1 and members 2"),
        ({"members": 1}, "at least 2 of each"),
        ({"width": 16}, "width must be one of widths"),
        ({"default_pairs": 33}, "default_pairs one of pairs"),
        ({"samples": 40}, "multiple of 32"),
        ({"kl_coefficients": (0.0,)}, "above 0, which is tried anyway"),
        ({"noise": -1.0}, "noise at least 0"),
        ({"fitted_share": 1.0}, "between 0 and 1"),
        ({"tuning": Tuning(0, 1, 2, 1e-3)}, "tuning.points is 0"),
        ({"prompts": 0}, "prompts is 0"),
        ({"layers": 0}, "layers is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, changes, message):
    config = dataclasses.replace(TINY, results=tmp_path / "results", **changes)
    with pytest.raises(InputError, match=message):
        recipe.main(config)
    assert not config.results.exists()
