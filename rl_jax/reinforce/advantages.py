"""Rewards to advantages. Each function is unbiased for the policy gradient unless its docstring says otherwise.

Whatever is subtracted from the return of a token without looking at that token, or at those after it, leaves the
expected gradient as it is (Williams 1992; Sutton 2000). The functions differ in what they subtract, and in what they
divide by, which does change the gradient. Groups are consecutive: completions g G to g G + G - 1 share a prompt.
"""

import chex
import jax
import jax.numpy as jnp

from rl_jax.masked import masked_mean, masked_var
from rl_jax.types import Array

STD_EPSILON = 1e-4  # added to a group's standard deviation
WHITEN_EPSILON = 1e-8  # added to a batch's variance


def total_rewards(rewards: Array) -> Array:
    """The rewards themselves: REINFORCE without a baseline (Williams 1992). [B] -> [B]."""
    chex.assert_rank(rewards, 1)
    return rewards


def moving_average_advantages(rewards: Array, baseline: Array, *, baseline_decay: float) -> tuple[Array, Array]:
    """Each reward less a baseline from earlier steps (reinforcement comparison, Sutton 1984; Williams 1992).

    Args:
        rewards: [B].
        baseline: the moving average before this step; not a number before the first, which then takes the mean of
            its own rewards, and is biased by (B - 1) / B. [].
        baseline_decay: how much of the old average stays.

    Returns:
        Advantages [B], and the baseline [] for the next step.
    """
    chex.assert_rank([rewards, baseline], [1, 0])
    mean = jnp.mean(rewards)
    baseline = jnp.where(jnp.isnan(baseline), mean, baseline)
    return rewards - baseline, baseline_decay * baseline + (1 - baseline_decay) * mean


def greedy_advantages(rewards: Array, greedy_rewards: Array) -> Array:
    """Each reward less that of the prompt's greedy completion: ReMax (Li 2023, eq. 5).

    Args:
        rewards: [B].
        greedy_rewards: of the completion that takes the most likely token each time, for each sequence's prompt. [B].

    Returns:
        [B].
    """
    chex.assert_rank([rewards, greedy_rewards], 1)
    chex.assert_equal_shape([rewards, greedy_rewards])
    return rewards - greedy_rewards


def leave_one_out_advantages(rewards: Array, group_size: int) -> Array:
    """Each reward less the mean of the others in its group: RLOO (Kool 2019; Ahmadian 2024, eq. 8).

    Args:
        rewards: [B].
        group_size: G, at least 2.

    Returns:
        G / (G - 1) times the deviation from the group's mean. [B].
    """
    if group_size < 2:
        raise ValueError(f"Leaving one out needs a group of at least 2, not {group_size}.")
    return group_mean_advantages(rewards, group_size) * (group_size / (group_size - 1))


def group_mean_advantages(rewards: Array, group_size: int) -> Array:
    """Each reward less its group's mean, itself included (Dr. GRPO, Liu 2025).

    The policy gradient times (G - 1) / G in expectation.

    Args:
        rewards: [B].
        group_size: G.

    Returns:
        [B].
    """
    chex.assert_rank(rewards, 1)
    groups = rewards.reshape(-1, group_size)
    apart = groups - groups[:, :1]  # so that equal rewards leave no rounding to be divided by
    return (apart - jnp.mean(apart, axis=1, keepdims=True)).reshape(-1)


def group_standardized_advantages(rewards: Array, group_size: int) -> Array:
    """Each reward less its group's mean, over the group's standard deviation (GRPO, Shao 2024, section 4.1.2).

    Biased: prompts whose rewards spread little count more, and a rare reward less. With rewards of 0 and 1 and large
    groups it climbs E[2 arcsin sqrt(p)], p the chance of a 1, and not E[p].

    Args:
        rewards: [B].
        group_size: G, at least 2.

    Returns:
        Deviations over the sample standard deviation (denominator G - 1) + 1e-4. [B].
    """
    if group_size < 2:
        raise ValueError(f"A standard deviation needs a group of at least 2, not {group_size}.")
    deviations = group_mean_advantages(rewards, group_size).reshape(-1, group_size)
    std = jnp.sqrt(jnp.sum(jnp.square(deviations), axis=1, keepdims=True) / (group_size - 1))
    return (deviations / (std + STD_EPSILON)).reshape(-1)


