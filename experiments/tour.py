"""A step of REINFORCE, array by array, on a policy so small that its exact gradient can be counted.

    python experiments/tour.py
    python experiments/tour.py --seed 1

A Transformer over three tokens completes two prompts. Every array of the step is shown: its name in the library, its
shape, what it is, its first rows. At the end the gradient of that one batch, the mean of 1,024 such batches, and the
mean over every group of completions that could be sampled stand beside the exact gradient of E[r] - beta KL.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from rl_jax.keys import Purpose, check_seed, step_key
from rl_jax.learner import apply_gradients, init_state
from rl_jax.models.config import llama
from rl_jax.models.transformer import init_params
from rl_jax.reinforce import exact
from rl_jax.reinforce.advantages import leave_one_out_advantages
from rl_jax.reinforce.distributions import kl_estimate
from rl_jax.reinforce.gradient import Scores, reinforce_gradient
from rl_jax.reinforce.objectives import token_weights
from rl_jax.reinforce.penalties import kl_penalised_rewards
from rl_jax.rewards.tokens import token_share
from rl_jax.rollout import generate
from rl_jax.run.loop import run_main
from rl_jax.run.spmd import make_mesh, pmapped
from rl_jax.sampling import Sampling
from rl_jax.scoring import completion_logprobs, score_completions
from rl_jax.types import Array, PyTree, Rollout, TrainState

TOKENS = np.array([".", "a", "b"])  # the first ends a completion
PROMPTS, PROMPT_MASK = np.array([[0, 1], [2, 1]], np.int32), np.array([[False, True], [True, True]])  # "a" and "ba"
MODEL = llama(vocab_size=3, context=5, layers=1, width=8, heads=2, mlp_width=8)
SAMPLING = Sampling(length=3, group_size=3, eos=(0,))
BETA = 0.1  # reward that a nat of divergence from the reference policy costs
OPTIMIZER = optax.sgd(0.1)
BATCHES = 1_024


@dataclasses.dataclass(frozen=True)
class Config:
    """Walk through a step of REINFORCE."""

    seed: int = 0
    """Seed of the policy, the reference and the samples."""


def reward_fn(rollout: Rollout) -> Array:
    """The share of a completion's tokens that are "a". [B]."""
    return token_share(rollout, jnp.array([1]))


def score_fn(params: PyTree, rollout: Rollout, context: Any) -> Scores:
    del context
    return score_completions(params, rollout, MODEL, SAMPLING)


def learn(state: TrainState, reference: PyTree, rollout: Rollout) -> tuple[TrainState, dict[str, Any]]:
    """One update by RLOO, and what its steps give; `policy_gradient_update` with that row takes the same steps."""
    rewards = reward_fn(rollout)
    ref_logprobs = completion_logprobs(reference, rollout, MODEL, SAMPLING)
    kl = kl_estimate(rollout.behavior_logprobs, ref_logprobs, "k1")
    charged = kl_penalised_rewards(rewards, kl, rollout.completion_mask, BETA)
    advantages = leave_one_out_advantages(charged, SAMPLING.group_size)
    weights = token_weights(rollout.completion_mask, "completion")
    grads, _ = reinforce_gradient(state.params, rollout, advantages, score_fn, normalize="completion")
    after, _ = apply_gradients(state, grads, OPTIMIZER)
    given = {"rewards": rewards, "ref_logprobs": ref_logprobs, "kl": kl, "charged": charged}
    return after, given | {"advantages": advantages, "weights": weights, "grads": grads}


def batches(state: TrainState, reference: PyTree, keys: Array) -> tuple[Rollout, TrainState, dict[str, Any]]:
    """A rollout for each key [M], and what is learned from it: everything [M, ...]."""

    def batch(key: Array) -> tuple[Rollout, TrainState, dict[str, Any]]:
        rollout = generate(state.params, key, jnp.asarray(PROMPTS), jnp.asarray(PROMPT_MASK), MODEL, SAMPLING)
        return rollout, *learn(state, reference, rollout)

    return jax.vmap(batch)(keys)


def objective(params: PyTree, reference: PyTree) -> Array:
    """E[r] - beta KL, exact: a sum over the 15 completions that a prompt can have, the mean over the prompts. []."""
    every = exact.enumerated_rollout(PROMPTS, PROMPT_MASK, MODEL.vocab_size, SAMPLING.length, SAMPLING.eos)
    logprobs, ref_logprobs = (
        exact.sequence_logprobs(completion_logprobs(x, every, MODEL, SAMPLING), every.completion_mask, len(PROMPTS))
        for x in (params, reference)
    )
    return exact.objective(logprobs, ref_logprobs, reward_fn(every).reshape(logprobs.shape), BETA)


