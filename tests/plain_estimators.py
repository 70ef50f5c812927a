"""Every named estimator written out again in NumPy, the plainest way: what it multiplies each token's score by.

M groups of G completions of one prompt, C tokens each. The gradient of a group is the sum over its tokens of the
coefficient times the gradient of the token's log-probability. Nothing of the library is used.
"""

from typing import NamedTuple

import numpy as np

G_AXIS = 1


class Groups(NamedTuple):
    rewards: np.ndarray  # [M, G]
    mask: np.ndarray  # [M, G, C]
    logprobs: np.ndarray  # of the policy that learns. [M, G, C], 0 where masked, as all below
    behavior: np.ndarray  # of the policy that sampled
    ref: np.ndarray
    values: np.ndarray
    greedy: float
    baseline: float


def to_go(x):
    return np.flip(np.cumsum(np.flip(x, 2), 2), 2)


def token_rewards(g, beta):
    rewards = -beta * (g.behavior - g.ref)
    for m, i in np.ndindex(g.rewards.shape):
        rewards[m, i, g.mask[m, i].sum() - 1] += g.rewards[m, i]
    return rewards


def penalised(g, beta):
    return token_rewards(g, beta).sum(2)


def gae(g, beta, lam):
    rewards, advantages = token_rewards(g, beta), np.zeros(g.mask.shape)
    for m, i in np.ndindex(g.rewards.shape):
        length, running = g.mask[m, i].sum(), 0.0
        for c in reversed(range(length)):
            after = g.values[m, i, c + 1] if c + 1 < length else 0.0
            running = rewards[m, i, c] + after - g.values[m, i, c] + lam * running
            advantages[m, i, c] = running
    return advantages


def others_mean(x):
    return (x.sum(1, keepdims=True) - x) / (x.shape[1] - 1)


def less_mean(x):
    return x - x.mean(1, keepdims=True)


def standardized(x):
    return less_mean(x) / (x.std(1, ddof=1, keepdims=True) + 1e-4)


def whitened(x, g):
    x = np.broadcast_to(x, g.mask.shape)
    count = g.mask.sum((1, 2), keepdims=True)
    mean = (x * g.mask).sum((1, 2), keepdims=True) / count
    variance = ((x - mean) ** 2 * g.mask).sum((1, 2), keepdims=True) / count
    return (x - mean) / np.sqrt(variance + 1e-8)


def overlong(g, share):
    longest = g.mask.shape[2]
    return -np.maximum(g.mask.sum(2) - (1 - share) * longest, 0) / (share * longest)


def best(x):
    return x.shape[1] * (np.arange(x.shape[1])[None, :] == np.argmax(x, 1)[:, None])


def by_token(x):
    return x[:, :, None]


def weights(g, kind):
    groups, length = g.mask.shape[1:]
    lengths = g.mask.sum(2, keepdims=True)
    total = {
        "completion": groups,
        "constant": groups * length,
        "token": lengths.sum(1, keepdims=True),
        "sequence": groups * lengths,
    }
    return g.mask / total[kind]


def ratios(g):
    return np.exp(g.logprobs - g.behavior)


def clipped(ratio, advantages, low, high):
    cut = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    return np.where(cut, 0.0, ratio) * advantages


def dual_clipped(g, advantages):
    cut = (advantages < 0) & (ratios(g) > 3.0)
    return np.where(cut, 0.0, clipped(ratios(g), advantages, 0.2, 0.2))


def geometric(g):
    lengths = g.mask.sum(2, keepdims=True)
    return np.exp((g.logprobs - g.behavior).sum(2, keepdims=True) / lengths) * np.ones(g.mask.shape)


def whole(g):
    return np.exp((g.logprobs - g.behavior).sum(2, keepdims=True))


def k3(g, kind, beta):
    return -beta * weights(g, kind) * (1 - np.exp(g.ref - g.logprobs))


def k2(g, kind, beta):
    return -beta * weights(g, kind) * (g.logprobs - g.ref)


def rloo(g, beta):
    return by_token(penalised(g, beta) - others_mean(penalised(g, beta)))


COEFFICIENTS = {
    "reinforce": lambda g, b: weights(g, "completion") * by_token(penalised(g, b)),
    "reinforce_moving_average": lambda g, b: weights(g, "completion") * by_token(penalised(g, b) - g.baseline),
    "reinforce_value": lambda g, b: weights(g, "completion") * (to_go(token_rewards(g, b)) - g.values),
    "reinforce_to_go": lambda g, b: weights(g, "completion") * to_go(token_rewards(g, b)),
    "rloo": lambda g, b: weights(g, "completion") * rloo(g, b),
    "remax": lambda g, b: weights(g, "completion") * by_token(penalised(g, b) - g.greedy),
    "grpo": lambda g, b: (
        weights(g, "sequence") * clipped(ratios(g), by_token(standardized(g.rewards)), 0.2, 0.2) + k3(g, "sequence", b)
    ),
    "dr_grpo": lambda g, b: weights(g, "constant") * clipped(ratios(g), by_token(less_mean(g.rewards)), 0.2, 0.2),
    "reinforce_pp": lambda g, b: (
        weights(g, "token") * clipped(ratios(g), whitened(to_go(token_rewards(g, b)), g), 0.2, 0.2)
    ),
    "reinforce_pp_baseline": lambda g, b: (
        weights(g, "token") * clipped(ratios(g), whitened(by_token(less_mean(g.rewards)), g), 0.2, 0.2)
        + k2(g, "token", b)
    ),
    "dapo": lambda g, b: (
        weights(g, "token") * clipped(ratios(g), by_token(standardized(g.rewards + overlong(g, 0.2))), 0.2, 0.28)
    ),
    "cispo": lambda g, b: weights(g, "token") * np.minimum(ratios(g), 5.0) * by_token(standardized(g.rewards)),
    "gspo": lambda g, b: weights(g, "sequence") * clipped(geometric(g), by_token(standardized(g.rewards)), 3e-4, 4e-4),
    "ppo": lambda g, b: weights(g, "token") * clipped(ratios(g), whitened(gae(g, b, 0.95), g), 0.2, 0.2),
    "ppo_dual_clip": lambda g, b: weights(g, "token") * dual_clipped(g, whitened(gae(g, b, 0.95), g)),
    "raft": lambda g, b: weights(g, "completion") * by_token(best(penalised(g, b))),
    "awr": lambda g, b: weights(g, "completion") * by_token(np.minimum(np.exp(less_mean(penalised(g, b))), 20.0)),
    "importance_token": lambda g, b: weights(g, "completion") * np.minimum(ratios(g), 2.0) * rloo(g, b),
    "importance_sequence": lambda g, b: weights(g, "completion") * np.minimum(whole(g), 2.0) * rloo(g, b),
}
"""Name -> coefficients [M, G, C] of groups at a KL coefficient, where nothing is masked."""
