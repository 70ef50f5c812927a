import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.stats
from jax.flatten_util import ravel_pytree

from rl_jax.errors import InputError
from rl_jax.models.tabular import init_table, tabular_logits
from rl_jax.reinforce import exact
from rl_jax.reinforce.advantages import group_mean_advantages, leave_one_out_advantages
from rl_jax.reinforce.distributions import token_logprobs
from rl_jax.sampling import Sampling
from rl_jax.scoring import completion_logprobs

ENUMERATED = exact.enumerated_rollout(oracles.PROMPTS, oracles.PROMPT_MASK, oracles.VOCAB, oracles.LENGTH, (2,))
KL_COEFFICIENT = 0.3
SURE = 1e-3  # probability of statistics as far out under the right distribution


@functools.cache
def policies():
    """Log-probabilities of 40 completions under a policy, which cannot sample three, and a reference. [2, K] each."""
    logits = np.random.default_rng(0).normal(0, 1.5, (2, 2, 40))
    logits[0, :, [0, 4, 5]] = -np.inf
    return tuple(jax.nn.log_softmax(jnp.asarray(x, jnp.float32), axis=-1) for x in logits)


def tied_rewards(count=40):
    return jnp.asarray(np.random.default_rng(1).integers(0, 5, (2, count)), jnp.float32)


def cut(row, eos):
    ends = [c for c, token in enumerate(row) if token in eos]
    return row[: ends[0] + 1] if ends else row


@pytest.mark.parametrize(
    ("vocab", "length", "eos"), [(4, 3, (2,)), (3, 4, ()), (4, 3, (3, 0)), (2, 9, (1, 1)), (3, 1, (0,)), (2, 3, (0, 1))]
)
def test_completions_are_the_beginnings_of_all_sequences(vocab, length, eos):
    everything = {cut(row, eos) for row in itertools.product(range(vocab), repeat=length)}
    tokens, mask = exact.enumerate_completions(vocab, length, eos)
    found = [tuple(row[real].tolist()) for row, real in zip(tokens, mask, strict=True)]
    assert found == sorted(everything, key=lambda row: (len(row), row))
    assert tokens.shape == mask.shape == (len(everything), length)
    assert not np.any(tokens[~mask]) and np.all(mask[:, :-1] >= mask[:, 1:])
    assert (tokens.dtype, mask.dtype) == (np.int32, bool)


def test_enumeration_is_the_oracles():
    for array, wanted in zip(jax.tree.leaves(ENUMERATED), jax.tree.leaves(oracles.enumerated_rollout()), strict=True):
        assert array.dtype == wanted.dtype
        np.testing.assert_array_equal(array, wanted)


def test_what_cannot_be_enumerated_is_refused():
    assert len(exact.enumerate_completions(10, 4, ())[0]) == 10_000
    assert exact.enumerate_completions(1, 3, ())[0].tolist() == [[0, 0, 0]]
    assert len(exact.enumerate_completions(20_000, 1, ())[0]) == 20_000
    assert len(exact.enumerate_completions(6, 6, (5,))[0]) == sum(5**c for c in range(5)) + 5**5 * 6  # 19,531
    with pytest.raises(InputError, match="has 66430 completions"):
        exact.enumerate_completions(10, 5, (9,))
    with pytest.raises(InputError, match="has 100000 completions of at most 5 tokens; no more than 20000"):
        exact.enumerate_completions(10, 5, ())
    for vocab, length, eos in ((0, 3, ()), (3, 0, ()), (3, 3, (3,)), (3, 3, (4,)), (3, 3, (-1,))):
        with pytest.raises(InputError, match="There are no completions"):
            exact.enumerate_completions(vocab, length, eos)


