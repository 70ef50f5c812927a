"""A Gaussian policy through the library: its estimates against the moments of the normal distribution."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.recipes import linear_policy
from experiments.recipes.linear_policy import Config, expected_reward
from rl_jax.errors import InputError
from rl_jax.reinforce.gradient import reinforce_gradient

PARAMS = {"weight": jnp.array([0.3, -0.4]), "bias": jnp.float32(0.5), "log_std": jnp.log(jnp.float32(0.6))}
BASELINE = -0.7
TINY = Config(inputs=2, episodes=12, batch=3, seeds=9)


def score_function(rollout, noise):
    del noise
    advantages = linear_policy.reward(rollout.completions) - BASELINE
    return reinforce_gradient(PARAMS, rollout, advantages, linear_policy.score_fn, normalize="completion")[0]


def pathwise(rollout, noise):
    return linear_policy.pathwise_gradient(PARAMS, rollout.prompts, noise)


def normal_points():
    """Gauss-Hermite quadrature of two inputs and the noise, exact for polynomials of degree 15. [512, 3], [512]."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    points = np.stack(np.meshgrid(nodes, nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 3)
    return points, np.einsum("i,j,k->ijk", *[weights / weights.sum()] * 3).reshape(-1)


@pytest.mark.parametrize(
    ("gradient_fn", "variance"),
    [
        (score_function, linear_policy.score_function_variance(PARAMS, jnp.float32(BASELINE))),
        (pathwise, linear_policy.pathwise_variance(PARAMS)),
    ],
)
def test_both_gradients_have_the_exact_mean_and_variance(gradient_fn, variance):
    """One episode at each point of a quadrature, instead of a sample."""
    points, weights = normal_points()
    states, noise = jnp.asarray(points[:, :2], jnp.float32), jnp.asarray(points[:, 2], jnp.float32)
    episodes = jax.tree.map(lambda x: x[:, None], linear_policy.play_with(PARAMS, states, noise)), noise[:, None]
    gradients = jax.jit(jax.vmap(lambda episode: gradient_fn(*episode)))(episodes)
    mean = jax.tree.map(lambda g: np.tensordot(weights, g, axes=1), gradients)
    exact = jax.grad(lambda params: -expected_reward(params))(PARAMS)
    jax.tree.map(lambda got, wanted: np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3), mean, exact)
    squares = np.square(gradients["bias"] - exact["bias"])
    squares += np.square(gradients["weight"] - exact["weight"][None]).sum(axis=1)
    np.testing.assert_allclose(weights @ squares, variance, rtol=1e-3)


def test_expected_reward_is_the_mean_of_rewards():
    points, weights = normal_points()
    rollout = linear_policy.play_with(PARAMS, jnp.asarray(points[:, :2]), jnp.asarray(points[:, 2]))
    mean = weights @ linear_policy.reward(rollout.completions)
    np.testing.assert_allclose(mean, -(0.25 + 0.25 + 0.36), rtol=1e-5)
    np.testing.assert_allclose(expected_reward(PARAMS), -(0.25 + 0.25 + 0.36), rtol=1e-6)


def test_episodes_are_normal_and_differ():
    rollout, noise = linear_policy.play(PARAMS, jax.random.key(0), inputs=2, batch=10_000)
    columns = np.column_stack([rollout.prompts, noise])
    np.testing.assert_allclose(columns.mean(axis=0), 0, atol=0.05)
    np.testing.assert_allclose(np.cov(columns.T), np.eye(3), atol=0.06)
    assert np.isin(noise, rollout.prompts).mean() < 0.1  # some agree by chance
    again = linear_policy.play_with(PARAMS, rollout.prompts, noise)
    np.testing.assert_allclose(again.completions, rollout.completions)


def test_every_method_learns_and_results_are_written(tmp_path, capsys):
    config = Config(inputs=3, episodes=400, seeds=3, results=tmp_path / "linear", learning_rate=0.02)
    linear_policy.main(config)
    rows = json.loads((tmp_path / "linear/table.json").read_text("utf-8"))
    assert [row["gradient"] for row in rows] == list(linear_policy.METHODS)
    assert all(row["E[reward] at the end"]["value"] > row["E[reward] at the start"]["value"] / 3 for row in rows)
    starts = {row["variance at the start"]["value"] for row in rows}
    assert len(starts) == 2 and None not in starts  # the baseline begins at zero
    assert (tmp_path / "linear/learning.png").read_bytes().startswith(b"\x89PNG")
    assert "pathwise" in capsys.readouterr().out


def test_batches_share_the_episodes_and_divide_the_variance():
    one = linear_policy.run_seeds(dataclasses.replace(TINY, batch=1), "pathwise")
    three = linear_policy.run_seeds(TINY, "pathwise")
    assert one["reward"].shape == (9, 12) and three["reward"].shape == (9, 4)
    np.testing.assert_allclose(three["grad_variance"][:, 0], one["grad_variance"][:, 0] / 3, rtol=1e-5)
    assert len(np.unique(one["reward"][:, 0])) == 9


@pytest.mark.parametrize("learn_std", [True, False])
def test_standard_deviation_is_learned_on_request_alone(learn_std):
    config = Config(inputs=1, episodes=200, seeds=1, learning_rate=0.03, std=0.7, learn_std=learn_std)
    end = linear_policy.run_seeds(config, "pathwise")["reward"][0, -1]
    assert -0.4 < end < 0 if learn_std else -0.6 < end < -0.49


@pytest.mark.parametrize(
    "changes", [{"inputs": 0}, {"batch": 0}, {"seeds": 0}, {"episodes": 0}, {"std": 0.0}, {"learning_rate": -1.0}]
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, changes):
    config = dataclasses.replace(Config(results=tmp_path / "linear"), **changes)
    with pytest.raises(InputError, match="must be"):
        linear_policy.main(config)
    assert not config.results.exists()
