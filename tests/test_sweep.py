"""Runs side by side are the runs alone, whatever they differ in and however many devices share them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from oracles import CONFIG, EOS, LENGTH, PROMPT_MASK, PROMPTS

from rl_jax.errors import InputError
from rl_jax.keys import Purpose, step_key
from rl_jax.learner import init_state, policy_gradient_update
from rl_jax.reinforce.estimators import make_estimator
from rl_jax.rollout import generate
from rl_jax.run.spmd import make_mesh
from rl_jax.sampling import Sampling
from rl_jax.scoring import make_score_fn, reference_scores
from rl_jax.sweep import make_sweep, product_grid

SAMPLING = Sampling(LENGTH, group_size=2, eos=(EOS,))
REF_PARAMS = oracles.random_params(1)
GRID = product_grid(seed=(3, 4), learning_rate=(0.01, 0.03), kl_coefficient=(0.0, 0.2), temperature=(0.7, 1.0))
SETTINGS = {name: values[[0, 3, 6, 9, 13]] for name, values in GRID.items()}  # every value of each, and 8 devices
UPDATES = 3


def run(setting, ref_params, prompts, prompt_mask):
    """A few updates of RLOO, whole."""
    optimizer = optax.flatten(optax.adam(setting["learning_rate"]))
    sampling = dataclasses.replace(SAMPLING, temperature=setting["temperature"])

    def update(state, step):
        key = step_key(setting["seed"], Purpose.SAMPLE, step)
        rollout = generate(state.params, key, prompts, prompt_mask, CONFIG, sampling)
        ref_logprobs, context = reference_scores(ref_params, rollout, CONFIG, sampling)
        state, metrics = policy_gradient_update(
            state,
            rollout,
            oracles.reward(rollout),
            estimator=make_estimator("rloo"),
            score_fn=make_score_fn(ref_params, CONFIG, sampling),
            optimizer=optimizer,
            group_size=sampling.group_size,
            ref_logprobs=ref_logprobs,
            context=context,
        )
        return state, {name: metrics[name] for name in ("reward", "entropy", "kl", "grad_norm", "kl_coefficient")}

    state = init_state(ref_params, optimizer, setting["kl_coefficient"])
    return jax.lax.scan(update, state, jnp.arange(UPDATES))


@functools.cache
def swept(devices):
    sweep = make_sweep(run, make_mesh(jax.devices()[:devices]))
    return jax.device_get(sweep(SETTINGS, REF_PARAMS, PROMPTS, PROMPT_MASK))


def assert_same(tree, expected):
    for array, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_row_is_the_run_alone():
    """And alone its settings are plain numbers, not traced ones."""
    alone = {name: values[2].item() for name, values in SETTINGS.items()}
    expected = jax.jit(functools.partial(run, alone))(REF_PARAMS, PROMPTS, PROMPT_MASK)
    assert_same(jax.tree.map(lambda x: x[2], swept(1)), expected)


def test_rows_do_not_depend_on_devices():
    assert_same(swept(8), swept(1))


def test_every_setting_tells():
    """The first update's rewards differ by seed and temperature, the later KL by learning rate and coefficient."""
    _, metrics = swept(1)
    assert metrics["reward"].shape == (5, UPDATES)
    np.testing.assert_allclose(metrics["kl_coefficient"][:, 0], SETTINGS["kl_coefficient"])
    assert len(np.unique(metrics["entropy"][:, 0])) > 2 and len(np.unique(metrics["kl"][:, -1])) == 5


def test_product_has_every_combination_once():
    grid = product_grid(seed=(7, 8, 9), rate=(0.5, 1))
    assert {name: (v.tolist(), v.dtype) for name, v in grid.items()} == {
        "seed": ([7, 7, 8, 8, 9, 9], np.int32),
        "rate": ([0.5, 1, 0.5, 1, 0.5, 1], np.float32),
    }


def test_runs_are_not_compiled_twice():
    sweep = make_sweep(lambda setting, x: setting["a"] * x, make_mesh())
    for scale in (1.0, 2.0):
        product = sweep({"a": np.arange(3.0)}, jnp.float32(scale))
        np.testing.assert_array_equal(product, scale * np.arange(3.0))
    assert sweep._cache_size() == 1


def test_what_one_sweep_returns_another_takes():
    """Whatever devices it lies on: 5 runs and their keys, from 8 devices to 3 and to 8."""
    first = make_sweep(lambda setting: (setting["a"] * jnp.ones(2), jax.random.key(setting["a"])), make_mesh())
    ends = first({"a": np.arange(5)})
    for devices in (3, 8):
        mesh = make_mesh(jax.devices()[:devices])
        second = make_sweep(lambda end, shared: end[0] + shared[0][1] + jax.random.uniform(end[1]), mesh)
        uniforms = [jax.random.uniform(jax.random.key(i)) for i in range(5)]
        expected = np.arange(5) + 1 + np.array(uniforms)
        np.testing.assert_allclose(second(ends, ends), np.tile(expected[:, None], (1, 2)), rtol=1e-6)


@pytest.mark.parametrize("settings", [{"a": np.zeros(3), "b": np.zeros(2)}, {"a": 1.0}, {}])
def test_settings_that_do_not_agree_are_refused(settings):
    with pytest.raises(InputError, match="need a value for each run"):
        make_sweep(lambda setting: setting, make_mesh())(settings)
