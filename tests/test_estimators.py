"""Every named estimator against the exact gradient and a plain one: summed over every group, and by sampling."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import plain_estimators as plain
import pytest
from enumerable import (
    ALL,
    BASELINE,
    BETA,
    EOS,
    GREEDY,
    GROUP,
    LENGTH,
    MASK,
    OTHER,
    PARAMS,
    REF,
    REWARDS,
    TABLE,
    VOCAB,
    codes,
    score_all,
    scores,
)

from rl_jax.errors import InputError
from rl_jax.learner import init_state, policy_gradient_update
from rl_jax.models.tabular import init_table, tabular_logits, tabular_values
from rl_jax.reinforce import exact
from rl_jax.reinforce.advantages import group_standardized_advantages
from rl_jax.reinforce.estimators import ESTIMATORS, make_estimator

SGD = optax.sgd(1.0)
UNBIASED = ["reinforce", "reinforce_moving_average", "reinforce_value", "reinforce_to_go", "rloo", "remax"]
UNBIASED += ["importance_token", "importance_sequence"]


def one_update(estimator, params, ref, baseline, rollout, rewards):
    """What a whole update does to the logits with a learning rate of 1: the estimate of the gradient."""
    updated, _ = policy_gradient_update(
        dataclasses.replace(init_state(params, SGD, BETA), baseline=baseline),
        rollout,
        rewards,
        estimator=estimator,
        score_fn=lambda params, rollout, _: scores(params, rollout, ref),
        optimizer=SGD,
        group_size=GROUP,
        ref_logprobs=scores(params | {"logits": ref}, rollout, ref).logprobs,
        greedy_rewards=jnp.full(rewards.shape, GREEDY),
    )
    return updated.params["logits"] - params["logits"]


def single(name, **options):
    """The estimator with one update a batch."""
    changes = {passes: 1 for passes in ("epochs", "minibatches") if getattr(ESTIMATORS[name], passes) > 1}
    return make_estimator(name, **changes, **options)


@functools.cache
def compiled(estimator):
    """One program for every policy that may have sampled."""

    @jax.jit
    def mean(behavior, baseline):
        def update(rollout):
            return one_update(estimator, PARAMS, REF, baseline, rollout, REWARDS[codes(rollout)])

        return exact.expected_gradient(update, ALL, score_all(behavior), GROUP)

    return mean


def mean_update(estimator, behavior=TABLE, baseline=BASELINE):
    """The mean of the estimate over every group that `behavior` could sample. [parameters]."""
    return np.asarray(compiled(estimator)(behavior, jnp.float32(baseline))).ravel()


@functools.cache
def expected(name):
    return mean_update(single(name))


@functools.cache
def slopes():
    """The gradient of the log-probability of each token of every completion. [K, C, parameters]."""
    return np.asarray(jax.jit(jax.jacobian(score_all))(TABLE)).reshape(*MASK.shape, -1)


@functools.cache
def groups_by_hand(behavior_seed):
    """Every group, and its probability [M], without the library's arithmetic."""
    behavior = TABLE if behavior_seed is None else OTHER
    index = np.stack(np.meshgrid(*[np.arange(len(MASK))] * GROUP, indexing="ij"), -1).reshape(-1, GROUP)
    logprobs, acting, ref = (np.asarray(score_all(x), np.float64) for x in (TABLE, behavior, REF))
    values = np.asarray(tabular_values(PARAMS["values"], ALL, VOCAB), np.float64) * MASK
    picked = (x[index] for x in (np.asarray(REWARDS, np.float64), MASK, logprobs, acting, ref, values))
    return index, np.exp(acting.sum(1)[index].sum(1)), plain.Groups(*picked, GREEDY, BASELINE)


def expected_by_hand(name, behavior_seed=None):
    index, probabilities, groups = groups_by_hand(behavior_seed)
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-5)
    coefficients = np.where(groups.mask, plain.COEFFICIENTS[name](groups, BETA), 0.0)
    return np.einsum("m,mgc,mgcp->p", probabilities, coefficients, slopes()[index])


@functools.cache
def exact_gradient(beta=BETA):
    def objective(table):
        logprobs, ref = (exact.sequence_logprobs(score_all(x), ALL.completion_mask, 1) for x in (table, REF))
        return exact.objective(logprobs, ref, REWARDS[None], beta)

    return np.asarray(jax.jit(jax.grad(objective))(TABLE)).ravel()


def test_the_plain_ones_are_all_of_them():
    assert set(plain.COEFFICIENTS) == set(ESTIMATORS)


CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # rounding, where a whitened batch has no variance to speak of
OFF_POLICY = [name for name, row in ESTIMATORS.items() if isinstance(row.loss, functools.partial)]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_mean_over_every_group_is_that_of_the_plain_estimator(name):
    np.testing.assert_allclose(expected(name), expected_by_hand(name), **CLOSE)


@pytest.mark.parametrize("name", OFF_POLICY)
def test_mean_off_policy_is_that_of_the_plain_estimator(name):
    by_hand = expected_by_hand(name, 3)
    np.testing.assert_allclose(mean_update(single(name), OTHER), by_hand, **CLOSE)
    assert np.abs(by_hand - expected_by_hand(name)).max() > 1e-3  # there is something to see


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_unbiased_have_the_exact_gradient_and_the_others_have_not(name):
    off = np.linalg.norm(expected(name) - exact_gradient()) / np.linalg.norm(exact_gradient())
    assert (off < 1e-4) == (name in UNBIASED), off
    assert ESTIMATORS[name].target.startswith("E[r] - beta KL, unbiased") == (name in UNBIASED)


def along(vector, direction):
    """How much of a vector lies along another, in units of it; and how much lies across."""
    scale = vector @ direction / (direction @ direction)
    return scale, np.linalg.norm(vector - scale * direction) / np.linalg.norm(direction)


def test_a_group_mean_shrinks_the_gradient_by_one_part_in_the_group():
    scale, across = along(expected("dr_grpo"), exact_gradient(beta=0.0))
    assert scale == pytest.approx((GROUP - 1) / (GROUP * LENGTH), rel=1e-4)
    assert across < 1e-5


def test_the_first_moving_average_shrinks_the_gradient_by_one_part_in_the_batch():
    scale, across = along(mean_update(single("reinforce_moving_average"), baseline=np.nan), exact_gradient())
    assert scale == pytest.approx((GROUP - 1) / GROUP, rel=1e-4)
    assert across < 1e-4


def test_an_infinite_cap_makes_the_sequence_ratio_unbiased_off_policy_and_a_cap_shrinks_it():
    gradient = exact_gradient(beta=0.0)
    means = {
        (name, cap): mean_update(single(name, kl="none", ratio_cap=cap), OTHER)
        for name, cap in (("importance_sequence", np.inf), ("importance_sequence", 1.0), ("importance_token", np.inf))
    }
    scale, across = along(means["importance_sequence", np.inf], gradient)
    assert (scale, across) == (pytest.approx(1, abs=1e-4), pytest.approx(0, abs=1e-4))
    assert along(means["importance_sequence", 1.0], gradient)[0] < 0.9
    assert along(means["importance_token", np.inf], gradient)[1] > 0.05


@functools.cache
def kl_pull(divergence):
    """The gradient of a divergence of next tokens, at the prefixes that the policy visits."""
    lengths = jnp.asarray(MASK.sum(1))

    def total(table):
        probabilities = jnp.exp(jnp.sum(score_all(TABLE), axis=1))  # constants
        logits, ref_logits = tabular_logits(table, ALL), tabular_logits(REF, ALL)
        terms = jnp.where(ALL.completion_mask, divergence(logits, ref_logits), 0.0)
        return jnp.sum(probabilities * jnp.sum(terms, axis=1)), lengths

    return np.asarray(jax.jit(jax.grad(total, has_aux=True))(TABLE)[0]).ravel()


def plain_kl(logits, ref_logits):
    p, q = jax.nn.softmax(logits), jax.nn.softmax(ref_logits)
    return jnp.sum(p * jnp.log(p / q), axis=-1)


def reverse_kl(logits, ref_logits):
    return plain_kl(ref_logits, logits)


@pytest.mark.parametrize("placement", ["k2_loss", "exact_loss", "k3_loss"])
def test_a_divergence_in_the_loss_pulls_by_token_and_k3_the_other_way_round(placement):
    mean = mean_update(single("rloo", kl=placement, kl_coefficient=0.3))
    forward, reverse = kl_pull(plain_kl), kl_pull(reverse_kl)
    pull = reverse if placement == "k3_loss" else forward
    np.testing.assert_allclose(mean, exact_gradient(beta=0.0) - 0.3 * pull, rtol=1e-4, atol=1e-5)
    # It is neither the other one nor the gradient of the KL of whole completions.
    assert np.abs(forward - reverse).max() > 0.05
    assert np.abs(exact_gradient(0.3) - exact_gradient(0.0) + 0.3 * forward).max() > 0.01