def best_of_group_advantages(rewards: Array, group_size: int) -> Array:
    """G for the best of each group (the first of equals), 0 for the others: RAFT (Dong 2023), best-of-n fine-tuning.

    Not an estimate of the gradient of E[r]: with `reinforce_loss` it is that of E[log policy] over the completions
    that the best of G follow, and fits the policy to them.

    Args:
        rewards: [B].
        group_size: G.

    Returns:
        [B], of mean 1.
    """
    chex.assert_rank(rewards, 1)
    best = jnp.argmax(rewards.reshape(-1, group_size), axis=1)
    return (group_size * jax.nn.one_hot(best, group_size)).reshape(-1)


def exponential_advantages(rewards: Array, group_size: int, *, reward_temperature: float, weight_cap: float) -> Array:
    """Weights exp(deviation from the group's mean / temperature): advantage-weighted regression (Peng 2019, eq. 11).

    Not an estimate of the gradient of E[r]: with `reinforce_loss` it fits the policy to completions weighed by, but
    for the cap, exp((G - 1) / G * r / temperature), for each has its part in the mean. The paper's
    exp(r / temperature), the optimum of E[r] - temperature * KL, is that of large groups.

    Args:
        rewards: [B].
        group_size: G.
        reward_temperature: reward units in which a completion gains a factor of e.
        weight_cap: the largest weight.

    Returns:
        [B], positive.
    """
    deviations = group_mean_advantages(rewards, group_size)
    return jnp.exp(jnp.minimum(deviations / reward_temperature, jnp.log(weight_cap)))


def rewards_to_go(token_rewards: Array, mask: Array, *, discount: float) -> Array:
    """The discounted sum of each token's reward and of those after it (Williams 1992; Sutton 2000).

    Unbiased for E[r] with a discount of 1; below it, rewards count less for the tokens long before them.

    Args:
        token_rewards: [B, C].
        mask: true on completion tokens. bool [B, C].
        discount: gamma, what a reward is multiplied by for each token that it lies ahead.

    Returns:
        [B, C], 0 where masked.
    """
    zeros = jnp.zeros_like(token_rewards)
    return gae_advantages(token_rewards, zeros, mask, discount=discount, gae_lambda=1.0)


def gae_advantages(token_rewards: Array, values: Array, mask: Array, *, discount: float, gae_lambda: float) -> Array:
    """Generalised advantage estimation (Schulman 2016, eq. 16).

    Unbiased for E[r] with discount = gae_lambda = 1, whatever the values: a learned baseline. A smaller lambda
    trusts the values more: less variance, and a bias by what they are wrong about.

    Args:
        token_rewards: [B, C].
        values: the return expected before each token. The value after the last token is 0, of truncated completions
            as well. [B, C].
        mask: true on completion tokens. bool [B, C].
        discount: gamma.
        gae_lambda: lambda.

    Returns:
        [B, C], 0 where masked.
    """
    chex.assert_rank([token_rewards, values, mask], 2)
    chex.assert_equal_shape([token_rewards, values, mask])
    token_rewards, values = jnp.where(mask, token_rewards, 0.0), jnp.where(mask, values, 0.0)
    after = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    errors = token_rewards + discount * after - values

    def back(advantage: Array, error: Array) -> tuple[Array, Array]:
        advantage = error + discount * gae_lambda * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros_like(errors[:, 0]), errors.T, reverse=True)
    return jnp.where(mask, advantages.T, 0.0)


def whiten(values: Array, mask: Array) -> Array:
    """Less the mean of the real tokens, over their standard deviation.

    Biased by a random scale, and by the part that each value has in the mean, as in `group_mean_advantages`.

    Args:
        values: [B, C].
        mask: bool [B, C].

    Returns:
        [B, C], 0 where masked.
    """
    chex.assert_rank([values, mask], 2)
    chex.assert_equal_shape([values, mask])
    std = jnp.sqrt(masked_var(values, mask) + WHITEN_EPSILON)
    return jnp.where(mask, (values - masked_mean(values, mask)) / std, 0.0)


def zero_signal_groups(rewards: Array, group_size: int) -> Array:
    """Whether the rewards of each group are equal: less their mean, they teach nothing. [B] -> bool [N]."""
    chex.assert_rank(rewards, 1)
    groups = rewards.reshape(-1, group_size)
    return jnp.all(groups == groups[:, :1], axis=1)
