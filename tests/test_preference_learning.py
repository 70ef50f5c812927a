"""Learning a reward: its gradient, the ensemble's update, and a known reward recovered from noisy preferences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_jax.learner import apply_gradients, init_state, make_optimizer
from rl_jax.microbatch import sum_over_microbatches
from rl_jax.models.config import llama
from rl_jax.models.reward_model import candidate_rewards, candidates_rollout, ensemble_rewards, init_reward_params
from rl_jax.models.transformer import init_params
from rl_jax.preferences.learning import concordance, ensemble_update, init_ensemble_state, reward_gradient
from rl_jax.preferences.losses import bradley_terry_loss, plackett_luce_loss
from rl_jax.rewards.learned import mean_minus_spread_reward, mean_reward, minimum_reward
from rl_jax.run.spmd import make_mesh, pmapped, put
from rl_jax.types import PreferenceBatch

CONFIG = llama(12, 12, 1, 16, 2)


def pair_loss(rewards, batch):
    return bradley_terry_loss(rewards, batch.labels, batch.margins)


def ranking_loss(rewards, batch):
    return plackett_luce_loss(rewards, batch.labels, jnp.any(batch.completion_mask, axis=2))


def member(seed, config=CONFIG):
    return init_reward_params(jax.random.key(seed), init_params(jax.random.key(100 + seed), config), config)


def random_batch(rows, seed, candidates=2, length=5):
    rng = np.random.default_rng(seed)
    completions = rng.integers(1, CONFIG.vocab_size, (rows, candidates, length))
    mask = np.arange(length) < rng.integers(1, length + 1, (rows, candidates, 1))
    return PreferenceBatch(
        prompts=jnp.asarray(rng.integers(1, CONFIG.vocab_size, (rows, 2))),
        prompt_mask=jnp.ones((rows, 2), bool),
        completions=jnp.asarray(completions),
        completion_mask=jnp.asarray(mask),
        labels=jax.nn.one_hot(jnp.asarray(rng.integers(0, candidates, rows)), candidates),
        margins=jnp.asarray(rng.uniform(size=rows), jnp.float32),
    )


def test_the_gradient_is_of_the_mean_over_prompts_however_they_are_cut():
    params, batch = member(0), random_batch(8, 0)

    def loss(params):
        return jnp.mean(pair_loss(candidate_rewards(params, batch, CONFIG), batch))

    value, expected = jax.jit(jax.value_and_grad(loss))(params)
    for microbatches in (1, 4):

        @jax.jit
        def gradient(params, microbatches=microbatches):
            sum_parts = functools.partial(sum_over_microbatches, microbatches=microbatches)
            return reward_gradient(params, batch, CONFIG, pair_loss, sum_parts)

        grads, metrics = gradient(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), grads, expected)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert not any(np.any(x) for x in jax.tree.leaves(grads["normalizer"]))


def test_concordance_by_hand():
    rewards = jnp.array([[3.0, 1.0, 2.0], [0.0, 0.0, 9.0]])
    labels = jnp.array([[3.0, 2.0, 1.0], [1.0, 0.0, 5.0]])
    mask = jnp.array([[True] * 3, [True, True, False]])
    # Of the first row's pairs two of three agree; of the second's one, a tie.
    np.testing.assert_allclose(concordance(rewards, labels, mask), 2.5 / 4)
    np.testing.assert_allclose(concordance(rewards, jnp.ones((2, 3)), mask), 0.0)


def test_members_learn_as_they_would_alone_on_any_number_of_devices():
    optimizer = make_optimizer(1e-2, 0.1, 1.0, (0.9, 0.95))
    batches = [random_batch(8, seed) for seed in range(2)]
    together = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    params = jax.tree.map(lambda *x: jnp.stack(x), member(0), member(1))
    state = init_ensemble_state(params, optimizer)

    @jax.jit
    def alone(params, batch):
        grads, _ = reward_gradient(params, batch, CONFIG, ranking_loss)
        return apply_gradients(init_state(params, optimizer, 0.0), grads, optimizer)[0].params

    expected = [alone(member(k), batches[k]) for k in range(2)]
    for devices in (1, 4):
        mesh = make_mesh(jax.devices()[:devices])

        def update(state, batch):
            return ensemble_update(state, batch, CONFIG, ranking_loss, optimizer)

        updated, metrics = pmapped(update, mesh, (None, 1), (None, None))(put(state, mesh), put(together, mesh, 1))
        assert int(updated.step) == 1 and int(metrics["nonfinite"]) == 0
        for k in range(2):
            found = jax.tree.map(lambda x, k=k: x[k], updated.params)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected[k])


def test_combinations_by_hand():
    rewards = jnp.array([[1.0, 4.0], [3.0, -2.0]])
    np.testing.assert_allclose(mean_reward(rewards), [2, 1])
    np.testing.assert_allclose(minimum_reward(rewards), [1, -2])
    np.testing.assert_allclose(mean_minus_spread_reward(rewards, spread_weight=0.5), [1.5, -0.5])


def known_reward(batch):
    """A reward by tokens: each is worth something, its place as well."""
    worth = jnp.linspace(-1.5, 1.5, CONFIG.vocab_size)
    places = 1.0 + 0.2 * jnp.arange(batch.completions.shape[-1])[None, None, :]
    return jnp.sum(jnp.where(batch.completion_mask, worth[batch.completions] * places, 0.0), axis=2)


@pytest.mark.slow
def test_a_known_reward_is_recovered_from_noisy_preferences():
    """One member learns from a judge with the known reward, another from one with its opposite, in one program.

    All completions have the same prompt: preferences leave a prompt's mean reward free.
    """
    config = dataclasses.replace(CONFIG, layers=2)

    def same_prompt(batch):
        return dataclasses.replace(batch, prompts=jnp.ones_like(batch.prompts))

    data = same_prompt(random_batch(8192, 7))
    true = known_reward(data)
    judged = jax.random.uniform(jax.random.key(3), (8192,)) < jax.nn.sigmoid(true[:, 0] - true[:, 1])
    both = jnp.stack([judged, ~judged])
    labels = jnp.stack([both, ~both], axis=2).astype(jnp.float32)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 400))
    params = jax.tree.map(lambda *x: jnp.stack(x), *[member(0, config)] * 2)
    state = init_ensemble_state(params, optimizer)

    @jax.jit
    def fit(state):
        def update(state, step):
            def cut(x, axis):
                return jax.lax.dynamic_slice_in_dim(x, step % 64 * 128, 128, axis)

            part = jax.tree.map(lambda x: jnp.stack([cut(x, 0)] * 2), data)
            part = dataclasses.replace(part, labels=cut(labels, 1), margins=jnp.zeros((2, 128)))
            return ensemble_update(state, part, config, pair_loss, optimizer)

        return jax.lax.scan(update, state, jnp.arange(400))[0]

    fresh = same_prompt(random_batch(512, 8))
    found = jax.jit(lambda params, rollout: ensemble_rewards(params, rollout, config))(
        fit(state).params, candidates_rollout(fresh)
    )
    true = np.asarray(known_reward(fresh)).reshape(-1)
    assert np.corrcoef(true, found[0])[0, 1] > 0.95
    assert np.corrcoef(true, found[1])[0, 1] < -0.95
