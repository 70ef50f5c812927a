"""The tour takes the steps of the learner, and shows the exact gradient beside its estimates."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import tour
from rl_jax.keys import Purpose, step_key
from rl_jax.learner import init_state, policy_gradient_update
from rl_jax.models.transformer import init_params
from rl_jax.reinforce.estimators import make_estimator
from rl_jax.scoring import completion_logprobs
from rl_jax.types import Rollout

pytestmark = pytest.mark.slow


def test_its_steps_are_those_of_the_learner():
    policy, reference = (init_params(step_key(1, Purpose.INIT, n), tour.MODEL) for n in (0, 1))
    state = init_state(jax.tree.map(lambda x: 15 * x, policy), tour.OPTIMIZER, tour.BETA)

    tokens = jnp.array([[1, 1, 0], [2, 0, 0], [2, 1, 2], [0, 0, 0], [1, 2, 1], [1, 0, 0]])
    mask = jnp.cumsum(jnp.cumsum(tokens == 0, axis=1), axis=1) < 2
    prompts, prompt_mask = (jnp.repeat(x, 3, axis=0) for x in (tour.PROMPTS, tour.PROMPT_MASK))

    @jax.jit
    def both():
        rollout = Rollout(prompts, prompt_mask, tokens, mask, jnp.zeros(mask.shape), mask[:, 2])
        logprobs = completion_logprobs(state.params, rollout, tour.MODEL, tour.SAMPLING)
        rollout = dataclasses.replace(rollout, behavior_logprobs=logprobs)
        after, given = tour.learn(state, reference, rollout)
        updated, _ = policy_gradient_update(
            state,
            rollout,
            tour.reward_fn(rollout),
            estimator=make_estimator("rloo", kl_coefficient=tour.BETA),
            score_fn=tour.score_fn,
            optimizer=tour.OPTIMIZER,
            group_size=tour.SAMPLING.group_size,
            ref_logprobs=given["ref_logprobs"],
        )

        def loss(params):
            terms = given["advantages"][:, None] * completion_logprobs(params, rollout, tour.MODEL, tour.SAMPLING)
            return -jnp.sum(given["weights"] * terms)

        return after.params, updated.params, given["grads"], jax.grad(loss)(state.params)

    ours, theirs, shown, written = both()
    for found, other in ((ours, theirs), (shown, written)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, other)
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), ours, state.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_every_array_is_shown_and_every_group_has_the_exact_gradient(capsys):
    tour.main(tour.Config())
    shown = capsys.readouterr().out
    for name in ("prompts", "prompt_mask", "completions", "completion_mask", "behavior_logprobs", "truncated"):
        assert f"rollout.{name} [6" in shown
    for name in ("rewards", "ref_logprobs", "kl", "charged", "advantages", "weights"):
        assert re.search(rf"^   {name} \[6", shown, re.MULTILINE)
    before, after = map(float, re.findall(r"(-?\d\.\d+) (?:before|after)", shown))
    assert after > before
    errors = [float(line.split()[-2]) for line in shown.strip().splitlines()[-4:]]
    batch, many, every, exactly = errors
    assert exactly == 0 and every < 1e-4 < many < 0.1 < batch
