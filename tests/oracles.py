"""The policy gradient by enumeration: every completion of a tiny policy, with its exact probability.

Of the library only the forward pass is used here: the shift by one, masks, temperature, filters, KL and the gradient
are written out again, in the plainest way.

Letters: N prompts, K completions that there are, C completion length, V vocabulary.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from rl_jax.models.config import llama
from rl_jax.models.transformer import hidden_states, init_params, logits
from rl_jax.types import Array, PyTree, Rollout

VOCAB, EOS, LENGTH = 4, 2, 3
CONFIG = llama(vocab_size=VOCAB, context=6, layers=1, width=8, heads=2, mlp_width=8)
PROMPTS = np.array([[0, 3, 1], [1, 2, 3]], np.int32)
PROMPT_MASK = np.array([[False, True, True], [True, True, True]])
REWARDS = np.random.default_rng(0).normal(1, 1, (VOCAB, (VOCAB + 1) ** LENGTH)).astype(np.float32)


def random_params(seed: int) -> PyTree:
    """Parameters large enough for uneven distributions."""
    return jax.tree.map(lambda x: 25 * x if x.ndim > 1 else x, init_params(jax.random.key(seed), CONFIG))


def reward(rollout: Rollout) -> Array:
    """A random number for each pair of a prompt's last token and a completion. [B]."""
    digits = jnp.where(rollout.completion_mask, rollout.completions + 1, 0)
    codes = jnp.sum(digits * (VOCAB + 1) ** jnp.arange(LENGTH)[None, :], axis=1)
    return jnp.asarray(REWARDS)[rollout.prompts[:, -1], codes]


def all_completions() -> tuple[np.ndarray, np.ndarray]:
    """Every completion that there is, and its mask. [K, C], [K, C]."""
    rows = [
        row
        for length in range(1, LENGTH + 1)
        for row in itertools.product(range(VOCAB), repeat=length)
        if EOS not in row[:-1] and (length == LENGTH or row[-1] == EOS)
    ]
    tokens = np.array([row + (0,) * (LENGTH - len(row)) for row in rows], np.int32)
    return tokens, np.arange(LENGTH) < np.array([[len(row)] for row in rows])


def enumerated_rollout() -> Rollout:
    """Every completion of every prompt once. B = N * K."""
    tokens, mask = all_completions()
    completions, masks = np.tile(tokens, (len(PROMPTS), 1)), np.tile(mask, (len(PROMPTS), 1))
    return Rollout(
        prompts=jnp.repeat(PROMPTS, len(tokens), axis=0),
        prompt_mask=jnp.repeat(PROMPT_MASK, len(tokens), axis=0),
        completions=jnp.asarray(completions),
        completion_mask=jnp.asarray(masks),
        behavior_logprobs=jnp.zeros(masks.shape),
        truncated=jnp.asarray(~np.any(masks & (completions == EOS), axis=1)),
    )


def distributions(params: PyTree, temperature: Array, top_k: Array) -> Array:
    """Log-probabilities of every next token along every completion, from unpadded sequences. [N, K, C, V]."""
    tokens, _ = all_completions()
    rows = []
    for prompt, real in zip(PROMPTS, PROMPT_MASK, strict=True):
        sequences = np.concatenate([np.tile(prompt[real], (len(tokens), 1)), tokens], axis=1)
        states = hidden_states(params, jnp.asarray(sequences), jnp.ones(sequences.shape, bool), CONFIG)
        rows.append(logits(params, states[:, real.sum() - 1 : -1], CONFIG) / temperature)
    scores = jnp.stack(rows)
    least = jnp.take(jnp.sort(scores, axis=-1), jnp.array([VOCAB - top_k]), axis=-1)
    return jax.nn.log_softmax(jnp.where(scores >= least, scores, -jnp.inf), axis=-1)


def sequence_logprobs(params: PyTree, temperature: float = 1.0, top_k: int = VOCAB) -> Array:
    """Log-probability of every completion of every prompt. [N, K]."""
    return _sequence_logprobs(params, temperature, top_k)


def sequence_kl(logprobs: Array, ref_logprobs: Array) -> Array:
    """KL of one distribution of completions from another. [N, K], [N, K] -> [N]."""
    possible = jnp.isfinite(logprobs)
    log_ratios = jnp.where(possible, logprobs, 0.0) - ref_logprobs
    return jnp.sum(jnp.where(possible, jnp.exp(logprobs) * log_ratios, 0.0), axis=1)


def objective(logprobs: Array, ref_logprobs: Array, coefficient: float) -> Array:
    """E[reward] - coefficient * KL(policy || reference), the mean over the prompts. [N, K], [N, K] -> []."""
    rewards = reward(enumerated_rollout()).reshape(logprobs.shape)
    expected = jnp.sum(jnp.exp(logprobs) * rewards, axis=1)
    return jnp.mean(expected - coefficient * sequence_kl(logprobs, ref_logprobs))


def objective_gradient(
    params: PyTree, ref_params: PyTree, coefficient: float, temperature: float = 1.0, top_k: int = VOCAB
) -> PyTree:
    """Of the objective; `top_k` is the policy's alone, the reference keeps every token."""
    ref_logprobs = sequence_logprobs(ref_params, temperature)
    return _objective_gradient(params, ref_logprobs, coefficient, temperature, top_k)


@jax.jit
def _sequence_logprobs(params, temperature, top_k):
    tokens, mask = all_completions()
    indices = jnp.broadcast_to(jnp.asarray(tokens), (len(PROMPTS), *tokens.shape))[..., None]
    picked = jnp.take_along_axis(distributions(params, temperature, top_k), indices, axis=-1)[..., 0]
    return jnp.sum(jnp.where(mask[None], picked, 0.0), axis=-1)


@jax.jit
@jax.grad
def _objective_gradient(params, ref_logprobs, coefficient, temperature, top_k):
    return objective(_sequence_logprobs(params, temperature, top_k), ref_logprobs, coefficient)


def mean_p_value(samples: np.ndarray, mean: np.ndarray) -> float:
    """Hotelling's T-squared: how likely means as far from `mean` as those of `samples` are. [M, n], [n] -> float."""
    samples = np.asarray(samples, np.float64)
    count, size = samples.shape
    error = samples.mean(axis=0) - mean
    statistic = count * error @ np.linalg.solve(np.cov(samples.T), error)
    return float(scipy.stats.f.sf(statistic * (count - size) / (size * (count - 1)), size, count - size))
