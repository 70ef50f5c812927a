"""Expectations by enumeration: every completion that there is, with its exact probability.

For a vocabulary and a length small enough to count, whatever sampling estimates can be summed: the objective and its
gradient, the optimal policy, the reward-KL frontier, and the mean of any estimator over every group it could draw.

Letters: N prompts, K completions that there are, C completion length, V vocabulary, G completions in a group,
M = K^G groups that there are, B sequences.
"""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.errors import InputError
from rl_jax.masked import masked_sum
from rl_jax.sampling import draw
from rl_jax.types import Array, PyTree, Rollout

MOST_COMPLETIONS = 20_000
MOST_GROUPS = 100_000
CHUNK = 2_048  # groups that are worked through at once


def enumerate_completions(vocab_size: int, length: int, eos: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Every completion that there is: each ends with its first end-of-sequence token, or at C tokens.

    Args:
        vocab_size: V.
        length: C.
        eos: ids of the tokens that end a completion; none lets every completion have C tokens.

    Returns:
        Tokens, the shorter first, then in lexicographic order, zero after the end: int32 [K, C]; and their mask, true
        up to and including the token that ended the completion: bool [K, C].

    Raises:
        InputError: an `eos` outside the vocabulary, a vocabulary or length below 1, or K above 20,000.
    """
    ends = sorted(set(eos))
    if vocab_size < 1 or length < 1 or not all(0 <= token < vocab_size for token in ends):
        raise InputError(f"There are no completions of {length} tokens from {vocab_size} that end in {eos}.")
    live = [token for token in range(vocab_size) if token not in ends]
    count = sum(len(live) ** c * len(ends) for c in range(length - 1)) + len(live) ** (length - 1) * vocab_size
    if count > MOST_COMPLETIONS:
        raise InputError(
            f"A vocabulary of {vocab_size} tokens has {count} completions of at most {length} tokens; "
            f"no more than {MOST_COMPLETIONS} can be enumerated. Take fewer tokens or a shorter length."
        )

    def extend(prefixes: np.ndarray, tokens: list[int]) -> np.ndarray:
        last = np.tile(np.array(tokens, np.int32), len(prefixes))[:, None]
        return np.concatenate([np.repeat(prefixes, len(tokens), axis=0), last], axis=1)

    prefixes, rows = np.zeros((1, 0), np.int32), []
    for size in range(1, length + 1):
        rows.append(extend(prefixes, ends if size < length else list(range(vocab_size))))
        prefixes = extend(prefixes, live)
    tokens = np.concatenate([np.pad(row, ((0, 0), (0, length - row.shape[1]))) for row in rows])
    sizes = np.concatenate([np.full(len(row), row.shape[1]) for row in rows])
    return tokens, np.arange(length)[None, :] < sizes[:, None]


def enumerated_rollout(
    prompts: Array | np.ndarray, prompt_mask: Array | np.ndarray, vocab_size: int, length: int, eos: tuple[int, ...]
) -> Rollout:
    """Every completion of every prompt once, those of a prompt consecutive, in the order of `enumerate_completions`.

    Args:
        prompts: token ids, left-padded. int32 [N, P].
        prompt_mask: true on real tokens. bool [N, P].
        vocab_size: V.
        length: C.
        eos: ids of the tokens that end a completion.

    Returns:
        A Rollout of B = N * K sequences; its behavior_logprobs are zeros, for nothing was sampled.
    """
    chex.assert_rank([prompts, prompt_mask], 2)
    chex.assert_equal_shape([prompts, prompt_mask])
    tokens, mask = enumerate_completions(vocab_size, length, eos)
    ended = np.any(mask & np.isin(tokens, eos), axis=1)
    count = len(prompts)
    return Rollout(
        prompts=jnp.repeat(jnp.asarray(prompts), len(tokens), axis=0),
        prompt_mask=jnp.repeat(jnp.asarray(prompt_mask), len(tokens), axis=0),
        completions=jnp.tile(tokens, (count, 1)),
        completion_mask=jnp.tile(mask, (count, 1)),
        behavior_logprobs=jnp.zeros((count * len(tokens), length)),
        truncated=jnp.tile(~ended, count),
    )


def sequence_logprobs(token_logprobs: Array, mask: Array, prompts: int) -> Array:
    """Log-probability of each completion, from those of its tokens. [N * K, C], bool [N * K, C], N -> [N, K]."""
    chex.assert_rank([token_logprobs, mask], 2)
    chex.assert_equal_shape([token_logprobs, mask])
    return masked_sum(token_logprobs, mask, axis=1).reshape(prompts, -1)


def sequence_kl(logprobs: Array, ref_logprobs: Array) -> Array:
    """KL(policy || reference) of the completions of each prompt, nats. [N, K], [N, K] -> [N].

    A completion that the policy cannot sample adds nothing; one that the reference alone cannot makes it infinite.
    """
    chex.assert_rank([logprobs, ref_logprobs], 2)
    chex.assert_equal_shape([logprobs, ref_logprobs])
    return jnp.sum(jnp.exp(logprobs) * _if_possible(logprobs, logprobs - ref_logprobs), axis=1)


def objective(logprobs: Array, ref_logprobs: Array, rewards: Array, kl_coefficient: Array | float) -> Array:
    """E[reward] - kl_coefficient * KL(policy || reference), the mean over the prompts.

    `jax.grad` of it, through `logprobs`, is the exact policy gradient.

    Args:
        logprobs: of each completion under the policy. [N, K].
        ref_logprobs: of the same under the reference. [N, K].
        rewards: of the same. [N, K].
        kl_coefficient: reward units a nat. [].

    Returns:
        [].
    """
    chex.assert_rank([logprobs, ref_logprobs, rewards], 2)
    chex.assert_equal_shape([logprobs, ref_logprobs, rewards])
    expected = jnp.sum(jnp.exp(logprobs) * rewards, axis=1)
    return jnp.mean(expected - kl_coefficient * sequence_kl(logprobs, ref_logprobs))


def optimal_policy(ref_logprobs: Array, rewards: Array, kl_coefficient: Array | float) -> tuple[Array, Array]:
    """The policy that maximises `objective`, and the maximum (Ziegler 2019, section 2; Korbak 2022).

    pi*(y) = pi_ref(y) exp(r(y) / kl_coefficient) / Z, and its objective is kl_coefficient * log Z.

    Args:
        ref_logprobs: of each completion under the reference. [N, K].
        rewards: [N, K].
        kl_coefficient: above 0, reward units a nat. [].

    Returns:
        The optimal policy's log-probabilities [N, K], and the mean of its objective over the prompts [].
    """
    chex.assert_rank([ref_logprobs, rewards], 2)
    chex.assert_equal_shape([ref_logprobs, rewards])
    tilted = ref_logprobs + rewards / kl_coefficient
    log_partition = jax.nn.logsumexp(tilted, axis=1, keepdims=True)
    return tilted - log_partition, kl_coefficient * jnp.mean(log_partition)


def frontier(ref_logprobs: Array, rewards: Array, kl_coefficients: Array) -> tuple[Array, Array]:
    """The most reward that there is at each KL from the reference: the optimal policies' (Ziegler 2019, figure 3).

    Args:
        ref_logprobs: of each completion under the reference. [N, K].
        rewards: [N, K].
        kl_coefficients: above 0, reward units a nat. [M].

    Returns:
        KL in nats [M] and reward [M], means over the prompts, of the optimal policy at each coefficient.
    """
    chex.assert_rank([ref_logprobs, rewards, kl_coefficients], [2, 2, 1])

    def point(kl_coefficient: Array) -> tuple[Array, Array]:
        logprobs, _ = optimal_policy(ref_logprobs, rewards, kl_coefficient)
        reward = jnp.sum(jnp.exp(logprobs) * rewards, axis=1)
        return jnp.mean(sequence_kl(logprobs, ref_logprobs)), jnp.mean(reward)

    return jax.vmap(point)(kl_coefficients)


def best_of_n_logprobs(logprobs: Array, rewards: Array, n: Array | int) -> Array:
    """The distribution of the completion with the highest reward among n samples, ties to the first of them.

    With F the probability of a reward no higher and p that of an equal one, a completion's probability is multiplied
    by (F^n - (F - p)^n) / p: tied completions keep their proportions, because any of them may have come first. The KL
    from the policy is at most log n - (n - 1) / n (Beirami 2024).

    Args:
        logprobs: of each completion under the policy. [N, K].
        rewards: [N, K].
        n: samples, at least 1. [].

    Returns:
        [N, K].
    """
    chex.assert_rank([logprobs, rewards], 2)
    chex.assert_equal_shape([logprobs, rewards])

    def of_prompt(logprobs: Array, rewards: Array) -> Array:
        order = jnp.argsort(rewards)
        ranked, probabilities = rewards[order], jnp.exp(logprobs[order])
        first, last = (jnp.searchsorted(ranked, rewards, side=side) for side in ("left", "right"))
        equal = jax.ops.segment_sum(jnp.exp(logprobs), first, len(rewards))[first]
        no_higher = jnp.cumsum(probabilities)[last - 1]
        higher = jnp.append(jnp.cumsum(probabilities[::-1])[::-1], 0.0)[last]
        # Near 1, where most of the n-th power is, F is 1 less what is higher: a rounding counts n times.
        log_no_higher = jnp.where(higher < 0.5, jnp.log1p(-higher), jnp.log(no_higher))
        # And F^n - (F - p)^n over p is F^(n - 1) (1 - (1 - s)^n) / s with s = p / F: no difference of near equals.
        share = jnp.clip(_if_possible(logprobs, equal / no_higher, 0.5), 0.0, 1.0)
        partial = jnp.where(share < 1, share, 0.5)  # where it is all there is, the logarithm has no gradient
        wins = jnp.where(share < 1, -jnp.expm1(n * jnp.log1p(-partial)), 1.0) / share
        return logprobs + (n - 1) * _if_possible(logprobs, log_no_higher) + jnp.log(wins)

    return jax.vmap(of_prompt)(logprobs, rewards)


def pick_completions(enumerated: Rollout, token_logprobs: Array, index: Array) -> Rollout:
    """The rollout of chosen rows, as if the policy of `token_logprobs` had sampled it.

    Args:
        enumerated: from `enumerated_rollout`.
        token_logprobs: of its tokens under the policy that is to have sampled; anything where masked. [N * K, C].
        index: rows of `enumerated`. int32 [B].

    Returns:
        A Rollout of B sequences.
    """
    chex.assert_rank([token_logprobs, index], [2, 1])
    chex.assert_equal_shape([token_logprobs, enumerated.completion_mask])
    behavior_logprobs = jnp.where(enumerated.completion_mask, token_logprobs, 0.0)
    complete = dataclasses.replace(enumerated, behavior_logprobs=behavior_logprobs)
    return jax.tree.map(lambda x: x[index], complete)


def draw_groups(key: Array, enumerated: Rollout, token_logprobs: Array, prompts: int, group_size: int) -> Rollout:
    """A group of completions of each prompt, sampled from the exact distribution by a look-up.

    It takes one random number a completion and runs no policy: under `jax.vmap` over keys, 10^5 batches are cheap.
    Probabilities are met to the 2^-23 steps of a float32 uniform.

    Args:
        key: the key of this batch.
        enumerated: from `enumerated_rollout`.
        token_logprobs: of its tokens under the policy that samples. [N * K, C].
        prompts: N.
        group_size: G.

    Returns:
        A Rollout of B = N * G sequences, groups consecutive, behavior_logprobs under the policy that sampled.
    """
    logprobs = sequence_logprobs(token_logprobs, enumerated.completion_mask, prompts)
    uniforms = jax.random.uniform(key, (prompts * group_size,))
    chosen, _ = draw(jnp.repeat(logprobs, group_size, axis=0), uniforms)
    first = logprobs.shape[1] * jnp.repeat(jnp.arange(prompts, dtype=jnp.int32), group_size)
    return pick_completions(enumerated, token_logprobs, first + chosen)


def check_groups(completions: int, group_size: int) -> None:
    """Raise InputError where groups of G of these completions, in number K, are more than 100,000, or G is below 1."""
    if group_size < 1 or completions**group_size > MOST_GROUPS:
        raise InputError(
            f"{completions} completions make {completions**group_size} groups of {group_size}; groups need at least "
            f"one, and no more than {MOST_GROUPS} can be enumerated. Take smaller groups, fewer tokens or a shorter "
            "length."
        )


def expected_gradient(
    gradient_fn: Callable[[Rollout], PyTree], enumerated: Rollout, token_logprobs: Array, group_size: int
) -> PyTree:
    """The mean of what an estimator returns, over every group that the policy could have sampled for one prompt.

    It serves any function of a group: with the squared norm of a gradient beside it, it gives the exact variance.

    Args:
        gradient_fn: a Rollout of G completions of the prompt -> a pytree of float arrays.
        enumerated: from `enumerated_rollout`, of one prompt.
        token_logprobs: of its tokens under the policy that samples. [K, C].
        group_size: G; K^G is at most 100,000.

    Returns:
        A pytree as `gradient_fn` returns.

    Raises:
        InputError: K^G is above 100,000.
    """
    logprobs = sequence_logprobs(token_logprobs, enumerated.completion_mask, 1)[0]
    index = _every_group(len(logprobs), group_size)
    chunk = min(CHUNK, len(index))
    padding = -len(index) % chunk
    # The padding repeats the first group, with no weight.
    weights = jnp.pad(jnp.exp(jnp.sum(logprobs[index], axis=1)), (0, padding)).reshape(-1, chunk)
    index = jnp.pad(index, ((0, padding), (0, 0))).reshape(-1, chunk, group_size)

    def weighted(index: Array, weights: Array) -> PyTree:
        def mean(x: Array) -> Array:
            # A group that cannot be sampled may have a ratio or a gradient that is not finite.
            sampled = weights.reshape(-1, *[1] * (x.ndim - 1)) > 0
            return jnp.tensordot(weights, jnp.where(sampled, x, jnp.zeros((), x.dtype)), axes=1)

        values = jax.vmap(lambda rows: gradient_fn(pick_completions(enumerated, token_logprobs, rows)))(index)
        return jax.tree.map(mean, values)

    def add(total: PyTree, part: tuple[Array, Array]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, weighted(*part)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(weighted, index[0], weights[0]))
    return jax.lax.scan(add, zeros, (index, weights))[0]


def expected_advantages(
    advantage_fn: Callable[[Array], Array], logprobs: Array, rewards: Array, group_size: int
) -> Array:
    """The mean advantage of each completion over the rest of its group, and over its place in it.

    The expected gradient of a REINFORCE loss with these advantages, of a mean over completions, is
    sum_y p(y) a(y) grad log p(y) with a(y) from here: a formula that needs no gradient of a group.

    Args:
        advantage_fn: the rewards of a group [G] -> advantages [G].
        logprobs: of each completion of one prompt. [K].
        rewards: of the same. [K].
        group_size: G; K^G is at most 100,000.

    Returns:
        [K].

    Raises:
        InputError: K^G is above 100,000.
    """
    chex.assert_rank([logprobs, rewards], 1)
    chex.assert_equal_shape([logprobs, rewards])
    index = _every_group(len(logprobs), group_size)
    advantages = jax.vmap(advantage_fn)(rewards[index])
    probabilities = jnp.exp(logprobs)[index][:, None, :]
    others = jnp.prod(jnp.where(jnp.eye(group_size, dtype=bool)[None], 1.0, probabilities), axis=-1)
    return jax.ops.segment_sum((others * advantages).reshape(-1), index.reshape(-1), len(logprobs)) / group_size


def _every_group(completions: int, group_size: int) -> Array:
    """Every group of G of the numbers below K, in lexicographic order. int32 [M, G]."""
    check_groups(completions, group_size)
    places = completions ** np.arange(group_size, dtype=np.int32)[None, ::-1]
    return jnp.arange(completions**group_size, dtype=jnp.int32)[:, None] // places % completions


def _if_possible(logprobs: Array, values: Array, other: float = 0.0) -> Array:
    """`values` where the probability is above zero, and `other`, with no gradient, where it is not."""
    return jnp.where(jnp.exp(logprobs) > 0, values, other)
