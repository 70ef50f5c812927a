"""A chain of tokens against every completion of it; and the recipe that steers its KL."""

import collections
import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.recipes import adaptive_kl as recipe
from rl_jax.errors import InputError

SMALL = recipe.Config(
    targets=(0.8,),
    horizon=1000.0,
    starts=(0.05, 0.5),
    seeds=2,
    updates=280,
    batch=64,
    vocab_size=3,
    length=4,
)
LENGTH, VOCAB, BETA = 3, 3, 0.2
TABLE, REF = (jax.random.normal(jax.random.key(seed), (LENGTH, VOCAB, VOCAB)) for seed in range(2))


def every(table):
    """(first token, completion) -> its probability after that first token."""
    moves = np.exp(np.asarray(table, np.float64))
    moves /= moves.sum(axis=2, keepdims=True)
    return {
        walk: math.prod(moves[c, walk[c], walk[c + 1]] for c in range(LENGTH))
        for walk in itertools.product(range(VOCAB), repeat=LENGTH + 1)
    }


def earned(walk):
    return 0.25 * walk[1:].count(0)


def test_kl_and_reward_are_sums_over_every_completion():
    p, ref = every(TABLE), every(REF)
    kl = sum(p[walk] * math.log(p[walk] / ref[walk]) for walk in p) / VOCAB
    found = recipe.measure(TABLE, REF)
    assert float(found["kl"]) == pytest.approx(kl, rel=1e-5)
    assert float(found["reward"]) == pytest.approx(sum(p[walk] * earned(walk) for walk in p) / VOCAB, rel=1e-5)


def test_optimal_table_tilts_the_reference_by_the_reward():
    best, ref = every(recipe.optimal_table(REF, BETA)), every(REF)
    for first in range(VOCAB):
        total = sum(ref[walk] * math.exp(earned(walk) / BETA) for walk in ref if walk[0] == first)
        for walk in ref:
            if walk[0] == first:
                assert best[walk] == pytest.approx(ref[walk] * math.exp(earned(walk) / BETA) / total, rel=1e-4)


def test_samples_are_those_of_the_table_and_scored_as_they_were_drawn():
    rollout = jax.jit(recipe.sample, static_argnums=(2, 3))(TABLE, jax.random.key(2), 5000, 2)
    first = np.asarray(rollout.prompts[:, 0])
    np.testing.assert_array_equal(first[::2], first[1::2])
    p = every(TABLE)
    walks = [tuple(walk) for walk in np.column_stack([rollout.prompts, rollout.completions]).tolist()]
    counts = collections.Counter(walks)
    for walk, chance in p.items():
        assert counts[walk] / len(walks) == pytest.approx(chance / VOCAB, abs=0.012)
    scores = jax.jit(recipe.score_fn)(TABLE, rollout, recipe.chain_logits(REF, rollout))
    np.testing.assert_allclose(scores.logprobs, rollout.behavior_logprobs, atol=1e-5)
    np.testing.assert_allclose(jnp.sum(scores.logprobs, axis=1), [math.log(p[walk]) for walk in walks], atol=1e-4)
    assert float(jnp.mean(jnp.sum(scores.kl, axis=1))) == pytest.approx(
        float(recipe.measure(TABLE, REF)["kl"]), rel=0.05
    )
    np.testing.assert_allclose(recipe.reward(rollout), [earned(walk) for walk in walks])


def test_settled_is_after_the_last_block_off_the_target():
    blocks = np.array([0.0, 6.0, 6.7, 6.5, 5.5])
    assert recipe.settled(np.repeat(blocks, recipe.BLOCK), 6.0) == 3 / 5
    assert recipe.settled(np.repeat(blocks[3:], recipe.BLOCK), 6.0) == 0
    assert recipe.settled(np.repeat(blocks[:3], recipe.BLOCK), 6.0) == 1


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    recipe.main(dataclasses.replace(SMALL, results=folder))
    return folder


def test_kl_settles_at_the_target_from_every_start_where_it_is_steered(results):
    low, high, fixed_low, fixed_high = json.loads((results / "table.json").read_text())
    for row in (low, high):
        assert row["coefficient"] == "steered to 0.8 nats"
        assert row["KL at the end, nats"]["value"] == pytest.approx(0.8, rel=0.1)
        assert row["KL of the best policy there"]["value"] == pytest.approx(0.8, rel=0.15)
        assert row["furthest seed off target, %"] < 15
        assert row["within 10 % after, 1000 completions"] <= 64 * 280 / 1000
    ends = [row["coefficient at the end"]["value"] for row in (low, high)]
    assert ends[0] == pytest.approx(ends[1], rel=0.2) and 0.05 < ends[0] < 0.5
    for row, start in ((fixed_low, 0.05), (fixed_high, 0.5)):
        assert row["coefficient at the end"]["value"] == pytest.approx(start) == row["start"]
        assert row["KL at the end, nats"]["value"] == pytest.approx(
            row["KL of the best policy there"]["value"], rel=0.2
        )
    assert fixed_low["KL at the end, nats"]["value"] > 1.5 > 0.4 > fixed_high["KL at the end, nats"]["value"]
    assert fixed_low["reward"]["value"] > low["reward"]["value"] > fixed_high["reward"]["value"]
    assert (results / "adaptive_kl.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((results / "settings.json").read_text())["settings"]["seconds"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": ()}, "from 0.001 to 10"),
        ({"starts": (0.0,)}, "from 0.001 to 10"),
        ({"targets": (6.0, 0.0)}, "above 0"),
        ({"targets": ()}, "targets above 0"),
        ({"horizon": 100.0}, "a fifth of batch"),
        ({"batch": 510}, "a multiple of group_size, 4"),
        ({"group_size": 1}, "a multiple of group_size, 1, over 1"),
        ({"seeds": 1}, "two seeds"),
        ({"updates": 99}, "100 updates"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, change, message):
    config = dataclasses.replace(recipe.Config(results=tmp_path / "there"), **change)
    with pytest.raises(InputError, match=message):
        recipe.main(config)
    assert not (tmp_path / "there").exists()
