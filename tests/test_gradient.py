import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.flatten_util import ravel_pytree
from oracles import CONFIG, EOS, LENGTH, PROMPT_MASK, PROMPTS, VOCAB

from rl_jax.errors import InputError
from rl_jax.reinforce.advantages import (
    group_mean_advantages,
    leave_one_out_advantages,
    moving_average_advantages,
)
from rl_jax.reinforce.distributions import kl_estimate
from rl_jax.reinforce.gradient import reinforce_gradient
from rl_jax.reinforce.objectives import token_weights
from rl_jax.reinforce.penalties import kl_penalised_rewards
from rl_jax.rollout import generate
from rl_jax.run.spmd import make_mesh, pmapped
from rl_jax.sampling import Sampling, untruncated
from rl_jax.scoring import Reference, completion_logprobs, completion_states, score_completions

GROUP, BATCHES, COEFFICIENT, BASELINE = 4, 3000, 0.3, 0.7
PARAMS, REF_PARAMS = oracles.random_params(1), oracles.random_params(2)
SIZE = ravel_pytree(PARAMS)[0].size
DIRECTIONS = np.random.default_rng(0).normal(0, SIZE**-0.5, (16, SIZE)).astype(np.float32)
SURE, IMPOSSIBLE = 1e-3, 1e-12  # probabilities above which estimates agree, below which they do not


def make_sampling(**changes):
    return Sampling(LENGTH, **{"group_size": GROUP, "eos": (EOS,)} | changes)


def scorer(sampling):
    return lambda params, rollout, _: score_completions(params, rollout, CONFIG, sampling)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


@functools.cache
def exact_gradient(temperature=1.0, top_k=VOCAB):
    """Of E[reward] - coefficient * KL, by enumeration. [parameters]."""
    return flat(oracles.objective_gradient(PARAMS, REF_PARAMS, COEFFICIENT, temperature, top_k))


@functools.cache
def sampled(temperature):
    """Many batches of rollouts, end to end, and their rewards less the penalty. B = BATCHES * N * G."""

    @jax.jit
    def sample(params, ref_params, prompts, prompt_mask):
        sampling = make_sampling(temperature=temperature)
        rollout = generate(params, jax.random.key(0), prompts, prompt_mask, CONFIG, sampling)
        ref_logprobs = completion_logprobs(ref_params, rollout, CONFIG, sampling)
        kl = kl_estimate(rollout.behavior_logprobs, ref_logprobs, "k1")
        return rollout, kl_penalised_rewards(oracles.reward(rollout), kl, rollout.completion_mask, COEFFICIENT)

    return sample(PARAMS, REF_PARAMS, *(np.tile(x, (BATCHES, 1)) for x in (PROMPTS, PROMPT_MASK)))


@functools.partial(jax.jit, static_argnames=("temperature", "normalize"))
def ascent(params, rollout, advantages, temperature=1.0, normalize="completion"):
    """What each batch's gradient says of the objective's slope in a few directions. [BATCHES, directions]."""

    def one(batch):
        score_fn = scorer(make_sampling(temperature=temperature))
        gradient, _ = reinforce_gradient(params, *batch, score_fn, normalize=normalize)
        return -jnp.asarray(DIRECTIONS) @ ravel_pytree(gradient)[0]

    split = jax.tree.map(lambda x: x.reshape(BATCHES, -1, *x.shape[1:]), (rollout, advantages))
    return jax.lax.map(one, split, batch_size=500)


def p_value(samples, gradient):
    return oracles.mean_p_value(samples, DIRECTIONS @ gradient)


def moving_average(rewards, baseline):
    advantages = jax.vmap(lambda x: moving_average_advantages(x, jnp.float32(baseline), baseline_decay=0.9)[0])
    return advantages(rewards.reshape(BATCHES, -1)).reshape(-1)