def test_objective_and_gradient_are_the_oracles():
    params, ref_params = oracles.random_params(1), oracles.random_params(2)

    def logprobs(params):
        tokens = completion_logprobs(params, ENUMERATED, oracles.CONFIG, Sampling(oracles.LENGTH))
        return exact.sequence_logprobs(tokens, ENUMERATED.completion_mask, 2)

    @jax.jit
    def value_and_grad(params, ref_params):
        rewards = oracles.reward(ENUMERATED).reshape(2, -1)
        return jax.value_and_grad(
            lambda params: exact.objective(logprobs(params), logprobs(ref_params), rewards, KL_COEFFICIENT)
        )(params)

    value, gradient = value_and_grad(params, ref_params)
    wanted = [oracles.sequence_logprobs(x) for x in (params, ref_params)]
    np.testing.assert_allclose(value, oracles.objective(*wanted, KL_COEFFICIENT), rtol=1e-5)
    expected = ravel_pytree(oracles.objective_gradient(params, ref_params, KL_COEFFICIENT))[0]
    np.testing.assert_allclose(ravel_pytree(gradient)[0], expected, rtol=1e-4, atol=1e-5)


def test_kl_by_hand_with_completions_of_no_probability():
    logprobs = jnp.log(jnp.array([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [1.0, 0.0, 0.0]]))
    ref_logprobs = jnp.log(jnp.array([[0.25, 0.25, 0.5], [0.25, 0.75, 0.0], [0.0, 0.5, 0.5]]))
    expected = [math.log(2), 0, math.inf]
    np.testing.assert_allclose(exact.sequence_kl(logprobs, ref_logprobs), expected, rtol=1e-6, atol=1e-7)
    slopes = jax.grad(lambda x: jnp.sum(exact.sequence_kl(x, ref_logprobs)[:2]))(logprobs)[:2]
    np.testing.assert_allclose(slopes, [[(1 + math.log(2)) / 2] * 2 + [0], [0.25, 0.75, 0]], rtol=1e-6)


def test_objective_by_hand():
    logprobs = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
    ref_logprobs, rewards = jnp.log(jnp.full((2, 2), 0.5)), jnp.array([[1.0, 3.0], [4.0, 0.0]])
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    expected = (2 + 1 - 0.5 * divergence) / 2
    np.testing.assert_allclose(exact.objective(logprobs, ref_logprobs, rewards, 0.5), expected, rtol=1e-6)


def test_optimal_policy_by_hand():
    ref_logprobs, rewards = jnp.log(jnp.full((2, 2), 0.5)), 0.5 * jnp.log(jnp.array([[1.0, 3.0], [7.0, 1.0]]))
    logprobs, value = exact.optimal_policy(ref_logprobs, rewards, 0.5)
    np.testing.assert_allclose(jnp.exp(logprobs), [[0.25, 0.75], [0.875, 0.125]], rtol=1e-6)
    np.testing.assert_allclose(value, 0.5 * (math.log(2) + math.log(4)) / 2, rtol=1e-6)


def test_no_policy_does_better_than_the_optimal_one():
    logprobs, ref_logprobs = policies()
    rewards = tied_rewards()
    best, value = exact.optimal_policy(ref_logprobs, rewards, KL_COEFFICIENT)
    reached = functools.partial(
        exact.objective, ref_logprobs=ref_logprobs, rewards=rewards, kl_coefficient=KL_COEFFICIENT
    )
    np.testing.assert_allclose(reached(best), value, rtol=1e-5)
    slope = jax.grad(lambda logits: reached(jax.nn.log_softmax(logits, axis=-1)))(best)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    noise = jax.random.normal(jax.random.key(0), (200, *best.shape))
    others = jax.nn.log_softmax(best[None] + 0.1 * noise, axis=-1)
    assert jnp.all(jax.vmap(reached)(others) < value)
    assert reached(logprobs) < value