def mean_of_groups(state: TrainState, reference: PyTree) -> PyTree:
    """The mean gradient over every group that the policy could sample for a prompt, each by its probability."""

    def of_prompt(prompt: np.ndarray, mask: np.ndarray) -> PyTree:
        every = exact.enumerated_rollout(prompt, mask, MODEL.vocab_size, SAMPLING.length, SAMPLING.eos)
        logprobs = completion_logprobs(state.params, every, MODEL, SAMPLING)
        return exact.expected_gradient(
            lambda rollout: learn(state, reference, rollout)[1]["grads"], every, logprobs, SAMPLING.group_size
        )

    return jax.tree.map(lambda a, b: (a + b) / 2, *map(of_prompt, np.split(PROMPTS, 2), np.split(PROMPT_MASK, 2)))


def show(name: str, array: Array | np.ndarray, what: str) -> None:
    """Prints an array: name, shape, what it is, and its numbers, where they are many the first of each row."""
    values = np.asarray(array)
    print(f"\n   {name} {list(values.shape)}: {what}")
    for row in values if values.ndim > 1 else values[None]:
        print("     ", np.array2string(row[:6], precision=3, suppress_small=True))


def main(config: Config) -> None:
    check_seed(config.seed)
    policy, reference = (  # of weights much larger than usual, or else all tokens would be about as likely
        jax.tree.map(lambda x: 15 * x if x.ndim > 1 else x, init_params(step_key(config.seed, Purpose.INIT, n), MODEL))
        for n in (0, 1)
    )
    state, mesh = init_state(policy, OPTIMIZER, BETA), make_mesh(jax.devices()[:1])
    keys = jnp.stack([step_key(config.seed, Purpose.SAMPLE, n) for n in range(BATCHES)])
    everything = pmapped(batches, mesh, (None, None, 0), 0)(state, reference, keys)
    rollout, after, given = jax.tree.map(lambda x: x[0], everything)

    print("N = 2 prompts, G = 3 completions of each, B = N G sequences, P prompt length, C completion length")
    print("\n1. rollout = generate(params, key, prompts, prompt_mask, config, sampling)")
    show("rollout.prompts", TOKENS[rollout.prompts], "[B, P], each prompt once for each of its completions")
    show("rollout.prompt_mask", rollout.prompt_mask, "[B, P], false on the padding, which is on the left")
    show("rollout.completions", TOKENS[rollout.completions], "[B, C], what was sampled; nothing after its end counts")
    show(
        "rollout.completion_mask", rollout.completion_mask, "[B, C], true up to the end, and on the token that ends it"
    )
    show("rollout.behavior_logprobs", rollout.behavior_logprobs, "[B, C], log of the probability it was drawn with")
    show("rollout.truncated", rollout.truncated, "[B], cut at C tokens")
    print("\n2. rewards = reward_fn(rollout), and what divergence from the reference costs")
    show("rewards", given["rewards"], '[B], the share of tokens that are "a"')
    show("ref_logprobs", given["ref_logprobs"], "[B, C], of the same tokens under the reference policy")
    show("kl", given["kl"], "[B, C], the k1 estimate: behavior_logprobs - ref_logprobs")
    show("charged", given["charged"], f"[B], rewards - {BETA} times the completion's sum of kl")
    print("\n3. advantages = leave_one_out_advantages(charged, group_size)")
    show("advantages", given["advantages"], "[B], charged less the mean of the others in the group")
    print('\n4. grads, metrics = reinforce_gradient(params, rollout, advantages, score_fn, normalize="completion")')
    show("weights", given["weights"], "[B, C], 1 / B each: the loss is -sum(weights * advantages * logprobs)")
    path, leaf = jax.tree_util.tree_leaves_with_path(given["grads"])[0]
    show(f"grads{jax.tree_util.keystr(path)}", leaf, "an array of the gradient, which has the shape of params")

    print("\n5. state, metrics = apply_gradients(state, grads, optimizer)")
    value_fn = pmapped(jax.value_and_grad(objective), mesh, (None, None), None)
    (before, gradient), (later, _) = value_fn(policy, reference), value_fn(after.params, reference)
    print(f"\n   E[r] - {BETA} KL, by counting all completions: {before:.4f} before, {later:.4f} after")

    print("\n6. The gradient of minus that: its first five numbers; its error, as a share of its length; its cosine\n")
    exactly = -ravel_pytree(gradient)[0]
    for name, grads in {
        "this batch": given["grads"],
        f"mean of {BATCHES:,} batches": jax.tree.map(lambda x: jnp.mean(x, axis=0), everything[2]["grads"]),
        "mean of every group": pmapped(mean_of_groups, mesh, (None, None), None)(state, reference),
        "exact": jax.tree.map(jnp.negative, gradient),
    }.items():
        values, length = ravel_pytree(grads)[0], jnp.linalg.norm(exactly)
        error, cosine = jnp.linalg.norm(values - exactly) / length, values @ exactly / jnp.linalg.norm(values) / length
        print(f"   {name:21s}", *(f"{x:8.4f}" for x in values[:5]), f"{error:12.6f} {cosine:10.6f}")


if __name__ == "__main__":
    run_main(main, Config)
