"""Collecting: which prompts and keys a batch and its refills have, and which groups are replaced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import collect, judge
from rl_jax.data.batches import shuffled_batch
from rl_jax.keys import Purpose, step_key
from rl_jax.rewards.compose import Reward
from rl_jax.rollout import refill_groups
from rl_jax.types import Rollout

N, G, SEED = 8, 2, 3
PROMPTS = (np.arange(40, dtype=np.int32)[:, None], np.ones((40, 1), bool))


def fake_sample(chance):
    """Completions that name their prompt, with a reward that is the same for a group unless its key says otherwise."""

    def sample(params, reward_params, key, prompts, mask):
        rows = jnp.repeat(prompts, G, axis=0)
        ones = jnp.ones(rows.shape, bool)
        rollout = Rollout(rows, ones, rows, ones, jnp.zeros(rows.shape), ones[:, 0])
        lively = jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p)))(prompts[:, 0]) < chance
        rewards = jnp.repeat(lively, G) * jnp.tile(jnp.arange(G), N) + params
        return collect.Collected(collect.Rewarded(rollout, rewards.astype(jnp.float32)), None)

    return sample


def make(chance, rounds, reward=None):
    reward = reward or Reward("fake", on_tokens=lambda params, rollout: rollout, on_text=None)
    sizes = {"batch_size": N, "group_size": G, "rounds": rounds, "seed": SEED}
    return collect.make_collect(fake_sample(chance), PROMPTS, reward, None, **sizes)


def signal(collected):
    rewards = np.asarray(collected.sampled.rewards).reshape(N, G)
    return rewards[:, 0] != rewards[:, 1]


def test_one_round_is_the_batch_of_the_step():
    collected, first, rounds = make(0.5, 1)(jnp.float32(0), (), 5)
    prompts, mask = shuffled_batch(PROMPTS, N, SEED, 5, "prompts")
    expected = fake_sample(0.5)(jnp.float32(0), (), step_key(SEED, Purpose.SAMPLE, 5), prompts, mask)
    np.testing.assert_array_equal(collected.sampled.rollout.prompts, expected.sampled.rollout.prompts)
    np.testing.assert_array_equal(collected.sampled.rewards, expected.sampled.rewards)
    np.testing.assert_array_equal(first.prompts, collected.sampled.rollout.prompts)
    assert rounds == {} and not signal(collected).all()


def test_groups_without_signal_are_replaced_and_the_others_stay():
    before, _, _ = make(0.5, 1)(jnp.float32(0), (), 5)
    after, first, metrics = make(0.5, 10)(jnp.float32(0), (), 5)
    again, _, _ = make(0.5, 10)(jnp.float32(0), (), 5)
    assert signal(after).all() and 1 < int(metrics["rounds"]) < 10
    np.testing.assert_allclose(metrics["reward"], np.mean(before.sampled.rewards), rtol=1e-6)
    np.testing.assert_array_equal(first.prompts, before.sampled.rollout.prompts)  # what that reward is of
    np.testing.assert_allclose(metrics["zero_signal_groups"], 1 - signal(before).mean(), rtol=1e-6)
    prompts = [np.asarray(c.sampled.rollout.prompts).reshape(N, G) for c in (before, after, again)]
    np.testing.assert_array_equal(prompts[1][signal(before)], prompts[0][signal(before)])
    assert np.all(prompts[1][~signal(before)] != prompts[0][~signal(before)])
    assert np.all(prompts[1][:, 0] == prompts[1][:, 1])
    np.testing.assert_array_equal(prompts[1], prompts[2])
    np.testing.assert_array_equal(after.sampled.rewards, again.sampled.rewards)


def test_rounds_end_where_there_is_no_signal_to_be_had():
    collected, _, metrics = make(0.0, 3)(jnp.float32(0), (), 0)
    assert int(metrics["rounds"]) == 3 and not signal(collected).any()
    assert int(make(1.1, 3)(jnp.float32(0), (), 0)[2]["rounds"]) == 1


def test_no_two_rounds_have_the_same_prompts_or_numbers(monkeypatch):
    seen = []
    sample = fake_sample(0.0)

    def spying(fn, mesh, in_axes, out_axes):
        def run(params, reward_params, key, prompts, mask):
            seen.append((jax.random.key_data(key).tolist(), prompts.tolist()))
            return sample(params, reward_params, key, prompts, mask)

        return run if fn is sample else jax.jit(fn)

    monkeypatch.setattr(collect, "pmapped", spying)
    reward = Reward("fake", on_tokens=lambda params, rollout: rollout, on_text=None)
    made = collect.make_collect(sample, PROMPTS, reward, None, batch_size=N, group_size=G, rounds=3, seed=SEED)
    for number in (0, 1):
        made(jnp.float32(0), (), number)
    keys, prompts = ({str(entry[part]) for entry in seen} for part in (0, 1))
    assert len(seen) == len(keys) == len(prompts) == 6


def test_text_rewards_are_added_to_those_on_tokens(monkeypatch):
    monkeypatch.setattr(
        judge, "decode_completions", lambda tokenizer, tokens, mask: [str(t) for t in np.asarray(tokens)[:, 0]]
    )
    reward = Reward("both", on_tokens=lambda params, rollout: rollout, on_text=lambda prompt, text: float(text))
    collected, _, _ = make(0.0, 1, reward)(jnp.float32(0.5), (), 0)
    np.testing.assert_allclose(collected.sampled.rewards, np.asarray(collected.sampled.rollout.prompts)[:, 0] + 0.5)


@pytest.mark.parametrize("usable", [[True] * 4, [False, True, False, True], [False] * 4])
def test_refilling_by_hand(usable):
    batch, fresh = {"x": jnp.arange(8), "y": jnp.zeros((8, 3))}, {"x": 10 + jnp.arange(8), "y": jnp.ones((8, 3))}
    wanting = [False, True, True, True]
    filled = refill_groups(batch, fresh, jnp.array(wanting), jnp.array(usable))
    expected = np.arange(8).reshape(4, 2)
    sources = [i for i in range(4) if usable[i]]
    for slot, source in zip([1, 2, 3], sources, strict=False):
        expected[slot] = 10 + np.arange(8).reshape(4, 2)[source]
    np.testing.assert_array_equal(filled["x"], expected.ravel())
    np.testing.assert_array_equal(filled["y"], np.repeat((expected >= 10).ravel()[:, None], 3, axis=1))
