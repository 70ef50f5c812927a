"""Best of n against the mean over every subset, pass@k against its formula, rejection sampling against its target."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from rl_jax.best_of_n import (
    best_of_n_kl_bound,
    best_of_n_weights,
    choose_best,
    choose_by_rejection,
    pass_at_k,
)
from rl_jax.errors import InputError
from rl_jax.evaluation import mean_interval
from rl_jax.types import Rollout

RNG = np.random.default_rng(0)
TIED = np.array([[2.0, 1.0, 2.0, 0.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0, 3.0, 3.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])


def subset_mean(rewards, values, n):
    """The mean of a value over the best of every subset, the best that tie taken for one another."""
    found = []
    for subset in itertools.combinations(range(len(rewards)), n):
        best = max(rewards[i] for i in subset)
        tied = [values[i] for i in subset if rewards[i] == best]
        found.append(sum(tied) / len(tied))
    return sum(found) / len(found)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("rewards", [TIED, RNG.normal(size=(4, 6)).astype(np.float32)], ids=["ties", "distinct"])
def test_mean_of_the_best_of_n_is_that_over_every_subset(rewards, n):
    values = RNG.normal(size=rewards.shape)
    for quantity in (rewards, values):
        expected = np.array([subset_mean(*rows, n) for rows in zip(rewards, quantity, strict=True)])
        np.testing.assert_allclose(np.sum(best_of_n_weights(rewards, n) * quantity, axis=1), expected, rtol=1e-6)


def test_weights_by_hand():
    weights = best_of_n_weights(np.array([[7.0, 5.0, 5.0, 1.0]]), 2)  # six pairs: 7 is in three of them
    np.testing.assert_allclose(weights, [[3 / 6, 1.5 / 6, 1.5 / 6, 0]])
    np.testing.assert_allclose(best_of_n_weights(TIED, 1), 1 / 6)


def test_large_groups_keep_their_precision():
    group, n = 512, 256
    ranks = RNG.permutation(group)[None, :]
    expected = [math.comb(rank, n - 1) / math.comb(group, n) for rank in ranks[0]]
    weights = best_of_n_weights(ranks, n)
    # Weights near the top are differences of shares near 1: absolute precision is what a mean needs.
    np.testing.assert_allclose(weights[0], expected, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(weights.sum(), 1)
    uniform = np.sum(weights * (ranks + 1.0)) / (group + 1)  # the mean of the highest of n of 1 to G, by hand
    assert uniform == pytest.approx(n / (n + 1), rel=1e-12)


@pytest.mark.parametrize("n", [0, -1, 7])
def test_best_of_more_than_there_are_is_refused(n):
    with pytest.raises(InputError, match=f"best of {n} cannot be told from 6 .*from 1 to 6"):
        best_of_n_weights(TIED, n)
    with pytest.raises(InputError, match="from 1 to 6"):
        pass_at_k(TIED > 1, n)


def test_rewards_that_are_not_numbers_are_refused():
    with pytest.raises(InputError, match="not a number"):
        best_of_n_weights(np.array([[0.0, np.nan]]), 2)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_pass_at_k_is_the_formula_of_its_paper(k):
    correct = RNG.random((5, 8)) < np.array([0.0, 0.1, 0.4, 0.8, 1.0])[:, None]
    expected = [1 - math.comb(8 - int(c), k) / math.comb(8, k) for c in correct.sum(axis=1)]
    found = pass_at_k(correct, k)
    assert found.value == pytest.approx(np.mean(expected))
    assert found.low == pytest.approx(max(mean_interval(np.array(expected)[:, None]).low, 0))
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert pass_at_k(correct.astype(np.float32), k) == found


def test_pass_at_k_by_hand_and_only_of_zeros_and_ones():
    assert pass_at_k(np.array([[1, 0, 0, 0], [0, 1, 0, 1]]), 2).value == pytest.approx((1 / 2 + 5 / 6) / 2)
    for wrong in (0.5, 2.0, -1.0, np.nan):
        with pytest.raises(InputError, match="neither"):
            pass_at_k(np.array([[1.0, wrong]]), 1)


def test_kl_bound_is_that_of_the_paper_and_of_the_integral():
    bounds = best_of_n_kl_bound(np.array([4, 16, 64, 256]))
    np.testing.assert_allclose(bounds, [0.636, 1.835, 3.175, 4.549], atol=5e-4)
    assert best_of_n_kl_bound(1) == 0
    for n in (1.5, 2.0, 7.3):  # the highest of n uniforms has the density n u^(n - 1)
        kl, _ = scipy.integrate.quad(lambda u, n=n: n * u ** (n - 1) * math.log(n * u ** (n - 1)), 0, 1)
        assert best_of_n_kl_bound(n) == pytest.approx(kl, rel=1e-6)
    with pytest.raises(InputError, match="at least 1"):
        best_of_n_kl_bound([2, 0.5])


def numbered(tokens) -> Rollout:
    """A rollout whose only completion token is given, [B], and whose prompts are numbered."""
    tokens = jnp.asarray(tokens, jnp.int32)[:, None]
    return Rollout(
        prompts=jnp.arange(len(tokens))[:, None],
        prompt_mask=jnp.ones(tokens.shape, bool),
        completions=tokens,
        completion_mask=jnp.ones(tokens.shape, bool),
        behavior_logprobs=-0.5 * tokens,
        truncated=tokens[:, 0] > 2,
    )


def test_choose_best_takes_the_first_of_the_best_of_each_group():
    rewards = jnp.array([0.0, 2.0, 2.0, -3.0, -4.0, -5.0])
    chosen = choose_best(numbered([9, 1, 2, 3, 4, 5]), rewards, 3)
    assert chosen.completions[:, 0].tolist() == [1, 3]
    assert chosen.prompts[:, 0].tolist() == [1, 3]
    assert chosen.behavior_logprobs[:, 0].tolist() == [-0.5, -1.5]
    assert chosen.truncated.tolist() == [False, True]


PROBABILITIES, REWARDS, BETA = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 1.5]), 0.7
GROUP, PROMPTS = 3, 20_000
SAMPLED = np.random.default_rng(1).choice(3, (PROMPTS * GROUP), p=PROBABILITIES)


def reject(**settings):
    rewards = jnp.asarray(REWARDS, jnp.float32)[SAMPLED]
    return choose_by_rejection(jax.random.key(0), numbered(SAMPLED), rewards, GROUP, **settings)


def frequencies(chosen):
    return np.bincount(np.asarray(chosen.completions[:, 0]), minlength=3) / len(chosen.completions)


def test_rejection_with_a_bound_samples_the_optimal_policy():
    chosen, accepted = reject(beta=BETA, highest=jnp.full(PROMPTS, 1.8))
    some = np.asarray(accepted) > 0
    target = PROBABILITIES * np.exp(REWARDS / BETA)
    found = frequencies(jax.tree.map(lambda x: x[some], chosen))
    np.testing.assert_allclose(found, target / target.sum(), atol=0.015)
    chance = PROBABILITIES @ np.exp((REWARDS - 1.8) / BETA)
    assert np.mean(accepted) / GROUP == pytest.approx(chance, abs=0.01)
    none = jax.tree.map(lambda x: x[~some], chosen)
    np.testing.assert_array_equal(none.completions[:, 0], SAMPLED[::GROUP][~some])


def test_rejection_within_the_group_is_the_sum_over_every_group():
    expected = np.zeros(3)
    for group in itertools.product(range(3), repeat=GROUP):
        left = np.prod(PROBABILITIES[list(group)])
        for outcome in group:
            chance = math.exp((REWARDS[outcome] - max(REWARDS[list(group)])) / BETA)
            expected[outcome] += left * chance
            left *= 1 - chance
    assert expected.sum() == pytest.approx(1)
    chosen, accepted = reject(beta=BETA)
    np.testing.assert_allclose(frequencies(chosen), expected, atol=0.012)
    assert int(accepted.min()) >= 1


def test_rejection_lies_between_best_of_n_and_the_policy():
    rewards = jnp.asarray(REWARDS, jnp.float32)[SAMPLED]
    best = choose_best(numbered(SAMPLED), rewards, GROUP)
    np.testing.assert_array_equal(reject(beta=1e-4)[0].prompts, best.prompts)
    np.testing.assert_array_equal(reject(beta=1e8)[0].prompts[:, 0], GROUP * np.arange(PROMPTS))


def test_rejection_of_part_of_a_batch_is_that_of_the_whole():
    rows = slice(30, 60)
    part = jax.tree.map(lambda x: x[rows], numbered(SAMPLED))
    rewards = jnp.asarray(REWARDS, jnp.float32)[SAMPLED][rows]
    settings = {"beta": BETA, "index": jnp.arange(10, 20)}
    chosen, accepted = choose_by_rejection(jax.random.key(0), part, rewards, GROUP, **settings)
    whole, whole_accepted = reject(beta=BETA)
    np.testing.assert_array_equal(chosen.prompts, whole.prompts[10:20])
    np.testing.assert_array_equal(accepted, whole_accepted[10:20])
