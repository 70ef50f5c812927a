"""The data that flows between the pure functions. Letters are those of the README: B, P, C, N, G."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

Array = jax.Array
PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """Prompts and the completions sampled for them.

    Groups are consecutive: sequences `g * G` to `g * G + G - 1` complete the same prompt. Index `c` of every
    `[B, C]` array speaks of completion token `c`; nothing here is shifted.

    Attributes:
        prompts: token ids, left-padded. int32 [B, P].
        prompt_mask: true on real prompt tokens. bool [B, P].
        completions: token ids; the padding after the end is zeros and means nothing. int32 [B, C].
        completion_mask: true up to and including the token that ended the completion. bool [B, C].
        behavior_logprobs: log-probability of each token under the distribution it was sampled from, in nats;
            0 where masked. float32 [B, C].
        truncated: true where the completion was cut at C tokens without an end-of-sequence token. bool [B].
    """

    prompts: Array
    prompt_mask: Array
    completions: Array
    completion_mask: Array
    behavior_logprobs: Array
    truncated: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an update changes, and so all that a checkpoint holds.

    Attributes:
        step: number of updates tried so far, skipped ones included. int32 [].
        params: the model's parameters, float32.
        opt_state: the state of the optax transformation.
        baseline: what the advantage function carries from step to step (a moving average), float32 [].
        kl_coefficient: what a nat of divergence from the reference costs, reward units. float32 [].
        nonfinite: consecutive updates skipped for a gradient that was not finite. int32 [].
    """

    step: Array
    params: PyTree
    opt_state: PyTree
    baseline: Array
    kl_coefficient: Array
    nonfinite: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreferenceBatch:
    """Prompts, K candidate completions of each, and how good these were judged to be.

    Attributes:
        prompts: token ids, left-padded. int32 [B, P].
        prompt_mask: true on real prompt tokens. bool [B, P].
        completions: token ids from column 0; the padding after the end means nothing. int32 [B, K, C].
        completion_mask: true on real completion tokens; nowhere for a candidate that a prompt lacks. bool [B, K, C].
        labels: of a pair, the share of the judges who prefer each, 0.5 each for a tie; of more candidates, numbers
            that order them, higher is better; of a single one, its rating. float32 [B, K].
        margins: reward by which the preferred of a pair is to lead; 0 where nobody said. float32 [B].
    """

    prompts: Array
    prompt_mask: Array
    completions: Array
    completion_mask: Array
    labels: Array
    margins: Array


RewardFn = Callable[[Rollout], Array]
"""Rollout -> reward [B], one scalar a completion."""

Metrics = dict[str, Array]
"""Name -> scalar. Names are those of the metrics file."""
