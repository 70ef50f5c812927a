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
from rl_jax.microbatch import sum_over_microbatches
from rl_jax.reinforce.advantages import group_mean_advantages, leave_one_out_advantages
from rl_jax.reinforce.distributions import kl_estimate
from rl_jax.reinforce.gradient import Scores, reinforce_gradient, supply
from rl_jax.reinforce.objectives import ppo_clip_loss, token_weights
from rl_jax.reinforce.penalties import kl_penalised_rewards
from rl_jax.rollout import generate
from rl_jax.run.spmd import make_mesh, pmapped
from rl_jax.sampling import Sampling, untruncated
from rl_jax.scoring import Reference, completion_logprobs, completion_states, score_completions
from rl_jax.types import Rollout

GROUP, BATCHES, COEFFICIENT = 4, 3000, 0.3
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
def sampled(temperature=1.0):
    """Many batches of rollouts, end to end, and their rewards less the penalty. B = BATCHES * N * G."""
    return sample(PARAMS, REF_PARAMS, *(np.tile(x, (BATCHES, 1)) for x in (PROMPTS, PROMPT_MASK)), temperature)


@jax.jit
def sample(params, ref_params, prompts, prompt_mask, temperature):
    sampling = make_sampling(temperature=temperature)
    rollout = generate(params, jax.random.key(0), prompts, prompt_mask, CONFIG, sampling)
    kl = kl_estimate(rollout.behavior_logprobs, completion_logprobs(ref_params, rollout, CONFIG, sampling), "k1")
    return rollout, kl_penalised_rewards(oracles.reward(rollout), kl, rollout.completion_mask, COEFFICIENT)


@jax.jit
def ascent(params, rollout, advantages, temperature=1.0):
    """What each batch's gradient says of the objective's slope in a few directions. [BATCHES, directions]."""

    def one(batch):
        score_fn = scorer(make_sampling(temperature=temperature))
        gradient, _ = reinforce_gradient(params, *batch, score_fn, normalize="completion")
        return -jnp.asarray(DIRECTIONS) @ ravel_pytree(gradient)[0]

    split = jax.tree.map(lambda x: x.reshape(BATCHES, -1, *x.shape[1:]), (rollout, advantages))
    return jax.lax.map(one, split, batch_size=500)


def p_value(samples, gradient):
    return oracles.mean_p_value(samples, DIRECTIONS @ gradient)


def leave_one_out(rewards):
    return leave_one_out_advantages(rewards, GROUP)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_gradients_have_the_mean_that_enumeration_gives(temperature):
    rollout, rewards = sampled(temperature)
    slopes = ascent(PARAMS, rollout, leave_one_out(rewards), temperature)
    assert p_value(slopes, exact_gradient(temperature)) > SURE


WRONG = {
    "rescaled": lambda rollout, rewards: ascent(PARAMS, rollout, 0.8 * leave_one_out(rewards)),
    "group mean taken for unbiased": lambda rollout, rewards: ascent(
        PARAMS, rollout, group_mean_advantages(rewards, GROUP)
    ),
    "mean over tokens of each sequence": lambda rollout, rewards: ascent(
        PARAMS, rollout, leave_one_out(rewards) / jnp.sum(rollout.completion_mask, axis=1)
    ),
    "another temperature": lambda rollout, rewards: ascent(PARAMS, rollout, leave_one_out(rewards), 0.7),
    "no penalty": lambda rollout, rewards: ascent(PARAMS, rollout, leave_one_out(oracles.reward(rollout))),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_gradients_are_told_apart(name):
    assert p_value(WRONG[name](*sampled()), exact_gradient()) < IMPOSSIBLE


def test_gradient_that_forgets_the_end_token_is_told_apart():
    rollout, rewards = sampled()
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
    rollout = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[:16]), sampled()[0])
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
            sum_parts=functools.partial(sum_over_microbatches, microbatches=microbatches),
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


# Of a policy without tokens: log-probabilities, values and the context are numbers

MASK = jnp.array([[True, True], [True, False], [True, True], [True, False]])
TOY = {"a": jnp.array([0.3, -0.2]), "b": jnp.array(0.7)}
FEATURES = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2, 2)), jnp.float32).at[~MASK].set(0)
TOY_ADVANTAGES = jnp.array([1.0, -2.0, 0.5, 3.0])
BEHAVIOR = FEATURES @ TOY["a"] + jnp.array([[0.5, -0.1], [0.3, 0.0], [-0.6, 0.2], [0.1, 0.0]])
EXTRA = jnp.array([[1.0, 2.0], [3.0, 0.0], [-1.0, 0.5], [2.0, 0.0]])


