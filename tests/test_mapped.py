"""The rollout and the update that the experiments map: what one device makes of a batch, and what eight do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.mapped import make_generate, make_learning, prompt_indices
from rl_jax.learner import init_state, policy_gradient_update
from rl_jax.models.config import llama
from rl_jax.models.transformer import init_params
from rl_jax.reinforce.estimators import ESTIMATORS
from rl_jax.rollout import generate
from rl_jax.run.spmd import SUM, each_device, make_mesh, pmapped
from rl_jax.sampling import Sampling
from rl_jax.scoring import make_score_fn, reference_scores

CONFIG = llama(24, 32, layers=1, width=16, heads=2)
SAMPLING = Sampling(12, group_size=2, temperature=0.9, eos=(0, 1, 2))
PARAMS, REF_PARAMS = (init_params(jax.random.key(seed), CONFIG) for seed in (1, 2))
PARAMS, REF_PARAMS = (jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, tree) for tree in (PARAMS, REF_PARAMS))
PROMPTS = jnp.asarray(np.random.default_rng(0).integers(3, 24, (16, 6)), jnp.int32)
MASK = jnp.arange(6)[None, :] >= jnp.arange(16)[:, None] % 5
KEY = jax.random.key(3)
SGD = optax.sgd(1.0)


def plain(params, ref_params, key):
    rollout = generate(params, key, PROMPTS, MASK, CONFIG, SAMPLING)
    ref_logprobs, context = reference_scores(ref_params, rollout, CONFIG, SAMPLING)
    return learn(params, rollout, ref_logprobs, context, score_fn=make_score_fn(ref_params, CONFIG, SAMPLING))


def learn(params, rollout, ref_logprobs, context, **how):
    rewards = jnp.mean(rollout.completions % 3 == 0, axis=1)
    state, metrics = policy_gradient_update(
        init_state(params, SGD, 0.05),
        rollout,
        rewards,
        estimator=dataclasses.replace(ESTIMATORS["rloo"], kl="exact_loss"),
        optimizer=SGD,
        group_size=2,
        ref_logprobs=ref_logprobs,
        context=context,
        **how,
    )
    return rollout, state.params, metrics


@pytest.mark.parametrize(("devices", "slots", "tokens"), [(1, 0, 40), (8, 0, 0), (8, 16, 20)])
def test_mapped_step_is_the_plain_one(devices, slots, tokens):
    mesh = make_mesh(jax.devices()[:devices])
    learning = make_learning(CONFIG, SAMPLING, mesh, 6, tokens)

    def step(params, ref_params, key, prompts, mask):
        rollout = make_generate(CONFIG, SAMPLING, mesh, slots)(params, key, prompts, mask, prompt_indices(prompts))
        scored = learning.reference_scores(ref_params, rollout)
        return learn(
            params, rollout, *scored, score_fn=learning.make_score_fn(ref_params), sum_parts=learning.sum_parts
        )

    mapped = pmapped(step, mesh, (None, None, None, 0, 0), (0, None, None))
    got = jax.device_get(mapped(PARAMS, REF_PARAMS, KEY, PROMPTS, MASK))
    expected = jax.device_get(jax.jit(plain)(PARAMS, REF_PARAMS, KEY))
    lengths = np.sum(expected[0].completion_mask, axis=1)
    assert lengths.min() < 4 and lengths.max() > 8  # else there would be no padding to leave out
    np.testing.assert_array_equal(got[0].completions, expected[0].completions)
    for array, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=2e-4, atol=2e-5)


def test_each_device_goes_its_own_way_and_sums_are_added_up():
    mesh = make_mesh()

    def count(limit):
        steps, _ = jax.lax.while_loop(lambda c: c[0] < limit[0], lambda c: (c[0] + 1, c[1]), (0, limit))
        return jnp.full(1, steps), {"sum": jnp.sum(limit)}, jnp.float32(7)

    limits = jnp.arange(8) * 3
    steps, total, constant = jax.jit(each_device(count, mesh, (0,), (0, SUM, None)))(limits)
    assert steps.tolist() == limits.tolist() and int(total["sum"]) == 84 and float(constant) == 7
