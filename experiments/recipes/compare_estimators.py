"""Estimators at equal samples, on two tasks whose optimum is known: walks on a graph, and a contextual bandit.

python experiments/recipes/compare_estimators.py
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.recipes.tasks import Task, bandit_task, pretrain_walker, random_graph, walks_task
from rl_jax.errors import InputError
from rl_jax.evaluation import Estimate, mean_interval
from rl_jax.keys import Purpose, step_key
from rl_jax.learner import init_state, policy_gradient_update
from rl_jax.models.transformer import llama
from rl_jax.reinforce.composition import Estimator
from rl_jax.reinforce.estimators import make_estimator
from rl_jax.run.figures import GREY, PALETTE, draw_band, draw_limit, open_figure
from rl_jax.run.loop import run_main
from rl_jax.run.progress import show_progress
from rl_jax.run.spmd import make_mesh
from rl_jax.run.tables import open_results, write_table
from rl_jax.sweep import make_sweep, product_grid, scan_updates
from rl_jax.types import Array, Metrics, PyTree, TrainState

PUBLISHED = {  # Ahmadian 2024, table 1: win rates in per cent on TL;DR, from secondary notes
    "RLOO k=4": 77.9,
    "RLOO k=2": 74.2,
    "RAFT k=4": 73.2,
    "RAFT k=2": 72.1,
    "REINFORCE, moving average": 70.7,
    "REINFORCE": 70.4,
    "PPO": 67.6,
}


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
    kl_coefficient: float = 0.05
    """Price of a nat of divergence from the reference policy, in reward units."""
    seeds: int = 10
    """Runs that an estimator is judged by."""
    selection_seeds: int = 5
    """Other runs, which its learning rate is chosen by."""
    walk_rates: tuple[float, ...] = (0.0001, 0.0003, 0.001, 0.003, 0.01)
    """Adam's learning rates to choose from in walks."""
    bandit_rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    """The same in the bandit."""
    nodes: int = 21
    """Nodes of the graph."""
    degree: float = 2.0
    """Edges from a node, on average."""
    length: int = 8
    """Most steps of a walk."""
    width: int = 32
    """Width of the Transformer that walks."""
    pretraining_updates: int = 600
    """Updates by maximum likelihood that make the reference policy."""
    contexts: int = 16
    """Contexts of the bandit."""
    arms: int = 16
    """Arms of the bandit."""
    seed: int = 1
    """Seed of the tasks; runs have seeds of their own, from 0."""
    only: tuple[str, ...] = ()
    """Names of those to compare, such as "RLOO k=4"; without any, all."""
    results: Path = Path("results/compare_estimators")
    """Folder that the table and the figures are written to."""


def contenders(config: Config) -> list[Contender]:
    """Everything that is compared. Dr. GRPO, which has no KL of its own, is given GRPO's.

    Raises:
        InputError: a name in `config.only` is not among them.
    """

    def make(name: str, **options: Any) -> Estimator:
        return make_estimator(name, kl_coefficient=config.kl_coefficient, **options)

    blue, orange, black, green, purple, brown, *_ = PALETTE
    every = [
        Contender("REINFORCE", make("reinforce"), 1, black),
        Contender("REINFORCE, moving average", make("reinforce_moving_average"), 1, brown),
        Contender("RLOO k=2", make("rloo"), 2, blue, dashed=True),
        Contender("RLOO k=4", make("rloo"), 4, blue),
        Contender("RAFT k=2", make("raft"), 2, orange, dashed=True),
        Contender("RAFT k=4", make("raft"), 4, orange),
        Contender("GRPO k=4", make("grpo"), 4, green),
        Contender("Dr. GRPO k=4", make("dr_grpo", kl="k3_loss"), 4, green, dashed=True),
        Contender("PPO", make("ppo"), 1, purple),
    ]
    if unknown := set(config.only) - {contender.label for contender in every}:
        labels = ", ".join(contender.label for contender in every)
        raise InputError(f"only names {', '.join(sorted(unknown))}; there are {labels}.")
    return [contender for contender in every if not config.only or contender.label in config.only]


def make_tasks(config: Config) -> Iterator[tuple[str, Task, tuple[float, ...]]]:
    """Each task with its name and the learning rates tried on it."""
    graph = random_graph(config.seed, config.nodes, config.degree, config.length)
    context = config.length + 1
    model = llama(config.nodes, context, layers=1, width=config.width, heads=2, mlp_width=2 * config.width)
    ref_params = pretrain_walker(graph, model, config.length, config.pretraining_updates, batch=128, seed=config.seed)
    yield "walks", walks_task(graph, ref_params, model, config.length), config.walk_rates
    yield "bandit", bandit_task(config.seed, config.contexts, config.arms), config.bandit_rates