def toy_scores(params, rollout, context):
    """Entropy and KL are no numbers where masked, nor is the penalty."""
    logprobs = context["features"] @ params["a"]
    hidden = jnp.where(rollout.completion_mask, 0.0, jnp.nan)
    return Scores(logprobs, entropy=jnp.square(logprobs) + hidden, kl=jnp.abs(logprobs) + hidden)


def toy_penalty(scores, context):
    return context["extra"] * scores.logprobs + jnp.where(context["extra"] == 0, jnp.nan, 0.0)


def toy_gradient(advantages=TOY_ADVANTAGES, **options):
    zeros = jnp.zeros((4, 2), jnp.int32)
    rollout = Rollout(zeros, MASK, zeros, MASK, BEHAVIOR, jnp.zeros(4, bool))
    context = {"features": FEATURES, "extra": EXTRA}

    @jax.jit
    def gradient(params, advantages):
        return reinforce_gradient(
            params, rollout, advantages, toy_scores, normalize="token", context=context, **options
        )

    return gradient(TOY, advantages)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_gradient_and_metrics_by_hand(microbatches):
    clip = functools.partial(ppo_clip_loss, clip_low=0.2, clip_high=0.2)
    grads, metrics = toy_gradient(
        loss_fn=clip,
        penalty_fn=toy_penalty,
        sum_parts=functools.partial(sum_over_microbatches, microbatches=microbatches),
    )
    features, mask, behavior = (np.asarray(x, np.float64) for x in (FEATURES, MASK, BEHAVIOR))
    logprobs = features @ np.asarray(TOY["a"], np.float64)
    ratio, advantages = np.exp(logprobs - behavior), np.asarray(TOY_ADVANTAGES)[:, None]
    cut = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    assert 0 < np.sum(cut * mask) < 6
    extra = np.asarray(EXTRA)
    slopes = (extra - np.where(cut, 0, ratio) * advantages) * mask / 6
    np.testing.assert_allclose(grads["a"], np.einsum("bc,bcd->d", slopes, features), rtol=1e-5)
    assert float(grads["b"]) == 0
    gains = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    gap = np.abs(logprobs - behavior)
    whole = np.exp(np.sum(logprobs - behavior, axis=1))
    expected = {
        "loss": np.sum((extra * logprobs - gains) * mask) / 6,
        "entropy": np.sum(logprobs**2 * mask) / 6,
        "kl": np.sum(np.abs(logprobs) * mask) / 4,
        "clipped": np.sum(cut * mask) / 6,
        "logprob_gap": np.sum(gap * mask) / 6,
        "ratio_min": np.min(ratio[mask > 0]),
        "ratio_max": np.max(ratio[mask > 0]),
        "effective_sample_size": np.sum(whole) ** 2 / np.sum(whole**2) / 4,
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_the_loss_is_that_of_reinforce_unless_said_and_no_gradient_flows_through_advantages_or_metrics():
    grads, metrics = toy_gradient()
    slopes = -np.asarray(TOY_ADVANTAGES)[:, None] * np.asarray(MASK) / 6
    np.testing.assert_allclose(grads["a"], np.einsum("bc,bcd->d", slopes, FEATURES), rtol=1e-5)
    assert float(metrics["clipped"]) == 0
    by_token = toy_gradient(jnp.broadcast_to(TOY_ADVANTAGES[:, None], (4, 2)))
    assert_same(by_token, (grads, metrics))
    through = jax.grad(lambda x: sum(map(jnp.sum, jax.tree.leaves(toy_gradient(x)))))(TOY_ADVANTAGES)
    np.testing.assert_array_equal(through, 0)


def test_a_function_is_given_what_it_names():
    quantities = {"a": 1, "b": 2, "c": 3}
    assert supply(lambda b, a, d=4: (b, a, d), quantities) == (2, 1, 4)
    assert supply(functools.partial(lambda a, *, c: (a, c), c=7), {"a": 1}) == (1, 7)


def test_bad_shapes_are_refused():
    rollout, advantages = batch()
    gradient = functools.partial(reinforce_gradient, PARAMS, rollout, normalize="token")
    for wrong in (advantages[:8], advantages[:, :1], advantages[:, 0][:1]):
        with pytest.raises(AssertionError):
            gradient(wrong, scorer(make_sampling()))
    with pytest.raises(InputError, match="16 sequences does not divide into 3"):
        gradient(
            advantages, scorer(make_sampling()), sum_parts=functools.partial(sum_over_microbatches, microbatches=3)
        )


def test_weights_of_parts_are_those_of_the_whole():
    mask = batch()[0].completion_mask
    parts = jnp.concatenate([token_weights(part, "token") for part in jnp.split(mask, 8)]) / 8
    assert jnp.max(jnp.abs(parts - token_weights(mask, "token"))) > 1e-3  # else the tests above could not fail
