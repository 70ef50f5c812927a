"""What a reward model learns by: losses of the rewards of judged candidates, one for each prompt.

Letters: B prompts, K candidates of each. Rewards are [B, K]; labels are as in `PreferenceBatch`.
"""

import chex
import jax
import jax.numpy as jnp

from rl_jax.masked import masked_mean, masked_sum
from rl_jax.types import Array

ABSENT = -1e30  # the reward of a candidate that is not there: infinity would make its gradient NaN


def bradley_terry_loss(rewards: Array, labels: Array, margins: Array, *, label_smoothing: float = 0.0) -> Array:
    """Minus the log-likelihood of a pair's labels: -sum_k p_k log sigmoid(r_k - r_other - m) (Bradley and Terry 1952).

    With one judge, p is 1 for the preferred candidate (Ziegler 2019, eq. 1; Stiennon 2020, section 3.4); with more, the
    share of them: graded preferences. A tie is p = 1/2 each. The margin m (Touvron 2023, Llama 2, eq. 2) is how far the
    preferred candidate is to lead, so with shares between 0 and 1 either has to lead by it where it is preferred.

    Args:
        rewards: [B, 2].
        labels: p, [B, 2].
        margins: m, [B].
        label_smoothing: probability that a judge chose at random between the two, times 1/2: p becomes
            (1 - 2 s) p + s.

    Returns:
        nats a pair, [B].
    """
    chex.assert_shape([rewards, labels], (len(margins), 2))
    smoothed = (1 - 2 * label_smoothing) * labels + label_smoothing
    leads = rewards - jnp.flip(rewards, axis=1)
    return -jnp.sum(smoothed * jax.nn.log_sigmoid(leads - margins[:, None]), axis=1)


def plackett_luce_loss(rewards: Array, labels: Array, mask: Array) -> Array:
    """Minus the log-likelihood of a ranking, -sum_i [r_i - log sum_j exp r_j] over j no higher than i (Plackett 1975).

    Of two candidates that do not tie it is the Bradley-Terry loss. Those that tie are each taken as chosen among all of
    them and those below (Breslow 1974), which pulls their rewards together.

    Args:
        rewards: [B, K].
        labels: higher is better. [B, K].
        mask: which candidates there are. bool [B, K].

    Returns:
        nats a ranking, [B].
    """
    chex.assert_rank(rewards, 2)
    chex.assert_equal_shape([rewards, labels, mask])
    no_higher = (labels[:, None, :] <= labels[:, :, None]) & mask[:, None, :]
    remaining = jax.nn.logsumexp(jnp.where(no_higher, rewards[:, None, :], ABSENT), axis=2)
    return masked_sum(remaining - rewards, mask, axis=1)


def rating_loss(rewards: Array, labels: Array) -> Array:
    """Half the squared distance of each reward from its rating. [B, 1], [B, 1] -> [B]."""
    chex.assert_equal_shape([rewards, labels])
    chex.assert_shape(rewards, (None, 1))
    return jnp.square(rewards - labels)[:, 0] / 2


def centring_penalty(rewards: Array, mask: Array) -> Array:
    """The squared mean of a prompt's rewards, which preferences leave free. [B, K], bool [B, K] -> [B].

    Eisenstein 2023 ("Helping or Herding?") takes the squared sum of a pair: four times this.
    """
    chex.assert_equal_shape([rewards, mask])
    return jnp.square(masked_mean(rewards, mask, axis=1))
