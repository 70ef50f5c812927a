"""An algorithm as a composition: its parts and settings, which of these have an effect, and its advantages.

A function of a composition says by the names of its parameters what it is to be given (rewards, token_rewards,
values, greedy_rewards, baseline, mask, group_size; logprobs, behavior_logprobs, advantages, weights); its options are
keyword arguments bound by `partial`.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, get_args

import jax.numpy as jnp

from rl_jax.errors import InputError
from rl_jax.reinforce.advantages import (
    best_of_group_advantages,
    exponential_advantages,
    group_standardized_advantages,
    whiten,
)
from rl_jax.reinforce.gradient import supply
from rl_jax.reinforce.objectives import Loss, Normalize, reinforce_loss
from rl_jax.reinforce.penalties import KLPlacement, kl_penalised_rewards, token_rewards
from rl_jax.types import Array

SCALE_FREE = (group_standardized_advantages, best_of_group_advantages)  # the same for rewards times a constant
FITTED = (best_of_group_advantages, exponential_advantages)  # maximum likelihood of completions, whoever sampled them
_COUNTS = ("epochs", "minibatches", "sampling_rounds")
_SHARES = ("overlong_share", "gae_lambda", "discount", "clip_low", "baseline_decay")
_NOT_NEGATIVE = ("kl_coefficient", "entropy_coefficient", "value_coefficient")
_MAY_BE_INFINITE = ("reward_clip", "value_clip", "ratio_cap", "weight_cap", "clip_high")


@dataclasses.dataclass(frozen=True)
class Estimator:
    """An algorithm as the composition of its parts, and what it is.

    Attributes:
        paper: where it is defined.
        equation: what it is: A the advantage of a completion or a token, r its reward, rho its importance ratio.
        target: what its expected gradient is the gradient of, at the policy that sampled.
        differs: what sets it apart from popular implementations.
        advantages: names what it needs; returns [B] or [B, C], and the next baseline too where it takes the baseline.
        loss: names what it needs; see `rl_jax.reinforce.objectives`.
        normalize: what the loss is a mean of.
        kl: where the divergence from the reference is charged; see `rl_jax.reinforce.penalties`.
        kl_coefficient: reward units a nat; in the loss, units of the advantages, which may have been divided.
        kl_target: nats a completion that the coefficient is steered to; None leaves it.
        kl_horizon: completions in which a far-off KL changes the coefficient by a fifth.
        whiten_advantages: whether advantages get mean 0 and variance 1 over the tokens of the batch.
        reward_scale: what rewards are multiplied by.
        reward_clip: the largest size of a reward after that.
        whiten_rewards: whether rewards then get mean 0 and variance 1 over the batch.
        overlong_share: last share of C over which a penalty of up to 1, taken off after that, grows; 0 for none.
        sampling_rounds: batches of prompts sampled at most to replace groups whose rewards are all equal.
        epochs: passes over a batch.
        minibatches: updates in a pass.
        entropy_coefficient: a bonus for each nat of a token's entropy, in units of the advantages.
        value_coefficient: weight of the critic's error in the loss.
        value_clip: how far the critic may move in an update, reward units.
    """

    paper: str
    equation: str
    target: str
    differs: str
    advantages: Callable[..., Any]
    loss: Callable[..., Loss] = reinforce_loss
    normalize: Normalize = "completion"
    kl: KLPlacement = "k1_reward"
    kl_coefficient: float = 0.05
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    whiten_advantages: bool = False
    reward_scale: float = 1.0
    reward_clip: float = math.inf
    whiten_rewards: bool = False
    overlong_share: float = 0.0
    sampling_rounds: int = 1
    epochs: int = 1
    minibatches: int = 1
    entropy_coefficient: float = 0.0
    value_coefficient: float = 0.1
    value_clip: float = math.inf

    @property
    def critic(self) -> bool:
        """Whether it learns values."""
        return _names(self.advantages, "values")

    @property
    def greedy(self) -> bool:
        """Whether it needs the reward of each prompt's greedy completion."""
        return _names(self.advantages, "greedy_rewards")

    @property
    def grouped(self) -> bool:
        """Whether it compares the completions of a prompt with each other."""
        return _names(self.advantages, "group_size")

    @property
    def updates(self) -> int:
        """Optimizer updates made from one batch."""
        return self.epochs * self.minibatches

    @property
    def options(self) -> dict[str, Any]:
        """Every setting that has an effect, and its value."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        settings |= _bound(self.advantages) | _bound(self.loss)
        return {name: value for name, value in settings.items() if name not in self._idle()}

    def _idle(self) -> set[str]:
        """Settings without an effect, given the others."""
        idle = set()
        if self.kl == "none":
            idle |= {"kl_coefficient", "kl_target"}
        if self.kl_target is None:
            idle |= {"kl_horizon"}
        if not self.critic:
            idle |= {"value_coefficient"}
        if not self.critic or self.updates == 1:
            idle |= {"value_clip"}
        if not self.grouped:
            idle |= {"sampling_rounds"}
        if self.whiten_advantages:  # what is subtracted from all alike is subtracted again
            idle |= {"baseline_decay"}
        scale_free = (self.whiten_advantages and not self.critic) or self.advantages in SCALE_FREE
        if scale_free and self.kl != "k1_reward" and not self.overlong_share:
            idle |= {"reward_scale", "whiten_rewards"}
        return idle


_SETTINGS = [
    field.name
    for field in dataclasses.fields(Estimator)
    if field.default is not dataclasses.MISSING and field.name != "loss"
]


def with_options(name: str, estimator: Estimator, options: dict[str, Any]) -> Estimator:
    """The estimator with new values of its settings: its fields, and the options of its functions.

    Raises:
        InputError: an option that would do nothing, or a value that cannot work; it has the estimator's name.
    """
    changes = {option: value for option, value in options.items() if option in _SETTINGS}
    for part in ("advantages", "loss"):
        fn = getattr(estimator, part)
        if rebound := {option: value for option, value in options.items() if option in _bound(fn)}:
            changes[part] = partial(fn, **rebound)
    changed = dataclasses.replace(estimator, **changes)
    for option in options:
        if option not in changed.options:
            raise InputError(f"{option} has no effect for {name}, whose options are {', '.join(changed.options)}.")
    _check(name, changed)
    return changed


def estimate_advantages(
    estimator: Estimator,
    rewards: Array,
    kl: Array,
    mask: Array,
    *,
    kl_coefficient: Array,
    group_size: int,
    baseline: Array,
    values: Array | None = None,
    greedy_rewards: Array | None = None,
) -> tuple[Array, Array | None, Array]:
    """The advantages of a batch by the estimator's function, from everything that one may ask for.

    Args:
        estimator: says what it needs.
        rewards: [B].
        kl: the k1 estimate of each token, nats. [B, C].
        mask: true on completion tokens. bool [B, C].
        kl_coefficient: charged in the reward where the estimator does so. [].
        group_size: G.
        baseline: what was carried from the step before. [].
        values: the critic's. [B, C].
        greedy_rewards: [B].

    Returns:
        Advantages [B] or [B, C], whitened ones [B, C]; the critic's targets (TD(lambda) returns) [B, C], or None
        without a critic; and the baseline [] for the next step.
    """
    charged = kl_coefficient if estimator.kl == "k1_reward" else 0.0
    quantities = {
        "rewards": kl_penalised_rewards(rewards, kl, mask, charged),
        "token_rewards": token_rewards(rewards, kl, mask, charged),
        "mask": mask,
        "group_size": group_size,
        "baseline": baseline,
        "values": values,
        "greedy_rewards": greedy_rewards,
    }
    advantages = supply(estimator.advantages, quantities)
    if _names(estimator.advantages, "baseline"):
        advantages, baseline = advantages
    targets = None if values is None else jnp.where(mask, advantages + values, 0.0)
    if estimator.whiten_advantages:
        by_token = advantages if advantages.ndim == 2 else jnp.broadcast_to(advantages[:, None], mask.shape)
        advantages = whiten(by_token, mask)
    return advantages, targets, baseline


def _names(fn: Callable[..., Any], parameter: str) -> bool:
    return parameter in signature(fn).parameters


def _bound(fn: Callable[..., Any]) -> dict[str, Any]:
    """Options of a function of the table, which are what `partial` has bound."""
    return fn.keywords if isinstance(fn, partial) else {}


def _check(name: str, estimator: Estimator) -> None:
    """Raise InputError for values that cannot work."""
    for option, value in estimator.options.items():
        if value is None or isinstance(value, bool):
            continue
        if option in ("normalize", "kl"):
            choices = get_args(Normalize if option == "normalize" else KLPlacement)
            if value not in choices:
                raise InputError(f"{option} is {value!r}; it must be one of {', '.join(choices)}.")
        elif option in _COUNTS:
            if value < 1:
                raise InputError(f"{option} is {value}; it must be at least 1.")
        elif option in _SHARES:
            if not 0 <= value <= 1:
                raise InputError(f"{option} is {value}; it must be from 0 to 1.")
        elif not (value >= 0 if option in _NOT_NEGATIVE else value > 0):
            raise InputError(f"{option} is {value}; it must be {'at least' if option in _NOT_NEGATIVE else 'above'} 0.")
        elif math.isinf(value) and option not in _MAY_BE_INFINITE:
            raise InputError(f"{option} is {value}; it must be finite.")
    options = estimator.options
    if "dual_clip" in options and options["dual_clip"] <= 1 + options["clip_high"]:
        raise InputError(f"dual_clip is {options['dual_clip']}; it must be above 1 + clip_high.")
    if estimator.kl_target is not None and estimator.kl_coefficient == 0:
        raise InputError(
            "kl_coefficient is 0, which no factor steers to a kl_target; give a positive one to start from."
        )
    advantages = getattr(estimator.advantages, "func", estimator.advantages)  # of a partial, what it binds
    fitted = advantages in FITTED and not estimator.whiten_advantages
    if estimator.updates > 1 and estimator.loss is reinforce_loss and not fitted:
        raise InputError(
            f"{name} takes one update from a batch: its loss has no importance ratio, and after the first update the "
            "batch is no longer the policy's. Leave epochs and minibatches at 1, or take importance_token or ppo."
        )
