"""The settings of estimators as command-line options."""

import dataclasses

from rl_jax.errors import InputError
from rl_jax.reinforce.composition import Estimator
from rl_jax.reinforce.estimators import ESTIMATORS, make_estimator
from rl_jax.reinforce.objectives import Normalize
from rl_jax.reinforce.penalties import KLPlacement

RATIO_OPTIONS = {"clip_low", "clip_high", "dual_clip", "ratio_cap"}


@dataclasses.dataclass(frozen=True)
class EstimatorOptions:
    """Settings of the estimator; None is its own. One that would do nothing for it is refused."""

    normalize: Normalize | None = None
    """What the loss is a mean of: tokens; the tokens of each completion, then completions; completions, their
    tokens summed; or completions, their tokens summed and divided by the completion length."""
    kl: KLPlacement | None = None
    """Where the divergence from the pretrained policy is charged: in the reward, in the loss, or nowhere."""
    kl_coefficient: float | None = None
    """Reward that a nat of divergence from the pretrained policy costs."""
    kl_target: float | None = None
    """Nats a completion that the coefficient is steered to."""
    kl_horizon: float | None = None
    """Completions in which a KL far from its target changes the coefficient by a fifth; more than a fifth of those
    of an update."""
    reward_scale: float | None = None
    """What rewards are multiplied by."""
    reward_clip: float | None = None
    """Largest size of a reward after that."""
    whiten_rewards: bool | None = None
    """Whether rewards then get mean 0 and variance 1 over the batch."""
    whiten_advantages: bool | None = None
    """Whether advantages get mean 0 and variance 1 over the tokens of the batch."""
    overlong_share: float | None = None
    """Last share of the completion length over which a penalty of up to 1 grows."""
    sampling_rounds: int | None = None
    """Batches sampled at most to replace groups whose rewards are all equal."""
    epochs: int | None = None
    """Passes over a batch."""
    minibatches: int | None = None
    """Updates in a pass."""
    entropy_coefficient: float | None = None
    """Reward that a nat of each token's entropy is worth."""
    baseline_decay: float | None = None
    """How much of the moving average of rewards stays at each update."""
    discount: float | None = None
    """What a reward is multiplied by for each token that it lies ahead."""
    gae_lambda: float | None = None
    """1 trusts the rewards that came, 0 the critic."""
    value_coefficient: float | None = None
    """Weight of the critic's error in the loss."""
    value_clip: float | None = None
    """How far the critic may move in an update, reward units."""
    clip_low: float | None = None
    """How far below 1 a ratio counts where the advantage is negative."""
    clip_high: float | None = None
    """How far above 1 a ratio counts where the advantage is positive."""
    dual_clip: float | None = None
    """Largest ratio that counts where the advantage is negative."""
    ratio_cap: float | None = None
    """Largest importance ratio."""
    reward_temperature: float | None = None
    """Reward units in which a completion's weight gains a factor of e."""
    weight_cap: float | None = None
    """Largest weight of a completion."""


def chosen_estimator(name: str, options: EstimatorOptions, group_size: int) -> Estimator:
    """The estimator that the settings ask for; InputError for options without effect, and for groups too small."""
    given = {option: value for option, value in dataclasses.asdict(options).items() if value is not None}
    estimator = make_estimator(name, **given)
    for option in set(given) & RATIO_OPTIONS if estimator.updates == 1 else ():
        raise InputError(
            f"{option} has no effect for {name} with one update a batch, for which every importance ratio is 1. "
            "Leave it out, or give epochs or minibatches."
        )
    if estimator.grouped and group_size < 2:
        raise InputError(f"{name} compares the completions of a prompt: give a group_size of at least 2.")
    return estimator


def describe_estimator(name: str, options: EstimatorOptions, group_size: int) -> dict[str, str]:
    """What the chosen estimator is, and the value of each of its options, given or its own."""
    estimator = chosen_estimator(name, options, group_size)
    of_the_row = "" if estimator == ESTIMATORS[name] else " (before these options)"
    about = {"name": name, "paper": estimator.paper, f"gradient of{of_the_row}": estimator.target}
    return about | {option: str(value) for option, value in estimator.options.items()}
