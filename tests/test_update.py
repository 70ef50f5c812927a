"""A whole step of token-reward RL: sample, reward, update."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.flatten_util import ravel_pytree
from oracles import CONFIG, EOS, LENGTH, PROMPT_MASK, PROMPTS

from rl_jax.keys import Purpose, step_key
from rl_jax.learner import init_state, policy_gradient_update
from rl_jax.microbatch import sum_over_microbatches
from rl_jax.reinforce.advantages import moving_average_advantages
from rl_jax.reinforce.estimators import ESTIMATORS
from rl_jax.rollout import generate
from rl_jax.run.spmd import make_mesh, pmapped, put
from rl_jax.sampling import Sampling
from rl_jax.scoring import completion_logprobs, make_score_fn, reference_scores

COEFFICIENT = 0.3
SAMPLING = Sampling(LENGTH, group_size=2, temperature=0.7, eos=(EOS,))
PARAMS, REF_PARAMS = oracles.random_params(1), oracles.random_params(2)
BATCH = tuple(jnp.asarray(np.tile(x, (32, 1))) for x in (PROMPTS, PROMPT_MASK))
SGD = optax.sgd(1.0)
ADAM = optax.flatten(optax.adam(0.03))  # quick to compile


def make_update(optimizer, estimator, **more):
    def update(state, ref_params, rollout, rewards):
        ref_logprobs, context = reference_scores(ref_params, rollout, CONFIG, SAMPLING)
        return policy_gradient_update(
            state,
            rollout,
            rewards,
            estimator=estimator,
            score_fn=make_score_fn(ref_params, CONFIG, SAMPLING),
            optimizer=optimizer,
            group_size=SAMPLING.group_size,
            ref_logprobs=ref_logprobs,
            context=context,
            **more,
        )

    return update


def assert_same(tree, expected, atol=1e-6):
    for array, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=atol * np.abs(wanted).max())


def rounding(metrics):
    """Takes out what is rounding alone on policy, and says how much it is."""
    ratios = [abs(metrics.pop(name) - 1) for name in ("ratio_min", "ratio_max", "effective_sample_size")]
    return max(metrics.pop("logprob_gap"), *ratios)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def by_probability(rewards, baseline):
    """Each completion of an enumeration counts by its probability; the moving average comes along."""
    probabilities = jnp.exp(oracles.sequence_logprobs(PARAMS, SAMPLING.temperature)).reshape(-1)
    weights = probabilities * (len(rewards) / len(PROMPTS))
    return rewards * weights, moving_average_advantages(rewards, baseline, baseline_decay=0.9)[1]


@functools.cache
def enumerated():
    """Every completion, as if each had been sampled, and its reward."""
    rollout = oracles.enumerated_rollout()
    logprobs = jax.jit(completion_logprobs, static_argnums=(2, 3))(PARAMS, rollout, CONFIG, SAMPLING)
    return dataclasses.replace(rollout, behavior_logprobs=logprobs), oracles.reward(rollout)


WEIGHED = dataclasses.replace(ESTIMATORS["reinforce_moving_average"], advantages=by_probability)
update = jax.jit(make_update(SGD, WEIGHED))


def test_update_follows_the_exact_gradient():
    state, _ = update(init_state(PARAMS, SGD, COEFFICIENT), REF_PARAMS, *enumerated())
    gradient = flat(oracles.objective_gradient(PARAMS, REF_PARAMS, COEFFICIENT, SAMPLING.temperature))
    np.testing.assert_allclose(flat(state.params) - flat(PARAMS), gradient, rtol=1e-4, atol=1e-5)
    assert np.abs(gradient).max() > 0.1


@pytest.mark.parametrize(("devices", "microbatches"), [(8, 1), (1, 4)])
def test_update_does_not_depend_on_devices_or_microbatches(devices, microbatches):
    mesh = make_mesh(jax.devices()[:devices])
    sum_parts = functools.partial(sum_over_microbatches, microbatches=microbatches)
    other = pmapped(make_update(SGD, WEIGHED, sum_parts=sum_parts), mesh, (None, None, 0, 0), None)
    got, expected = (fn(init_state(PARAMS, SGD, COEFFICIENT), REF_PARAMS, *enumerated()) for fn in (other, update))
    assert max(rounding(metrics) for _, metrics in (got, expected)) < 1e-5
    assert_same(jax.device_get(got), jax.device_get(expected))


def test_metrics_by_hand():
    rollout, rewards = enumerated()
    rewards = rewards.at[:2].set(5.0)
    _, metrics = update(init_state(PARAMS, SGD, COEFFICIENT), REF_PARAMS, rollout, rewards)
    mask = np.asarray(rollout.completion_mask)
    logprobs, ref_logprobs = (oracles.sequence_logprobs(p, SAMPLING.temperature) for p in (PARAMS, REF_PARAMS))
    expected = {
        "reward": np.mean(rewards),
        "reward_std": np.std(rewards),
        "kl_k1": np.mean(logprobs - ref_logprobs),
        "length": mask.sum(axis=1).mean(),
        "truncated": 27 / 40,  # three tokens, each one of the three that do not end
        "zero_signal_groups": 1 / 40,
        "tokens": mask.sum(),
        "nonfinite": 0,
        "kl_coefficient": COEFFICIENT,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    more = {"loss", "entropy", "kl", "logprob_gap", "grad_norm", "clipped", "ratio_min", "ratio_max"}
    assert set(metrics) - set(expected) == more | {"effective_sample_size"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_reward_that_is_not_finite_changes_neither_parameters_nor_baseline(bad):
    rollout, rewards = enumerated()
    before = dataclasses.replace(init_state(PARAMS, SGD, COEFFICIENT), baseline=jnp.float32(2.0))
    skipped, metrics = update(before, REF_PARAMS, rollout, rewards.at[3].set(bad))
    assert (int(metrics["nonfinite"]), int(skipped.step), float(skipped.baseline)) == (1, 1, 2.0)
    np.testing.assert_array_equal(flat(skipped.params), flat(PARAMS))
    after, metrics = update(skipped, REF_PARAMS, rollout, rewards)
    penalised = metrics["reward"] - COEFFICIENT * metrics["kl_k1"]
    np.testing.assert_allclose(after.baseline, 0.9 * 2.0 + 0.1 * penalised, rtol=1e-5)
    assert np.any(flat(after.params) != flat(PARAMS))


def test_first_state_and_later_ones_share_a_program():
    rollout, rewards = enumerated()
    state, _ = update(init_state(PARAMS, SGD, COEFFICIENT), REF_PARAMS, rollout, rewards)
    update(state, REF_PARAMS, rollout, rewards)
    assert update._cache_size() == 1


def step(state, ref_params, key, prompts, prompt_mask):
    """Of token-reward RL, whole."""
    rollout = generate(state.params, key, prompts, prompt_mask, CONFIG, SAMPLING)
    return make_update(ADAM, ESTIMATORS["rloo"])(state, ref_params, rollout, oracles.reward(rollout))


donating_step = pmapped(step, make_mesh(jax.devices()[:1]), (None, None, None, 0, 0), None, donate=(0,))


def fresh_state(params):
    return put(init_state(params, ADAM, COEFFICIENT), make_mesh(jax.devices()[:1]))


def test_seeds_in_parallel_are_seeds_alone():
    keys = jax.vmap(lambda seed: step_key(seed, Purpose.SAMPLE))(jnp.arange(3))
    params = [oracles.random_params(3 + seed) for seed in range(3)]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[init_state(p, ADAM, COEFFICIENT) for p in params])
    together = jax.jit(jax.vmap(step, in_axes=(0, None, 0, None, None)))(states, REF_PARAMS, keys, *BATCH)
    for seed in range(3):
        key = step_key(seed, Purpose.SAMPLE)
        alone = donating_step(fresh_state(params[seed]), REF_PARAMS, key, *BATCH)
        one = jax.tree.map(lambda x, seed=seed: x[seed], together)
        assert max(rounding(metrics) for _, metrics in (one, alone)) < 1e-5
        assert_same(one, alone, atol=1e-5)
    assert len(set(together[1]["reward"].tolist())) == 3


def test_policy_climbs_to_the_best_there_is():
    """That is coefficient * log E_ref[exp(reward / coefficient)]; on the way nothing is compiled twice."""
    state = fresh_state(REF_PARAMS)
    first = state.params
    for number in range(200):
        state, metrics = donating_step(state, REF_PARAMS, step_key(0, Purpose.SAMPLE, number), *BATCH)
    assert donating_step._cache_size() == 1
    assert all(x.is_deleted() for x in jax.tree.leaves(first))
    assert (int(state.step), int(metrics["nonfinite"])) == (200, 0)

    ref_logprobs = oracles.sequence_logprobs(REF_PARAMS, SAMPLING.temperature)
    logprobs = oracles.sequence_logprobs(state.params, SAMPLING.temperature)
    rewards = enumerated()[1].reshape(ref_logprobs.shape)
    best = COEFFICIENT * np.mean(jax.nn.logsumexp(ref_logprobs + rewards / COEFFICIENT, axis=1))
    start, end = (oracles.objective(x, ref_logprobs, COEFFICIENT) for x in (ref_logprobs, logprobs))
    assert start + 0.5 * (best - start) < end < best + 1e-5