def test_frontier_rises_with_slope_beta_and_is_concave():
    _, ref_logprobs = policies()
    rewards = tied_rewards() + jnp.linspace(0, 1, 40)[None]
    coefficients = jnp.geomspace(3.0, 0.1, 200)
    kl, reward = exact.frontier(ref_logprobs, rewards, coefficients)
    slopes = jnp.diff(reward) / jnp.diff(kl)
    np.testing.assert_allclose(slopes, jnp.sqrt(coefficients[:-1] * coefficients[1:]), rtol=0.02)
    assert jnp.all(slopes[1:] < slopes[:-1]) and kl[0] < 0.5 < 1.5 < kl[-1]
    for i in (0, 100):
        _, value = exact.optimal_policy(ref_logprobs, rewards, coefficients[i])
        np.testing.assert_allclose(reward[i] - coefficients[i] * kl[i], value, rtol=1e-5)
    sloppy = jax.vmap(lambda x: jax.nn.log_softmax(ref_logprobs + jnp.square(rewards) / x, axis=-1))(coefficients * 8)
    kl_there = jax.vmap(lambda x: jnp.mean(exact.sequence_kl(x, ref_logprobs)))(sloppy)
    reward_there = jnp.mean(jnp.sum(jnp.exp(sloppy) * rewards[None], axis=-1), axis=-1)
    inside = (kl_there > kl[0]) & (kl_there < kl[-1])
    assert jnp.sum(inside) > 50
    assert jnp.all((reward_there < jnp.interp(kl_there, kl, reward) + 1e-5) | ~inside)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_is_the_first_best_of_every_n_samples(n):
    logprobs, rewards = policies()[0][:, :12], tied_rewards(12)
    logprobs = jax.nn.log_softmax(logprobs, axis=-1)
    expected = np.zeros((2, 12))
    for prompt in range(2):
        for row in itertools.product(range(12), repeat=n):
            best = max(row, key=lambda y: rewards[prompt].tolist()[y])  # the first of those as good
            expected[prompt, best] += math.exp(sum(float(logprobs[prompt].tolist()[y]) for y in row))
    np.testing.assert_allclose(jnp.exp(exact.best_of_n_logprobs(logprobs, rewards, n)), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n", [1, 3])
def test_best_of_n_has_the_gradient_of_finite_differences(n):
    logits, rewards = jnp.array([0.3, -0.4, 0.9, 0.1]), jnp.array([[1.0, 0.0, 2.0, 1.0]])  # a tie, and a lowest

    def expected(logits):
        best = exact.best_of_n_logprobs(jax.nn.log_softmax(logits)[None], rewards, n)
        return jnp.sum(jnp.exp(best) * rewards)

    step = 1e-2 * jnp.eye(4)
    differences = [(expected(logits + d) - expected(logits - d)) / 2e-2 for d in step]
    np.testing.assert_allclose(jax.grad(expected)(logits), differences, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("n", "published"), [(4, 0.636), (16, 1.835), (64, 3.175), (256, 4.549)])
def test_best_of_n_divergence_is_below_its_bound_and_near_it_for_many_rewards(n, published):
    bound = math.log(n) - (n - 1) / n
    assert bound == pytest.approx(published, abs=1e-3)
    uniform = jnp.full((1, 10_000), -math.log(10_000))
    many = jnp.asarray(np.random.default_rng(0).permutation(10_000)[None], jnp.float32)
    logprobs = exact.best_of_n_logprobs(uniform, many, n)
    np.testing.assert_allclose(jnp.sum(jnp.exp(logprobs)), 1, rtol=1e-5)
    assert bound - 0.02 < float(exact.sequence_kl(logprobs, uniform)[0]) < bound + 1e-5  # of rounding
    few = exact.best_of_n_logprobs(policies()[0], tied_rewards(), n)
    np.testing.assert_allclose(jnp.sum(jnp.exp(few), axis=1), 1, rtol=1e-4)
    assert jnp.all(exact.sequence_kl(few, policies()[0]) < bound - 0.03)


@pytest.mark.parametrize("n", [2, 100_000])
def test_best_of_n_is_accurate_where_powers_and_rounding_are_large(n):
    order = np.random.default_rng(0).permutation(10_000)
    highest = (order + 1) / 10_000  # the probability of a reward no higher
    uniform = jnp.full((1, 10_000), -math.log(10_000))
    expected = highest**n - (highest - 1e-4) ** n
    seen = expected > 1e-9
    found = exact.best_of_n_logprobs(uniform, jnp.asarray(order[None], jnp.float32), n)[0]
    np.testing.assert_allclose(found[seen], np.log(expected[seen]), atol=1e-5)
    np.testing.assert_allclose(exact.best_of_n_logprobs(uniform, jnp.zeros((1, 10_000)), n), uniform, atol=1e-5)


VOCAB, COMPLETION, GROUP = 3, 2, 4
TABLE, REF_TABLE = (init_table(jax.random.key(seed), 2, VOCAB, COMPLETION, 1.5) for seed in (0, 1))
BOTH = exact.enumerated_rollout(np.array([[0], [1]]), np.ones((2, 1), bool), VOCAB, COMPLETION, (2,))
ONE = jax.tree.map(lambda x: x[: len(x) // 2], BOTH)


def tokens_of(table, rollout):
    return token_logprobs(tabular_logits(table, rollout), rollout.completions)


def reward(rollout):
    """Depends on the prompt, the tokens and the length. [B]."""
    digits = jnp.where(rollout.completion_mask, rollout.completions + 1, 0)
    return jnp.sin(digits @ jnp.array([1.0, 4.0]) + 2.0 * rollout.prompts[:, -1])


def test_drawn_groups_have_the_exact_distribution():
    # The second prompt can sample neither its first completion nor its last.
    tokens = tokens_of(TABLE, BOTH).at[jnp.array([len(ONE.prompts), -1])].set(-jnp.inf)
    tokens = jnp.where(BOTH.completion_mask, tokens, jnp.nan)
    codes = {tuple(row): number for number, row in enumerate(_names(ONE))}
    count, batches = len(codes), 20_000
    keys = jax.random.split(jax.random.key(0), batches)
    drawn = jax.jit(jax.vmap(lambda key: exact.draw_groups(key, BOTH, tokens, 2, 2)))(keys)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), drawn)
    np.testing.assert_array_equal(np.asarray(drawn.prompts)[:, :, 0], np.tile([0, 0, 1, 1], (batches, 1)))
    chosen = np.array([codes[row] for row in _names(flat)]).reshape(batches, 2, 2)
    logprobs = np.where(BOTH.completion_mask, tokens, 0).reshape(2, count, -1)
    probabilities = np.exp(logprobs.sum(axis=-1))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    for prompt in range(2):
        pairs = np.bincount(chosen[:, prompt] @ [count, 1], minlength=count**2)
        expected = np.outer(*[probabilities[prompt].astype(np.float64)] * 2).reshape(-1)
        assert not np.any(pairs[expected == 0])
        possible = expected > 0
        expected *= batches / expected.sum()
        assert scipy.stats.chisquare(pairs[possible], expected[possible]).pvalue > SURE
    assert exact.draw_groups(keys[0], BOTH, tokens, 2, 3).prompts[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    where = (np.arange(2)[None, :, None], chosen)
    np.testing.assert_array_equal(drawn.behavior_logprobs.reshape(batches, 2, 2, -1), logprobs[where])
    np.testing.assert_array_equal(flat.truncated, ~np.any(flat.completion_mask & (flat.completions == 2), axis=1))


def _names(rollout):
    """Completions as tuples of their real tokens."""
    pairs = zip(np.asarray(rollout.completions), np.asarray(rollout.completion_mask), strict=True)
    return [tuple(row[real].tolist()) for row, real in pairs]


def test_every_group_is_there_once():
    tokens, mask = tokens_of(TABLE, ONE), np.asarray(ONE.completion_mask)

    def group(rollout):
        same = (rollout.completions[:, None] == ONE.completions[None]) & (
            rollout.completion_mask[:, None] == mask[None]
        )
        return jax.nn.one_hot(jnp.argmax(jnp.all(same, axis=2), axis=1) @ jnp.array([49, 7, 1]), 7**3)

    chance = np.exp(np.where(mask, tokens, 0).sum(axis=1))
    expected = np.einsum("a,b,c->abc", chance, chance, chance).reshape(-1)
    np.testing.assert_allclose(exact.expected_gradient(group, ONE, tokens, 3), expected, rtol=1e-5)
    with pytest.raises(InputError, match=r"7 completions make 117649 groups of 6.*no more than 100000"):
        exact.expected_gradient(group, ONE, tokens, 6)
    with pytest.raises(InputError, match="groups of 0"):
        exact.expected_gradient(group, ONE, tokens, 0)


def group_gradient(advantage_fn):
    """The plainest estimator: the gradient of mean_i A_i log p(y_i). [G] -> [G], then a Rollout -> a table."""

    def mean_logprob(table, rollout):
        logprobs = jnp.sum(jnp.where(rollout.completion_mask, tokens_of(table, rollout), 0), axis=1)
        return jnp.mean(advantage_fn(reward(rollout)) * logprobs)

    return lambda rollout: jax.grad(mean_logprob)(TABLE, rollout)


def first_best(rewards):
    """G for the first of the highest rewards: not the same when the group is shuffled."""
    return len(rewards) * jax.nn.one_hot(jnp.argmax(rewards), len(rewards))


ADVANTAGES = {
    "none": lambda rewards: rewards,
    "leave one out": lambda rewards: leave_one_out_advantages(rewards, len(rewards)),
    "group mean": lambda rewards: group_mean_advantages(rewards, len(rewards)),
    "standardised": lambda rewards: (rewards - jnp.mean(rewards)) / (jnp.std(rewards, ddof=1) + 1e-4),
    "first best": first_best,
}


@functools.cache
def exact_gradients(name):
    """The expected gradient over all 2,401 groups, and by the formula in expected advantages; and E[reward]'s."""
    advantage_fn = ADVANTAGES[name]

    @jax.jit
    def both():
        tokens, rewards = tokens_of(TABLE, ONE), reward(ONE)
        summed = exact.expected_gradient(group_gradient(advantage_fn), ONE, tokens, GROUP)
        logprobs = exact.sequence_logprobs(tokens, ONE.completion_mask, 1)
        advantages = exact.expected_advantages(advantage_fn, logprobs[0], rewards, GROUP)

        def weighed(table, weights):
            logprobs = exact.sequence_logprobs(tokens_of(table, ONE), ONE.completion_mask, 1)[0]
            return jnp.sum(weights * logprobs)

        def expected_reward(table):
            logprobs = exact.sequence_logprobs(tokens_of(table, ONE), ONE.completion_mask, 1)
            return exact.objective(logprobs, logprobs, rewards[None], 0.0)

        by_formula = jax.grad(weighed)(TABLE, jnp.exp(logprobs[0]) * advantages)
        return summed, by_formula, jax.grad(expected_reward)(TABLE), advantages

    return jax.tree.map(np.asarray, both())


@pytest.mark.parametrize("name", ADVANTAGES)
def test_sum_over_groups_is_the_formula_in_expected_advantages(name):
    summed, by_formula, _, _ = exact_gradients(name)
    np.testing.assert_allclose(summed, by_formula, rtol=1e-4, atol=1e-6)
    assert np.abs(by_formula).max() > 0.01


@pytest.mark.parametrize(("name", "scale"), [("none", 1), ("leave one out", 1), ("group mean", 1 - 1 / GROUP)])
def test_sum_over_groups_is_the_gradient_where_the_estimator_is_unbiased(name, scale):
    summed, _, gradient, _ = exact_gradients(name)
    np.testing.assert_allclose(summed, scale * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["standardised", "first best"])
def test_sum_over_groups_tells_biased_estimators(name):
    summed, _, gradient, _ = exact_gradients(name)
    along = np.sum(summed * gradient) / np.sum(gradient * gradient)
    assert np.linalg.norm(summed - along * gradient) > 0.02 * np.linalg.norm(gradient)


def test_expected_advantages_are_what_loops_over_the_others_give():
    rewards = np.asarray(reward(ONE), np.float64)
    rewards[3] = rewards[5]
    probabilities = np.array([0.05, 0.1, 0.0, 0.2, 0.25, 0.1, 0.3])

    def standardised(group):
        return (group - group.mean()) / (group.std(ddof=1) + 1e-4)

    def first_best(group):
        return np.where(np.arange(len(group)) == group.argmax(), len(group), 0)

    for name, plain in (("standardised", standardised), ("first best", first_best)):
        expected = np.zeros(7)
        for y, place in itertools.product(range(7), range(3)):
            for others in itertools.product(range(7), repeat=2):
                group = rewards[[*others[:place], y, *others[place:]]]
                expected[y] += np.prod(probabilities[list(others)]) * plain(group)[place] / 3
        found = exact.expected_advantages(ADVANTAGES[name], jnp.log(probabilities), jnp.asarray(rewards), 3)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_expected_gradient_serves_any_function_and_leaves_out_what_cannot_happen():
    tokens = tokens_of(TABLE, ONE).at[0].set(-jnp.inf)  # a completion of one token
    probabilities = np.exp(np.where(ONE.completion_mask, tokens, 0).sum(axis=1))

    def values(rollout):
        inverse = jnp.exp(-jnp.sum(rollout.behavior_logprobs, axis=1))
        return {"count": jnp.sum(inverse), "rewards": reward(rollout)}

    found = jax.jit(lambda: exact.expected_gradient(values, ONE, tokens, 2))()
    total = probabilities.sum()
    np.testing.assert_allclose(found["count"], 2 * 6 * total, rtol=1e-4)
    mean = np.sum(probabilities * np.asarray(reward(ONE)))
    np.testing.assert_allclose(found["rewards"], [mean * total] * 2, rtol=1e-4)


def test_picked_completions_are_rows_with_behaviour():
    tokens = jnp.where(BOTH.completion_mask, tokens_of(TABLE, BOTH), jnp.inf)
    index = jnp.array([9, 0, 9])
    picked = exact.pick_completions(BOTH, tokens, index)
    kept = dataclasses.replace(BOTH, behavior_logprobs=jnp.where(BOTH.completion_mask, tokens, 0))
    for array, wanted in zip(jax.tree.leaves(picked), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(array, np.asarray(wanted)[[9, 0, 9]])
    assert int(picked.prompts[0, 0]) == 1 and int(picked.prompts[1, 0]) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda x: exact.sequence_kl(x[0], x[0]),
        lambda x: exact.sequence_kl(x, x[:1]),
        lambda x: exact.objective(x[0], x[0], x[0], 0.1),
        lambda x: exact.optimal_policy(x[0], x[0], 0.1),
        lambda x: exact.best_of_n_logprobs(x[0], x[0], 2),
        lambda x: exact.objective(x, x, x[:, :1], 0.1),
        lambda x: exact.optimal_policy(x, x[0], 0.1),
        lambda x: exact.frontier(x, x, 0.1),
        lambda x: exact.best_of_n_logprobs(x, x[:, :2], 2),
        lambda x: exact.sequence_logprobs(x, x[:, :1] < 0, 1),
        lambda x: exact.expected_advantages(lambda r: r, x, x, 2),
        lambda x: exact.pick_completions(BOTH, x, jnp.array([0])),
    ],
)
def test_bad_shapes_are_refused(call):
    with pytest.raises(AssertionError):
        call(policies()[0])