def test_entropy_bonus_pulls_up_the_entropy_of_each_token():
    mean = mean_update(single("rloo", kl="none", entropy_coefficient=0.2))
    gain = kl_pull(lambda logits, _: -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=-1))
    np.testing.assert_allclose(mean, exact_gradient(beta=0.0) + 0.2 * gain, rtol=1e-4, atol=1e-5)


def test_raft_climbs_the_likelihood_of_the_best_of_a_group():
    mean = mean_update(single("raft", kl="none"))
    logprobs = jnp.sum(score_all(TABLE), axis=1)[None]
    best = np.exp(exact.best_of_n_logprobs(logprobs, REWARDS[None], GROUP))[0]
    np.testing.assert_allclose(mean, best @ slopes().sum(1), rtol=1e-4, atol=1e-5)


def test_standardised_advantages_of_chances_climb_the_arcsine():
    """The group's standard deviation turns E[r] = p into E[2 arcsin sqrt(p)], whose slope is 1 / sqrt(p (1 - p))."""
    group = 14
    for p in (0.3, 0.5):
        chances, rewards = jnp.array([1 - p, p]), jnp.array([0.0, 1.0])
        advantages = exact.expected_advantages(
            lambda rewards: group_standardized_advantages(rewards, group), jnp.log(chances), rewards, group
        )
        slope = float(advantages[1] - advantages[0])
        assert slope == pytest.approx((group - 1) / group / np.sqrt(p * (1 - p)), rel=0.03)


# By sampling, from two prompts


PROMPTS = exact.enumerated_rollout(np.array([[0], [1]]), np.ones((2, 1), bool), VOCAB, LENGTH, (EOS,))
TWO, TWO_REF = (init_table(jax.random.key(seed), 2, VOCAB, LENGTH) for seed in (5, 6))
BATCHES = 30_000  # of two prompts with a group each
CERTAIN, IMPOSSIBLE = 1e-3, 1e-12  # probabilities above which estimates agree, below which they do not


def two_rewards(rollout):
    return REWARDS[codes(rollout)] * jnp.where(rollout.prompts[:, -1] == 0, 1.0, -2.0)


def two_params(table):
    return {"logits": table, "values": jnp.tile(PARAMS["values"], (2, 1))}


def two_scores(table, rollout):
    return scores(two_params(table), rollout, TWO_REF)


@functools.cache
def sampled(name):
    """The estimate of each of many batches, and the parameters with an effect. [BATCHES, parameters]."""
    estimator, token_logprobs = single(name), two_scores(TWO, PROMPTS).logprobs

    def update(key):
        rollout = exact.draw_groups(key, PROMPTS, token_logprobs, 2, GROUP)
        baseline = jnp.float32(BASELINE)
        return one_update(estimator, two_params(TWO), TWO_REF, baseline, rollout, two_rewards(rollout)).reshape(-1)

    keys = jax.random.split(jax.random.key(7), BATCHES)
    return np.asarray(jax.jit(jax.vmap(update))(keys))


@functools.cache
def two_gradient():
    def objective(table):
        logprobs, ref = (
            exact.sequence_logprobs(two_scores(x, PROMPTS).logprobs, PROMPTS.completion_mask, 2)
            for x in (table, TWO_REF)
        )
        return exact.objective(logprobs, ref, two_rewards(PROMPTS).reshape(2, -1), BETA)

    return np.asarray(jax.jit(jax.grad(objective))(TWO)).ravel()


def p_value(name, factor=1.0):
    """Of the mean of the samples being the exact gradient, in the directions that are free: logits have no level."""
    live = np.asarray(two_gradient()) != 0
    basis = live.nonzero()[0].reshape(-1, VOCAB)[:, 1:].ravel()
    return oracles.mean_p_value(sampled(name)[:, basis], factor * two_gradient()[basis])


@pytest.mark.parametrize("name", UNBIASED)
def test_samples_of_the_unbiased_have_the_exact_mean(name):
    assert 2 * GROUP * BATCHES > 1e5
    assert p_value(name) > CERTAIN


def test_samples_tell_a_small_bias():
    assert p_value("rloo", factor=0.95) < IMPOSSIBLE
    assert p_value("grpo") < IMPOSSIBLE


def test_leaving_one_out_reduces_the_variance():
    spread = {name: np.trace(np.cov(sampled(name).T)) for name in ("reinforce", "rloo")}
    assert spread["rloo"] < 0.8 * spread["reinforce"]


def test_an_estimator_that_is_not_there_is_refused():
    with pytest.raises(InputError) as error:
        make_estimator("grpoo")
    assert str(error.value) == f"No estimator is named 'grpoo'; there are {', '.join(ESTIMATORS)}."
