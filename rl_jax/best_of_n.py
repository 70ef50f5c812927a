"""The best of n samples, and rejection sampling: policies made of another policy and a reward, and what they earn.

Letters: N prompts, G completions of each, B = N * G sequences.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import rankdata

from rl_jax.errors import InputError
from rl_jax.evaluation import Estimate, share_interval
from rl_jax.types import Array, Rollout


def best_of_n_weights(rewards: np.ndarray, n: int) -> np.ndarray:
    """Chance of each of G completions to be the best of n of them, drawn without replacement.

    With l completions of a lower reward and t of the same, itself included, it is
    (C(l + t, n) - C(l, n)) / C(G, n) / t: the share of the subsets whose best has this reward, in equal parts to those
    that tie. A mean with these weights is the mean over all C(G, n) subsets: the expectation is that of one subset, and
    no other unbiased estimator from the same samples varies less (Nakano 2021, "WebGPT", appendix I; Halmos 1946).

    Args:
        rewards: [N, G].
        n: from 1 to G.

    Returns:
        float64 [N, G]; each row sums to 1.

    Raises:
        InputError: n is not from 1 to G, or a reward is not a number.
    """
    rewards = np.asarray(rewards)
    chex.assert_rank(rewards, 2)
    group = rewards.shape[1]
    if not 1 <= n <= group:
        raise InputError(f"The best of {n} cannot be told from {group} completions a prompt: give n from 1 to {group}.")
    if np.isnan(rewards).any():
        raise InputError("A reward is not a number: none of its prompt's completions can be called the best.")
    # C(m, n) / C(G, n) for m from 0 to G, each from the one above it: no factorial that could overflow.
    counts = np.arange(group, 0, -1)
    shares = np.append(1.0, np.cumprod(np.maximum(counts - n, 0) / counts))[::-1]
    lower = rankdata(rewards, "min", axis=1).astype(int) - 1
    no_higher = rankdata(rewards, "max", axis=1).astype(int)
    return (shares[no_higher] - shares[lower]) / (no_higher - lower)


def pass_at_k(correct: np.ndarray, k: int) -> Estimate:
    """Chance that one of k completions is correct: the mean of 1 - C(G - c, k) / C(G, k) with c of G correct.

    It is the best of k of a reward that is 0 or 1 (Chen 2021, "Evaluating large language models trained
    on code", eq. 1).

    Args:
        correct: 1 or true for the correct, 0 or false for the others. [N, G].
        k: from 1 to G.

    Raises:
        InputError: something in `correct` is neither 0 nor 1, or k is not from 1 to G.
    """
    correct = np.asarray(correct, np.float64)
    if not is_binary(correct):
        raise InputError("pass@k is of rewards that are 0 or 1, and a reward here is neither.")
    return share_interval(np.sum(best_of_n_weights(correct, k) * correct, axis=1))


def is_binary(rewards: np.ndarray) -> bool:
    """Whether every reward is 0 or 1."""
    return bool(np.isin(rewards, (0, 1)).all())


def best_of_n_kl_bound(n: Any) -> Any:
    """log n - (n - 1) / n, nats: the most that the best of n can diverge from the policy that is sampled.

    It is approached where all rewards differ and no completion is likely (Beirami 2024, arXiv 2401.01879, theorem 3.1).
    A real n serves as well: it is the KL from a uniform variable to one with the distribution function u^n.

    Args:
        n: at least 1; a number, or an array of them.

    Returns:
        A number or an array, as `n` is.

    Raises:
        InputError: an n below 1.
    """
    n = np.asarray(n, np.float64)
    if not (n >= 1).all():
        raise InputError(f"There is no best of {n}: give n of at least 1.")
    return (np.log(n) - (n - 1) / n)[()]


def choose_best(rollout: Rollout, rewards: Array, group_size: int) -> Rollout:
    """Best of n as a policy: of every group the completion with the highest reward, the first of those that tie.

    Args:
        rollout: B = N * n sequences, groups consecutive.
        rewards: [B].
        group_size: n.

    Returns:
        A rollout of N sequences. Its `behavior_logprobs` remain those of the policy that sampled.
    """
    return _pick(rollout, jnp.argmax(_grouped(rollout, rewards, group_size), axis=1))


def choose_by_rejection(
    key: Array,
    rollout: Rollout,
    rewards: Array,
    group_size: int,
    beta: Array | float,
    highest: Array | None = None,
    index: Array | None = None,
) -> tuple[Rollout, Array]:
    """Rejection sampling as a policy: of every group the first completion that is accepted.

    A completion is accepted with probability exp((r - highest) / beta), so that the accepted are samples of
    pi_ref(y) exp(r(y) / beta) / Z, the policy of the highest E[r] - beta KL. That is exact with an upper bound of the
    reward; with the highest reward of the group, the default, some completion is always accepted, and the policy lies
    between the target and pi_ref, nearer the target the larger the group (Liu 2023, "Statistical rejection sampling
    improves preference optimization", algorithm 1).

    Args:
        key: the key of this step.
        rollout: B = N * G sequences of the reference policy, groups consecutive.
        rewards: [B].
        group_size: G.
        beta: above 0, reward units a nat; towards 0 it is the best of G, and a large one takes the first. [].
        highest: no reward of the prompt is above it. [N]; default the highest of each group.
        index: global index of each prompt, where the rollout is part of a larger batch. int32 [N]; default 0 to N - 1.

    Returns:
        A rollout of N sequences; where none of a group is accepted, its first. And how many were accepted, int32 [N].
    """
    grouped = _grouped(rollout, rewards, group_size)
    prompts = grouped.shape[0]
    highest = jnp.max(grouped, axis=1) if highest is None else highest
    index = jnp.arange(prompts) if index is None else index
    chex.assert_shape([highest, index], (prompts,))
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
    uniforms = jax.vmap(lambda prompt_key: jax.random.uniform(prompt_key, (group_size,)))(keys)
    accepted = uniforms < jnp.exp((grouped - highest[:, None]) / beta)
    return _pick(rollout, jnp.argmax(accepted, axis=1)), jnp.sum(accepted, axis=1)


def _grouped(rollout: Rollout, rewards: Array, group_size: int) -> Array:
    """[B] -> [N, G]."""
    chex.assert_rank(rewards, 1)
    chex.assert_equal_shape_prefix([rewards, rollout.completions], 1)
    return rewards.reshape(-1, group_size)


def _pick(rollout: Rollout, chosen: Array) -> Rollout:
    """One completion of each group, by its place there. int32 [N]."""
    rows = jnp.arange(len(chosen)) * (len(rollout.completions) // len(chosen)) + chosen
    return jax.tree.map(lambda x: x[rows], rollout)