def make_run(config: Config, task: Task, contender: Contender) -> Callable[..., tuple[PyTree, Metrics]]:
    """A run of an estimator, whole: its learning rate and seed, ref_params -> the policy's parameters, metrics [U]."""
    estimator, group_size = contender.estimator, contender.group_size

    def run(setting: dict[str, Array], ref_params: PyTree) -> tuple[PyTree, Metrics]:
        optimizer = optax.flatten(optax.adam(setting["learning_rate"]))
        score_fn = task.make_score_fn(ref_params)

        def update(state: TrainState, step: Array) -> tuple[TrainState, Metrics]:
            key = step_key(setting["seed"], Purpose.SAMPLE, step)
            rollout = task.sample(state.params, key, config.batch // group_size, group_size)
            ref_logprobs, context = task.reference(ref_params, rollout)
            state, metrics = policy_gradient_update(
                state,
                rollout,
                task.reward(rollout),
                estimator=estimator,
                score_fn=score_fn,
                optimizer=optimizer,
                group_size=group_size,
                ref_logprobs=ref_logprobs,
                context=context,
            )
            return state, {name: metrics[name] for name in ("reward", "kl_k1")}

        state = init_state(ref_params, optimizer, config.kl_coefficient)
        state, metrics = scan_updates(update, state, config.completions // config.batch)
        return state.params, metrics

    return run


class Result(NamedTuple):
    """What an estimator did on a task. The objective is reward - kl_coefficient * KL, in nats a completion.

    Attributes:
        contender: the estimator.
        rate: the learning rate that its selection seeds preferred.
        reward: of the other seeds' policies at the end, at that rate. [seeds].
        kl: of the same. [seeds].
        objective: of the same. [seeds].
        curve: the objective of what they sampled on the way. [seeds, points].
        by_rate: the objective at the end, at every rate. [rates, seeds].
    """

    contender: Contender
    rate: float
    reward: np.ndarray
    kl: np.ndarray
    objective: np.ndarray
    curve: np.ndarray
    by_rate: np.ndarray


def run_contender(
    config: Config, task: Task, contender: Contender, rates: tuple[float, ...], evaluate: Callable[..., Metrics]
) -> Result:
    """Every run of an estimator, at every rate and seed, in one program, and what came out at its best rate."""
    grid = product_grid(learning_rate=rates, seed=range(config.seeds + config.selection_seeds))
    params, metrics = make_sweep(make_run(config, task, contender), make_mesh())(grid, task.ref_params)
    keys = jax.vmap(lambda seed: step_key(seed, Purpose.EVALUATE))(grid["seed"])
    ends, metrics = jax.device_get((evaluate((params, keys), task.ref_params), metrics))
    return judge(config, contender, rates, ends, metrics)


def judge(
    config: Config,
    contender: Contender,
    rates: tuple[float, ...],
    ends: dict[str, np.ndarray],
    metrics: dict[str, np.ndarray],
) -> Result:
    """The runs at the best rate: that of the highest mean objective at the end over the selection seeds, the last ones.

    Args:
        config: of the comparison.
        contender: whose runs they are.
        rates: the learning rates tried.
        ends: reward and kl of the policies at the end. [rates * all seeds], the seeds consecutive.
        metrics: reward and kl_k1 of every update. [rates * all seeds, U].

    Returns:
        The result over the first `seeds` seeds, which the choice has not seen.
    """
    ends = {name: values.reshape(len(rates), -1) for name, values in ends.items()}
    objective = ends["reward"] - config.kl_coefficient * ends["kl"]
    sampled = metrics["reward"] - config.kl_coefficient * metrics["kl_k1"]
    curve = sampled.reshape(*objective.shape, config.points, -1).mean(axis=-1)
    preferred = objective[:, config.seeds :].mean(axis=1)
    best = int(np.argmax(np.nan_to_num(preferred, nan=-np.inf)))
    judged = slice(config.seeds)
    return Result(
        contender,
        rate=rates[best],
        reward=ends["reward"][best, judged],
        kl=ends["kl"][best, judged],
        objective=objective[best, judged],
        curve=curve[best, judged],
        by_rate=objective[:, judged],
    )


def seeds_interval(values: np.ndarray) -> Estimate:
    """Mean and 95 % interval over seeds. [seeds] -> Estimate."""
    return mean_interval(values[:, None])


def table_rows(name: str, results: list[Result], start: float, best: float) -> list[dict[str, Any]]:
    """The table of a task, the best first; intervals are 95 % over seeds."""
    return [
        {
            "task": name,
            "estimator": result.contender.label,
            "learning rate": result.rate,
            "reward": seeds_interval(result.reward),
            "KL, nats": seeds_interval(result.kl),
            "objective": seeds_interval(result.objective),
            "of the way to the optimum, %": seeds_interval(100 * (result.objective - start) / (best - start)),
            "published win rate, %": PUBLISHED.get(result.contender.label),
        }
        for result in sorted(results, key=lambda result: -result.objective.mean())
    ]


def main(config: Config) -> None:
    check(config)
    compared = contenders(config)
    began = time.perf_counter()
    folder = open_results(config.results)
    rows, about = [], {}
    for name, task, rates in make_tasks(config):
        evaluate = make_sweep(lambda run, ref_params, task=task: task.evaluate(run[0], ref_params, run[1]), make_mesh())
        reference = jax.tree.map(lambda x: jnp.stack([x]), (task.ref_params, jax.random.key(0)))
        start = float(evaluate(reference, task.ref_params)["reward"][0])
        best = task.best_objective(config.kl_coefficient)
        results = []
        with show_progress(name, 0, len(compared)) as progress:
            for contender in compared:
                results.append(run_contender(config, task, contender, rates, evaluate))
                progress.show(len(results), {"seconds": time.perf_counter() - began})
        rows += table_rows(name, results, start, best)
        about[name] = {"reference reward": start, "best objective": best, "best reward": task.best_reward}
        draw(folder / f"{name}.png", config, results, rates, start, best)
    settings = dataclasses.asdict(config) | {"tasks": about, "seconds": time.perf_counter() - began}
    write_table(folder, rows, settings)


def check(config: Config) -> None:
    """Raise InputError for settings that cannot work, before the long work."""
    if config.batch % 4 or config.batch < 4:
        raise InputError(f"batch is {config.batch}; it must be a multiple of 4, the largest group.")
    block = config.batch * config.points
    if config.points < 1 or config.completions < block or config.completions % block:
        raise InputError(f"completions is {config.completions}; it must be a multiple of batch times points, {block}.")
    if config.seeds < 2 or config.selection_seeds < 1 or not (config.walk_rates and config.bandit_rates):
        raise InputError("seeds must be at least 2, selection_seeds 1, and there must be a rate for each task.")
    if not config.kl_coefficient > 0:
        raise InputError(f"kl_coefficient is {config.kl_coefficient}; the optimum is known where it is above 0.")


def draw(
    path: Path, config: Config, results: list[Result], rates: tuple[float, ...], start: float, best: float
) -> None:
    """The objective over completions, at the end, and at the end by learning rate; bands are 95 % over seeds."""
    titles = ["Objective of what is sampled", "Objective at the end", "At the end, by learning rate"]
    with open_figure(path, titles, width=4.4, height=3.8) as (learning, ranking, sensitivity):
        completions = config.completions * (np.arange(config.points) + 0.5) / config.points
        ranked = sorted(results, key=lambda result: result.objective.mean())
        for place, result in enumerate(ranked):
            _, _, _, colour, dashed = result.contender
            draw_band(learning, completions, intervals(result.curve), result.contender.label, colour, dashed)
            draw_band(sensitivity, np.array(rates), intervals(result.by_rate.T), result.contender.label, colour, dashed)
            value, low, high = seeds_interval(result.objective)
            ranking.plot([low, high], [place, place], color=colour, linewidth=1.6)
            ranking.plot(value, place, "o", color=colour, markersize=6, markerfacecolor="white" if dashed else colour)
        ranking.set_yticks(range(len(ranked)), [result.contender.label for result in ranked])
        for label, result in zip(ranking.get_yticklabels(), ranked, strict=True):
            label.set(color=result.contender.colour, fontweight="bold")
        ranking.axvline(best, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
        draw_limit(learning, best, f"optimum {best:.3f}")
        draw_limit(sensitivity, best, "")
        objective = f"reward − {config.kl_coefficient:g} KL"
        learning.set(xlabel="completions", ylabel=objective)
        ranking.set(xlabel=objective)
        sensitivity.set(xlabel="learning rate", ylabel=objective, xscale="log", ylim=(start, None))
        sensitivity.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
        sensitivity.set_xticks([], minor=True)


def intervals(values: np.ndarray) -> np.ndarray:
    """Lower end, mean and upper end over seeds. [seeds, n] -> [3, n]."""
    return np.array([(low, value, high) for value, low, high in map(seeds_interval, values.T)]).T


if __name__ == "__main__":
    run_main(main, Config)