ADVANTAGES = {
    "none": (lambda rewards: rewards, 1),
    "leave_one_out": (lambda rewards: leave_one_out_advantages(rewards, GROUP), 1),
    "group_mean": (lambda rewards: group_mean_advantages(rewards, GROUP), (GROUP - 1) / GROUP),
    "moving_average": (lambda rewards: moving_average(rewards, BASELINE), 1),
    "first_moving_average": (lambda rewards: moving_average(rewards, np.nan), 1 - 1 / (len(PROMPTS) * GROUP)),
}


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_gradients_have_the_mean_that_enumeration_gives(name, temperature):
    advantage_fn, scale = ADVANTAGES[name]
    rollout, rewards = sampled(temperature)
    slopes = ascent(PARAMS, rollout, advantage_fn(rewards), temperature)
    assert p_value(slopes, scale * exact_gradient(temperature)) > SURE


def leave_one_out(rewards):
    return leave_one_out_advantages(rewards, GROUP)


WRONG = {
    "rescaled": lambda rollout, rewards: ascent(PARAMS, rollout, 0.8 * leave_one_out(rewards)),
    "group mean taken for unbiased": lambda rollout, rewards: ascent(
        PARAMS, rollout, group_mean_advantages(rewards, GROUP)
    ),
    "mean over tokens of each sequence": lambda rollout, rewards: ascent(
        PARAMS, rollout, leave_one_out(rewards), normalize="sequence"
    ),
    "another temperature": lambda rollout, rewards: ascent(PARAMS, rollout, leave_one_out(rewards), temperature=0.7),
    "no penalty": lambda rollout, rewards: ascent(PARAMS, rollout, leave_one_out(oracles.reward(rollout))),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_gradients_are_told_apart(name):
    assert p_value(WRONG[name](*sampled(1.0)), exact_gradient()) < IMPOSSIBLE


def test_gradient_that_forgets_the_end_token_is_told_apart():
    rollout, rewards = sampled(1.0)
    mask = rollout.completion_mask & (rollout.completions != EOS)
    forgetful = dataclasses.replace(rollout, completion_mask=mask)
    assert p_value(ascent(PARAMS, forgetful, leave_one_out(rewards)), exact_gradient()) < IMPOSSIBLE


def test_filtered_gradient_weighed_by_probability_is_exact():
    changes = {"temperature": 1.3, "top_k": 2}
    sampling, rollout = make_sampling(**changes), oracles.enumerated_rollout()
    probabilities = jnp.exp(oracles.sequence_logprobs(PARAMS, **changes)).reshape(-1)
    np.testing.assert_allclose(jnp.sum(probabilities), len(PROMPTS), rtol=1e-5)

    @jax.jit
    def ascend(params, ref_params, rollout):
        logprobs = completion_logprobs(params, rollout, CONFIG, sampling)
        kl = kl_estimate(logprobs, completion_logprobs(ref_params, rollout, CONFIG, untruncated(sampling)), "k1")
        rewards = kl_penalised_rewards(oracles.reward(rollout), kl, rollout.completion_mask, COEFFICIENT)
        advantages = rewards * probabilities * (len(rewards) / len(PROMPTS))
        return reinforce_gradient(params, rollout, advantages, scorer(sampling), normalize="completion")[0]

    expected = exact_gradient(**changes)
    np.testing.assert_allclose(-flat(ascend(PARAMS, REF_PARAMS, rollout)), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.1


def batch():
    """B = 16 completions of unequal length, one advantage for each token."""
    rollout, _ = sampled(1.0)
    rollout = jax.tree.map(lambda x: jnp.asarray(np.asarray(x[:16])), rollout)
    lengths = rollout.completion_mask.sum(axis=1).reshape(8, 2).sum(axis=1)
    assert len(set(lengths.tolist())) > 2  # devices differ
    return rollout, jnp.asarray(np.random.default_rng(0).normal(size=(16, LENGTH)), jnp.float32)


def whole_gradient(microbatches):
    def gradient(params, ref_params, rollout, advantages):
        def score(params, part, ref_states):
            return score_completions(params, part, CONFIG, make_sampling(), Reference(ref_params, ref_states))

        return reinforce_gradient(
            params,
            rollout,
            advantages,
            score,
            normalize="token",
            context=completion_states(ref_params, rollout, CONFIG),
            microbatches=microbatches,
        )

    return gradient


plain_gradient = jax.jit(whole_gradient(microbatches=1))


def assert_same(tree, expected):
    for got, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def test_gradient_is_that_of_literal_pmap():
    rollout, advantages = batch()

    def shard_gradient(params, rollout, advantages):
        def numerator(params):
            logprobs = completion_logprobs(params, rollout, CONFIG, make_sampling())
            return -jnp.sum(jnp.where(rollout.completion_mask, advantages * logprobs, 0.0))

        count = jax.lax.psum(jnp.sum(rollout.completion_mask), "devices")
        return jax.tree.map(lambda x: jax.lax.psum(x, "devices") / count, jax.grad(numerator)(params))

    split = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), (rollout, advantages))
    gradients = jax.pmap(shard_gradient, axis_name="devices", in_axes=(None, 0, 0))(PARAMS, *split)
    gradient, _ = plain_gradient(PARAMS, REF_PARAMS, rollout, advantages)
    assert_same(gradient, jax.tree.map(lambda x: x[0], gradients))


