import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.errors import InputError
from rl_jax.models.tabular import init_table, prefix_nodes, tabular_logits, tabular_values
from rl_jax.reinforce.distributions import entropy, exact_kl, token_logprobs
from rl_jax.reinforce.exact import enumerated_rollout, sequence_kl, sequence_logprobs

VOCAB, LENGTH, EOS = 3, 3, (2,)
PROMPTS = np.array([[0, 1], [1, 0]], np.int32)
ROLLOUT = enumerated_rollout(PROMPTS, np.array([[False, True], [True, True]]), VOCAB, LENGTH, EOS)
TABLE, REF_TABLE = (init_table(jax.random.key(seed), 2, VOCAB, LENGTH, 1.5) for seed in (0, 1))


def prefixes() -> dict[tuple[int, ...], int]:
    """Every prefix of fewer than LENGTH tokens, the shorter first, and its number."""
    rows = [row for size in range(LENGTH) for row in itertools.product(range(VOCAB), repeat=size)]
    return {row: number for number, row in enumerate(rows)}


def test_every_prefix_has_a_node_of_its_own_level_by_level():
    completions = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)), np.int32)
    expected = [[prefixes()[tuple(row[:c])] for c in range(LENGTH)] for row in completions]
    np.testing.assert_array_equal(prefix_nodes(completions, VOCAB), expected)
    assert TABLE.shape == (2, len(prefixes()), VOCAB)


def test_logits_are_looked_up_by_prompt_and_prefix():
    logits = np.asarray(tabular_logits(TABLE, ROLLOUT, 0.5))
    numbers = prefixes()
    for b, row in enumerate(np.asarray(ROLLOUT.completions)):
        prompt = int(ROLLOUT.prompts[b, -1])
        for c in range(LENGTH):
            np.testing.assert_array_equal(logits[b, c], TABLE[prompt, numbers[tuple(row[:c].tolist())]] / 0.5)
    assert {int(x) for x in ROLLOUT.prompts[:, -1]} == {0, 1}


def test_rows_and_values_are_looked_up_the_same_way():
    rows = 1 - ROLLOUT.prompts[:, -1]
    logits, values = tabular_logits(TABLE, ROLLOUT, rows=rows), tabular_values(TABLE[:, :, 0], ROLLOUT, VOCAB)
    np.testing.assert_array_equal(values, tabular_logits(TABLE, ROLLOUT)[..., 0])
    np.testing.assert_array_equal(logits, tabular_logits(TABLE[::-1], ROLLOUT))
    np.testing.assert_array_equal(tabular_values(TABLE[:, :, 0], ROLLOUT, VOCAB, rows), logits[..., 0])
    assert np.all(np.asarray(values != logits[..., 0]))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_probabilities_sum_to_one_and_token_kl_to_the_sequence_kl(temperature):
    logits, ref_logits = (tabular_logits(table, ROLLOUT, temperature) for table in (TABLE, REF_TABLE))
    mask = ROLLOUT.completion_mask
    logprobs, ref_logprobs = (
        sequence_logprobs(token_logprobs(x, ROLLOUT.completions), mask, 2) for x in (logits, ref_logits)
    )
    probabilities = jnp.exp(logprobs)
    np.testing.assert_allclose(jnp.sum(probabilities, axis=1), 1, rtol=1e-5)
    by_completion = jnp.sum(jnp.where(mask, exact_kl(logits, ref_logits), 0), axis=1).reshape(2, -1)
    np.testing.assert_allclose(
        jnp.sum(probabilities * by_completion, axis=1), sequence_kl(logprobs, ref_logprobs), rtol=1e-5
    )
    entropies = jnp.sum(jnp.where(mask, entropy(logits), 0), axis=1).reshape(2, -1)
    np.testing.assert_allclose(
        jnp.sum(probabilities * entropies, axis=1), -jnp.sum(probabilities * logprobs, axis=1), rtol=1e-5
    )


def test_tables_are_normal_with_the_scale_and_differ_by_key():
    table = init_table(jax.random.key(0), 50, 4, 4, 2.0)
    assert table.shape == (50, 1 + 4 + 16 + 64, 4)
    assert abs(float(jnp.std(table)) - 2) < 0.05 and abs(float(jnp.mean(table))) < 0.05
    assert not np.any(np.asarray(TABLE == REF_TABLE))


def test_a_table_for_shorter_completions_is_refused():
    with pytest.raises(InputError, match="13 prefixes; the table 4"):
        tabular_logits(init_table(jax.random.key(0), 2, VOCAB, 2), ROLLOUT)
