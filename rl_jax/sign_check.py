"""Guards against a sign that is the wrong way round, before any long work.

A refactoring once flipped the sign of the reward and with it that of the KL penalty, and overnight a run learned to
write the worst completions it could, fluently (Ziegler 2019, section 4.4). `check_signs` takes one step with an
estimator where everything can be counted; `check_preferred` asks whether a reward prefers what was preferred.

Letters: V vocabulary, C completion length, G completions in a group, B sequences, M pairs.
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import binomtest

from rl_jax.errors import InputError
from rl_jax.learner import init_state, policy_gradient_update
from rl_jax.models.tabular import tabular_logits, tabular_values
from rl_jax.reinforce import exact
from rl_jax.reinforce.composition import Estimator
from rl_jax.reinforce.distributions import entropy, exact_kl, token_logprobs
from rl_jax.reinforce.gradient import Scores
from rl_jax.run.spmd import make_mesh, pmapped
from rl_jax.types import Array, PyTree, Rollout

VOCAB, LENGTH, GROUP = 3, 2, 2
PROMPT = np.zeros((1, 1), np.int32)
PAID = 1  # the token whose share of a completion is its reward
REF_LOGITS = (0.0, -1.0, 1.0)  # of the reference, after every prefix
STEP = 0.1  # length of the step, in logits: far below where the objective bends, far above rounding
LEAST = 1e-5  # that a true step moves, reward units and nats: the table's rows move 0.006 and more
CHANCE = 1e-3  # how rarely a reward that knows nothing may be called upside down


class Signs(NamedTuple):
    """What a step did: to the mean reward, without a KL penalty, and to the KL, without a reward (None if not charged).

    Each is of before and after.
    """

    reward: tuple[float, float]
    kl: tuple[float, float] | None


def check_signs(estimator: Estimator) -> Signs:
    """Takes a step with an estimator from a policy whose every completion can be counted, and looks where it went.

    The policy is uniform over the 9 completions of 2 tokens from 3, so a batch with every group of two once is what an
    endless sample would be, and nothing is left to chance. The step is `policy_gradient_update`'s, of a fixed length;
    reward and KL are exact. What is neither reward nor KL (the entropy's bonus, the critic's error, the penalty for
    length) is left out, for it has a direction of its own.

    Args:
        estimator: as a run is to use it.

    Returns:
        What the step did.

    Raises:
        InputError: with a reward and no KL penalty, the mean reward does not rise; or with a KL penalty and no reward,
            the KL from the reference does not fall.
    """
    estimator = dataclasses.replace(estimator, entropy_coefficient=0.0, value_coefficient=0.0, overlong_share=0.0)
    rollout = _every_group(estimator.minibatches)
    ref_table = jnp.tile(jnp.array(REF_LOGITS), (1, 1 + VOCAB, 1))
    params = {"policy": jnp.zeros_like(ref_table), "values": jnp.zeros(ref_table.shape[:2])}
    paid = jnp.mean(rollout.completions == PAID, axis=1, dtype=jnp.float32)

    def measure(params: PyTree, ref_table: Array, rollout: Rollout, rewards: Array, coefficient: Array) -> Array:
        return _take_step(estimator, params, ref_table, rollout, rewards, coefficient)

    mapped = pmapped(measure, make_mesh(jax.local_devices()[:1]), (None,) * 5, None)
    raised, _ = np.asarray(mapped(params, ref_table, rollout, paid, jnp.zeros(()))).tolist()
    _refuse_reward(*raised)
    if estimator.kl == "none":
        return Signs(tuple(raised), None)
    _, lowered = np.asarray(mapped(params, ref_table, rollout, jnp.zeros_like(paid), jnp.ones(()))).tolist()
    _refuse_kl(*lowered)
    return Signs(tuple(raised), tuple(lowered))


def check_preferred(preferred: np.ndarray, rejected: np.ndarray) -> str | None:
    """Checks that a reward is higher for what was preferred, as RL will see it: after every factor and every sum.

    Args:
        preferred: the rewards of held-out completions that were preferred. [M].
        rejected: of those they were preferred to. [M].

    Returns:
        A warning where the preferred ones are not the higher more often than chance would have it (one side of the
        sign test, 5 %); else None.

    Raises:
        InputError: the preferred ones are the lower more often than chance would have it (0.1 %), no pairs, or rewards
            that are not finite.
    """
    preferred, rejected = np.asarray(preferred, np.float64), np.asarray(rejected, np.float64)
    if preferred.shape != rejected.shape or preferred.ndim != 1 or not len(preferred):
        raise InputError(
            f"The reward is to be checked on pairs; there are {preferred.shape} preferred and {rejected.shape} "
            "rejected completions."
        )
    difference = preferred - rejected
    if not np.isfinite(difference).all():
        raise InputError("The reward of a held-out completion is not finite; the reward model has not been trained.")
    higher, lower, pairs = int((difference > 0).sum()), int((difference < 0).sum()), len(difference)
    told = f"accuracy {(higher + (pairs - higher - lower) / 2) / pairs:.0%} on {pairs} pairs"
    if not higher + lower:
        return f"The reward is the same for what was preferred and what was rejected ({told}): it has learned nothing."
    if binomtest(lower, higher + lower, alternative="greater").pvalue < CHANCE:
        raise InputError(
            f"The reward prefers what was rejected ({told}): its sign is wrong, or the labels are the wrong way round. "
            "Look at the reward's weight and at which column is chosen and which rejected."
        )
    if binomtest(higher, higher + lower, alternative="greater").pvalue > 0.05:
        return (
            f"The reward tells preferred from rejected no better than chance ({told}): what is tuned with it follows "
            "noise. Give it more pairs, or train it longer."
        )
    return None


def _refuse_reward(before: float, after: float) -> None:
    if not after - before > LEAST:
        verb = "lowers" if after - before < -LEAST else "does not raise"
        raise InputError(
            f"The estimator {verb} the reward it is given: a step without a KL penalty takes the mean reward of a "
            f"policy that can be counted from {before:.4f} to {after:.4f}. Look at the sign of its advantages and of "
            "its loss."
        )


def _refuse_kl(before: float, after: float) -> None:
    if not before - after > LEAST:
        verb = "raises" if before - after < -LEAST else "does not lower"
        raise InputError(
            f"The estimator {verb} the KL that it charges for: a step without a reward takes the KL of a policy that "
            f"can be counted from {before:.4f} to {after:.4f} nats. Look at the sign of the KL penalty, in the reward "
            "and in the loss."
        )


def _every_group(copies: int) -> Rollout:
    """Every group of completions that the uniform policy samples, each as likely as the others, so many times each."""
    completions = exact.enumerated_rollout(PROMPT, np.ones(PROMPT.shape, bool), VOCAB, LENGTH, ())
    groups = itertools.product(range(len(completions.prompts)), repeat=GROUP)
    rows = np.tile(np.array(list(groups)).reshape(-1), copies)
    logprobs = jnp.full(completions.completions.shape, -np.log(VOCAB), jnp.float32)
    return exact.pick_completions(completions, logprobs, jnp.asarray(rows))


def _take_step(
    estimator: Estimator, params: PyTree, ref_table: Array, rollout: Rollout, rewards: Array, coefficient: Array
) -> Array:
    """Mean share of PAID, and KL from the reference, each before and after a step of an estimator. [2, 2]."""

    def unit_steps(grads: PyTree, _: PyTree) -> PyTree:
        length = jnp.maximum(optax.tree.norm(grads), 1e-30)
        return jax.tree.map(lambda x: -STEP / estimator.updates / length * x, grads)

    optimizer = optax.stateless(unit_steps)
    ref_logits = tabular_logits(ref_table, rollout)

    def score_fn(params: PyTree, rollout: Rollout, ref_logits: Array) -> Scores:
        logits = tabular_logits(params["policy"], rollout)
        values = tabular_values(params["values"], rollout, VOCAB)
        logprobs = token_logprobs(logits, rollout.completions)
        return Scores(logprobs, entropy(logits), exact_kl(logits, ref_logits), values)

    state, _ = policy_gradient_update(
        init_state(params, optimizer, coefficient),
        rollout,
        rewards,
        estimator=estimator,
        score_fn=score_fn,
        optimizer=optimizer,
        group_size=GROUP,
        ref_logprobs=token_logprobs(ref_logits, rollout.completions),
        context=ref_logits,
        greedy_rewards=jnp.zeros_like(rewards) if estimator.greedy else None,
        key=jax.random.key(0),
    )
    tables = (params["policy"], state.params["policy"])
    return jnp.stack([jnp.array(x) for x in zip(*(_reward_and_kl(table, ref_table) for table in tables), strict=True)])


def _reward_and_kl(table: Array, ref_table: Array) -> tuple[Array, Array]:
    """The exact mean of PAID's share of a completion, and the exact KL from the reference, nats. [], []."""
    every = exact.enumerated_rollout(PROMPT, np.ones(PROMPT.shape, bool), VOCAB, LENGTH, ())
    logprobs, ref_logprobs = (
        exact.sequence_logprobs(token_logprobs(tabular_logits(x, every), every.completions), every.completion_mask, 1)
        for x in (table, ref_table)
    )
    paid = jnp.mean(every.completions == PAID, axis=1, dtype=jnp.float32)[None, :]
    return exact.objective(logprobs, ref_logprobs, paid, 0.0), exact.sequence_kl(logprobs, ref_logprobs)[0]