def test_gradient_and_metrics_do_not_depend_on_devices_or_microbatches():
    rollout, advantages = batch()
    moved = dataclasses.replace(rollout, behavior_logprobs=rollout.behavior_logprobs + 1)  # a gap that is no rounding
    gradient = pmapped(whole_gradient(microbatches=2), make_mesh(), (None, None, 0, 0), None)
    arguments = (PARAMS, REF_PARAMS, moved, advantages)
    assert_same(gradient(*arguments), plain_gradient(*arguments))


def test_metrics_by_hand():
    rollout, advantages = batch()
    mask = np.asarray(rollout.completion_mask)

    @jax.jit
    def score(params, ref_params, rollout):
        reference = Reference(ref_params, completion_states(ref_params, rollout, CONFIG))
        return score_completions(params, rollout, CONFIG, make_sampling(), reference)

    logprobs, entropies, kl = (np.asarray(x)[mask] for x in score(PARAMS, REF_PARAMS, rollout))
    _, metrics = plain_gradient(PARAMS, REF_PARAMS, rollout, advantages)
    loss = -np.sum(np.asarray(advantages)[mask] * logprobs) / mask.sum()
    expected = {"loss": loss, "entropy": entropies.mean(), "kl": kl.sum() / 16}
    assert set(metrics) == {*expected, "logprob_gap"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
    assert metrics["logprob_gap"] < 1e-6  # the policy sampled it
    moved = dataclasses.replace(rollout, behavior_logprobs=rollout.behavior_logprobs + 1)
    _, metrics = plain_gradient(PARAMS, REF_PARAMS, moved, advantages)
    np.testing.assert_allclose(metrics["logprob_gap"], 1, rtol=1e-5)


def test_bad_shapes_are_refused():
    rollout, advantages = batch()
    gradient = functools.partial(reinforce_gradient, PARAMS, rollout, normalize="token")
    for wrong in (advantages[:8], advantages[:, :1], advantages[:, 0][:1]):
        with pytest.raises(AssertionError):
            gradient(wrong, scorer(make_sampling()))
    with pytest.raises(InputError, match="16 sequences does not divide into 3"):
        gradient(advantages, scorer(make_sampling()), microbatches=3)


def test_weights_of_parts_are_those_of_the_whole():
    mask = batch()[0].completion_mask
    parts = jnp.concatenate([token_weights(part, "token") for part in jnp.split(mask, 8)]) / 8
    assert jnp.max(jnp.abs(parts - token_weights(mask, "token"))) > 1e-3  # else the tests above could not fail
