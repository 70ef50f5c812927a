import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.rewards.tokens import length_reward, repetition_penalty, token_share
from rl_jax.types import Rollout


def make_rollout(completions, lengths) -> Rollout:
    completions, lengths = jnp.asarray(completions, jnp.int32), np.asarray(lengths)
    sequences, width = completions.shape
    mask = jnp.asarray(np.arange(width) < lengths[:, None])
    return Rollout(
        prompts=jnp.zeros((sequences, 2), jnp.int32),
        prompt_mask=jnp.ones((sequences, 2), bool),
        completions=completions,
        completion_mask=mask,
        behavior_logprobs=jnp.zeros(mask.shape),
        truncated=jnp.asarray(lengths == width),
    )


def random_rollout(width: int) -> tuple[Rollout, list[list[int]]]:
    """Lengths from 0 to the width, few different tokens, and garbage under the mask."""
    draw = np.random.default_rng(0)
    completions, lengths = draw.integers(0, 3, (40, width)), draw.integers(0, width + 1, 40)
    rows = [row[:length].tolist() for row, length in zip(completions, lengths, strict=True)]
    return make_rollout(completions, lengths), rows


def test_length_reward_is_the_relative_distance():
    rollout = make_rollout(np.zeros((4, 8)), [0, 2, 4, 8])
    reward = length_reward(rollout, target=4)
    assert (reward.shape, reward.dtype) == ((4,), jnp.float32)
    assert reward.tolist() == [-1.0, -0.5, 0.0, -1.0]


def test_repetition_penalty_of_known_completions():
    completions = [
        [1, 2, 1, 2, 1],  # 12 21 12 21: two of four repeat
        [7, 7, 7, 7, 7],  # three of four
        [1, 2, 3, 4, 5],
        [7, 7, 7, 7, 7],  # two bigrams, one repeats: what is masked does not count
        [7, 7, 7, 7, 7],  # one token, no bigram
        [7, 7, 7, 7, 7],
    ]
    reward = repetition_penalty(make_rollout(completions, [5, 5, 5, 3, 1, 0]))
    assert (reward.shape, reward.dtype) == ((6,), jnp.float32)
    assert reward.tolist() == [-0.5, -0.75, 0.0, -0.5, 0.0, 0.0]


@pytest.mark.parametrize("width", [1, 2, 9])
def test_repetition_penalty_is_one_less_the_distinct_share(width):
    rollout, rows = random_rollout(width)
    expected = []
    for row in rows:
        bigrams = list(itertools.pairwise(row))
        expected.append(len(set(bigrams)) / len(bigrams) - 1 if bigrams else 0)
    np.testing.assert_allclose(jax.jit(repetition_penalty)(rollout), expected, atol=1e-6)


@pytest.mark.parametrize("token_ids", [[0], [1, 2], [5], [2, 2]])
def test_token_share_counts_the_tokens_of_the_set(token_ids):
    rollout, rows = random_rollout(9)
    expected = [sum(token in token_ids for token in row) / max(len(row), 1) for row in rows]
    share = jax.jit(token_share)(rollout, jnp.asarray(token_ids))
    assert (share.shape, share.dtype) == ((40,), jnp.float32)
    np.testing.assert_allclose(share, expected, atol=1e-6)


def test_arrays_of_the_wrong_rank_are_refused():
    rollout = make_rollout(np.zeros((4, 8)), [0, 2, 4, 8])
    one = jax.tree.map(lambda array: array[0], rollout)
    for reward in (lambda r: length_reward(r, 4), repetition_penalty, lambda r: token_share(r, jnp.asarray([1]))):
        with pytest.raises(AssertionError):
            reward(one)
    with pytest.raises(AssertionError):
        token_share(rollout, jnp.asarray(1))
