"""A tabular policy whose seven completions can be counted, with a critic, a reference, and a reward for each.

One prompt, three tokens of which the last ends a completion, two tokens at most.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rl_jax.models.tabular import init_table, tabular_logits, tabular_values
from rl_jax.reinforce import exact
from rl_jax.reinforce.distributions import entropy, exact_kl, token_logprobs
from rl_jax.reinforce.gradient import Scores
from rl_jax.types import Array, PyTree, Rollout

VOCAB, EOS, LENGTH, GROUP, BETA, BASELINE, GREEDY = 3, 2, 2, 3, 0.3, 0.7, 1.3
ALL = exact.enumerated_rollout(np.array([[0]]), np.array([[True]]), VOCAB, LENGTH, (EOS,))
MASK = np.asarray(ALL.completion_mask)
REWARDS = jnp.array([1.0, 0.75, 1.75, 1.25, 0.5, 1.5, 2.25])  # no two alike
TABLE, REF, OTHER = (init_table(jax.random.key(seed), 1, VOCAB, LENGTH) for seed in (1, 2, 3))
PARAMS = {"logits": TABLE, "values": jax.random.normal(jax.random.key(4), TABLE.shape[:2])}


def scores(params: PyTree, rollout: Rollout, ref: Array) -> Scores:
    """What the tables of a policy and its critic say of a rollout, 0 where masked."""
    logits, ref_logits = tabular_logits(params["logits"], rollout), tabular_logits(ref, rollout)
    parts = (token_logprobs(logits, rollout.completions), entropy(logits), exact_kl(logits, ref_logits))
    parts = [jnp.where(rollout.completion_mask, part, 0.0) for part in parts]
    return Scores(*parts, values=tabular_values(params["values"], rollout, VOCAB))


def score_all(table: Array, ref: Array = REF) -> Array:
    """Log-probabilities of the tokens of every completion. [K, C]."""
    return scores(PARAMS | {"logits": table}, ALL, ref).logprobs


def codes(rollout: Rollout) -> Array:
    """The number of each completion among all of them. [B]."""
    powers = jnp.array([1, VOCAB + 1])
    digits = [
        jnp.sum(jnp.where(r.completion_mask, r.completions + 1, 0) * powers[None, :], axis=1) for r in (rollout, ALL)
    ]
    return jnp.argmax(digits[0][:, None] == digits[1][None, :], axis=1)
