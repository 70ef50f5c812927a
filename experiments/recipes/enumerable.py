"""A problem in which everything can be counted: tabular policies, two prompts, a random reward for each completion.

Letters: N prompts, K completions that there are, S prefixes, B sequences, C completion length, V vocabulary,
P = N * S * V parameters.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.models.tabular import init_table, prefix_nodes, tabular_logits, tabular_values
from rl_jax.reinforce import exact
from rl_jax.reinforce.distributions import entropy, exact_kl, token_logprobs
from rl_jax.reinforce.gradient import Scores
from rl_jax.reinforce.penalties import token_rewards
from rl_jax.types import Array, PyTree, Rollout

PROMPTS = np.array([[0], [1]], np.int32)
EOS = 0


class Problem(NamedTuple):
    """A policy, a reference and a reward, and everything that there is to be sampled.

    Attributes:
        completions: every completion of each prompt. B = N * K.
        params: "policy", logits [N, S, V], and "values", the critic's [N, S].
        ref_table: the reference policy's logits. [N, S, V].
        sampler_table: those of another policy to sample from. [N, S, V].
        rewards: of each completion, by the number that its tokens are the digits of. [N, V^C].
        greedy_rewards: of each prompt's greedy completion. [N].
    """

    completions: Rollout
    params: PyTree
    ref_table: Array
    sampler_table: Array
    rewards: Array
    greedy_rewards: Array


def make_problem(
    key: Array, vocab_size: int, length: int, kl_coefficient: float, off_policy: float, critic_error: float
) -> Problem:
    """A random policy, reference, reward and sampling policy, and a critic that is somewhat wrong.

    Args:
        key: of everything random.
        vocab_size: V; token 0 ends a completion.
        length: C.
        kl_coefficient: reward units a nat, in what the critic expects.
        off_policy: standard deviation of what the sampling policy's logits differ by from the policy's.
        critic_error: standard deviation of what the critic is wrong by, reward units.
    """
    keys = jax.random.split(key, 5)
    shape = (len(PROMPTS), vocab_size, length)
    table, ref_table = (init_table(key, *shape) for key in keys[:2])
    completions = exact.enumerated_rollout(PROMPTS, np.ones(PROMPTS.shape, bool), vocab_size, length, (EOS,))
    problem = Problem(
        completions,
        params={"policy": table, "values": jnp.zeros(table.shape[:2])},
        ref_table=ref_table,
        sampler_table=table + init_table(keys[2], *shape, off_policy),
        rewards=1 + jax.random.normal(keys[3], (len(PROMPTS), vocab_size**length)),
        greedy_rewards=jnp.zeros(len(PROMPTS)),
    )
    values = expected_returns(problem, kl_coefficient) + critic_error * jax.random.normal(keys[4], table.shape[:2])
    likeliest = jnp.argmax(tabular_logits(table, completions), axis=-1) == completions.completions
    greedy = jnp.all(likeliest | ~completions.completion_mask, axis=1)
    by_prompt = jnp.where(greedy, reward(problem, completions), 0.0).reshape(len(PROMPTS), -1)
    return problem._replace(params=problem.params | {"values": values}, greedy_rewards=jnp.sum(by_prompt, axis=1))


def reward(problem: Problem, rollout: Rollout) -> Array:
    """A number drawn once for each completion of each prompt. [B]."""
    places = problem.ref_table.shape[2] ** jnp.arange(rollout.completions.shape[1])
    # Padding makes no two completions equal: none is the beginning of another.
    return problem.rewards[rollout.prompts[:, -1], rollout.completions @ places]


def expected_returns(problem: Problem, kl_coefficient: float) -> Array:
    """Rewards less the divergence's price that are yet to come after each prefix, on average. [N, S]."""
    rollout, mask = problem.completions, problem.completions.completion_mask
    tokens, ref_tokens = (completion_logprobs(x, rollout) for x in (problem.params["policy"], problem.ref_table))
    rewards = token_rewards(reward(problem, rollout), tokens - ref_tokens, mask, kl_coefficient)
    returns = jnp.flip(jnp.cumsum(jnp.flip(rewards, axis=1), axis=1), axis=1)
    weights = jnp.where(mask, jnp.exp(jnp.sum(jnp.where(mask, tokens, 0.0), axis=1, keepdims=True)), 0.0)
    places = (rollout.prompts[:, -1:], prefix_nodes(rollout.completions, problem.ref_table.shape[2]))
    empty = jnp.zeros(problem.ref_table.shape[:2])
    total = empty.at[places].add(weights)
    return empty.at[places].add(weights * returns) / jnp.where(total > 0, total, 1.0)


def completion_logprobs(table: Array, rollout: Rollout) -> Array:
    """Of each completion token under a tabular policy. [B, C]."""
    return token_logprobs(tabular_logits(table, rollout), rollout.completions)


def score_fn(params: PyTree, rollout: Rollout, ref_logits: Array) -> Scores:
    """The tabular policy and its critic, as the library asks for them. The context is the reference's [B, C, V]."""
    logits = tabular_logits(params["policy"], rollout)
    values = tabular_values(params["values"], rollout, logits.shape[-1])
    return Scores(token_logprobs(logits, rollout.completions), entropy(logits), exact_kl(logits, ref_logits), values)


def completions_of(problem: Problem, prompts: int) -> Rollout:
    """Every completion of the first prompts."""
    rows = prompts * len(problem.completions.prompts) // len(PROMPTS)
    return jax.tree.map(lambda x: x[:rows], problem.completions)


def objective(table: Array, problem: Problem, prompts: int, kl_coefficient: Array | float) -> Array:
    """E[reward] - kl_coefficient * KL(policy || reference), exact, the mean over the first prompts. []."""
    completions = completions_of(problem, prompts)
    logprobs, ref_logprobs = (
        exact.sequence_logprobs(completion_logprobs(x, completions), completions.completion_mask, prompts)
        for x in (table, problem.ref_table)
    )
    rewards = reward(problem, completions).reshape(prompts, -1)
    return exact.objective(logprobs, ref_logprobs, rewards, kl_coefficient)
