"""The settings of the recipe `compare_estimators`: what it compares, and under which conditions."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from rl_jax.errors import InputError
from rl_jax.reinforce.composition import Estimator
from rl_jax.reinforce.estimators import make_estimator
from rl_jax.run.figures import PALETTE

PUBLISHED = {  # Ahmadian 2024, table 1: win rates in per cent on TL;DR, from secondary notes
    "RLOO k=4": 77.9,
    "RLOO k=2": 74.2,
    "RAFT k=4": 73.2,
    "RAFT k=2": 72.1,
    "REINFORCE, moving average": 70.7,
    "REINFORCE": 70.4,
    "PPO": 67.6,
}
USUAL = "usual"  # the condition that the others differ from


class Contender(NamedTuple):
    """One of those compared.

    Attributes:
        label: its name in the table.
        estimator: a row of the library's table, with the settings of this comparison.
        group_size: completions of each prompt.
        colour: of its line.
        dashed: whether its line is, where another has the same colour.
    """

    label: str
    estimator: Estimator
    group_size: int
    colour: str
    dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Config:
    """Estimators at equal samples, on two tasks whose optimum is known."""

    completions: int = 1600
    """Completions that a run samples in all."""
    batch: int = 32
    """Completions in an update."""
    points: int = 10
    """Points of a learning curve, each a mean over as many updates."""
    offset: float = 3.0
    """Mean and deviation of what is added to the reward of all completions of a prompt, in deviations of the reward."""
    noise: float = 1.0
    """Deviation of what is added to the reward of each completion, in the same."""
    kl_coefficient: float = 0.5
    """Price of a nat of divergence from the reference policy, in the same."""
    offsets: tuple[float, ...] = (0.0, 1.0)
    """Other offsets to compare at."""
    noises: tuple[float, ...] = (0.0, 3.0)
    """Other noises."""
    kl_coefficients: tuple[float, ...] = (0.1, 1.0)
    """Other prices."""
    seeds: int = 20
    """Runs that an estimator is judged by, each with a graph or a bandit of its own."""
    selection_seeds: int = 10
    """Other runs, which its learning rate is chosen by."""
    walk_rates: tuple[float, ...] = (0.00003, 0.0001, 0.0003, 0.001, 0.003)
    """Adam's learning rates to choose from in walks."""
    bandit_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """The same in the bandit."""
    nodes: int = 21
    """Nodes of the graph."""
    degree: float = 2.0
    """Edges from a node, on average."""
    length: int = 7
    """Most steps of a walk."""
    width: int = 32
    """Width of the Transformer that walks."""
    pretraining_updates: int = 300
    """Updates by maximum likelihood that make the reference policy."""
    contexts: int = 16
    """Contexts of the bandit."""
    arms: int = 16
    """Arms of the bandit."""
    only: tuple[str, ...] = ()
    """Names of those to compare, such as "RLOO k=4"; without any, all."""
    results: Path = Path("results/compare_estimators")
    """Folder that the table and the figures are written to."""


def contenders(config: Config) -> list[Contender]:
    """Everything that is compared. Dr. GRPO, which has no KL of its own, is given GRPO's. The condition sets the price.

    Raises:
        InputError: a name in `config.only` is not among them.
    """
    blue, orange, black, green, purple, brown, *_ = PALETTE
    every = [
        Contender("REINFORCE", make_estimator("reinforce"), 1, black),
        Contender("REINFORCE, moving average", make_estimator("reinforce_moving_average"), 1, brown),
        Contender("RLOO k=2", make_estimator("rloo"), 2, blue, dashed=True),
        Contender("RLOO k=4", make_estimator("rloo"), 4, blue),
        Contender("RAFT k=2", make_estimator("raft"), 2, orange, dashed=True),
        Contender("RAFT k=4", make_estimator("raft"), 4, orange),
        Contender("GRPO k=4", make_estimator("grpo"), 4, green),
        Contender("Dr. GRPO k=4", make_estimator("dr_grpo", kl="k3_loss"), 4, green, dashed=True),
        Contender("PPO", make_estimator("ppo"), 1, purple),
    ]
    if unknown := set(config.only) - {contender.label for contender in every}:
        labels = ", ".join(contender.label for contender in every)
        raise InputError(f"only names {', '.join(sorted(unknown))}; there are {labels}.")
    return [contender for contender in every if not config.only or contender.label in config.only]


class Condition(NamedTuple):
    """How the reward that runs learn from differs from the true one, and what divergence costs; in the task's unit.

    Attributes:
        offset: the same for all completions of a prompt is added, a normal number of this mean and deviation.
        noise: standard deviation of what is added for each completion.
        kl_coefficient: price of a nat.
    """

    offset: float
    noise: float
    kl_coefficient: float


def conditions(config: Config) -> dict[str, Condition]:
    """The usual one, then those that differ from it in one thing, which is their name."""
    usual = Condition(config.offset, config.noise, config.kl_coefficient)
    return {USUAL: usual} | {
        f"{name.replace('_', ' ')} {value:g}": usual._replace(**{name: value})
        for name in Condition._fields
        for value in getattr(config, f"{name}s")
    }


def check(config: Config) -> None:
    """Raise InputError for settings that cannot work, before the long work."""
    if config.batch % 4 or config.batch < 4:
        raise InputError(f"batch is {config.batch}; it must be a multiple of 4, the largest group.")
    block = config.batch * config.points
    if config.points < 1 or config.completions < block or config.completions % block:
        raise InputError(f"completions is {config.completions}; it must be a multiple of batch times points, {block}.")
    if config.seeds < 2 or config.selection_seeds < 1 or not (config.walk_rates and config.bandit_rates):
        raise InputError("seeds must be at least 2, selection_seeds 1, and there must be a rate for each task.")
    for condition in conditions(config).values():
        if not condition.kl_coefficient > 0:
            raise InputError(f"kl_coefficient is {condition.kl_coefficient}; the optimum is known where it is above 0.")
        if not all(x >= 0 for x in condition):
            raise InputError(f"offset is {condition.offset} and noise {condition.noise}; neither may be below 0.")
