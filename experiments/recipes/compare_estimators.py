"""Estimators at equal samples, on two tasks whose optimum is known: walks on a graph, and a contextual bandit.

A run samples 1,600 completions in batches of 32, whatever the size of its groups, and is judged by how far it has
brought reward - 0.05 KL from the reference policy's to the highest there is. Every run has a graph or a bandit of its
own. Each estimator has the best of five learning rates, chosen on ten seeds and judged on ten others; all its runs are
rows of one compiled program.

    python experiments/recipes/compare_estimators.py

Published (Ahmadian 2024, table 1, from secondary notes: win rates on TL;DR): RLOO k=4 77.9 %, k=2 74.2, RAFT k=4 73.2,
k=2 72.1, REINFORCE with a baseline 70.7, without one 70.4, PPO 67.6. Measured on two cores of an Intel Xeon, in 5.4
minutes of processor time: way from the reference to the optimum in %, with 95 % intervals over seeds.

| estimator                 | walks       | bandit     |
|---------------------------|-------------|------------|
| REINFORCE                 | 96.5 ± 1.1  | 78.9 ± 4.9 |
| REINFORCE, moving average | 95.8 ± 2.2  | 80.7 ± 3.6 |
| RLOO k=2                  | 93.0 ± 3.7  | 77.4 ± 5.0 |
| RLOO k=4                  | 91.5 ± 3.4  | 78.0 ± 4.0 |
| RAFT k=2                  | 82 ± 15     | 53.1 ± 5.0 |
| RAFT k=4                  | 94.8 ± 2.9  | 75.9 ± 2.8 |
| GRPO k=4                  | 91.7 ± 3.1  | 82.8 ± 3.2 |
| Dr. GRPO k=4, GRPO's KL   | 83.5 ± 4.4  | 81.7 ± 5.5 |
| PPO                       | 94.1 ± 1.3  | 79.7 ± 5.0 |

The published order is not found. What agrees: RAFT needs the larger group, and at k=2 it is behind RLOO, in the bandit
by far. What does not: at equal samples groups bring nothing over single completions of more prompts, and in the walks,
seed by seed, RLOO k=4 is 5.0 ± 3.4 behind REINFORCE. A group whose completions all miss the goal has no advantages to
learn from, and a batch has fewer starts. PPO learns fast at a third of the others' rate or less, and in the walks near
the edge: on an AMD EPYC the selection seeds preferred a rate at which one walker of ten ended below its reference, and
the mean is 74 ± 32; all others but RAFT k=2 (87.1 ± 7.2) are there within a point of these.
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

from experiments.recipes.compare_estimators_tasks import Task, bandit_task, random_graph, walks_task
from rl_jax.errors import InputError
from rl_jax.evaluation import mean_interval
from rl_jax.keys import Purpose, step_key
from rl_jax.learner import init_state, policy_gradient_update
from rl_jax.models.config import llama
from rl_jax.reinforce.composition import Estimator
from rl_jax.reinforce.estimators import make_estimator
from rl_jax.run.figures import PALETTE, band_of, draw_band, draw_interval, open_figure
from rl_jax.run.folder import write_json
from rl_jax.run.loop import run_main
from rl_jax.run.progress import show_progress
from rl_jax.run.spmd import make_mesh
from rl_jax.run.tables import open_results, write_table
from rl_jax.sweep import make_sweep, product_grid
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
RIVAL = "RLOO k=4"  # which the others are compared with, seed by seed


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
    """Runs that an estimator is judged by, each with a graph or a bandit of its own."""
    selection_seeds: int = 10
    """Other runs, which its learning rate is chosen by."""
    walk_rates: tuple[float, ...] = (0.0001, 0.0003, 0.001, 0.003, 0.01)
    """Adam's learning rates to choose from in walks."""
    bandit_rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
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
    """Each task with its name and the learning rates tried on it; a run has the problem of its seed."""
    problems, length = config.seeds + config.selection_seeds, config.length
    graphs = [random_graph(seed, config.nodes, config.degree, length) for seed in range(problems)]
    model = llama(config.nodes, length + 1, layers=1, width=config.width, heads=2, mlp_width=2 * config.width)
    yield "walks", walks_task(graphs, model, length, updates=config.pretraining_updates), config.walk_rates
    yield "bandit", bandit_task(problems, config.contexts, config.arms), config.bandit_rates


def make_run(config: Config, task: Task, contender: Contender) -> Callable[..., tuple[PyTree, Metrics]]:
    """A run of an estimator, whole: its setting and its problem -> the policy's parameters, and metrics [U]."""
    estimator, group_size = contender.estimator, contender.group_size

    def run(given: tuple[dict[str, Array], Any]) -> tuple[PyTree, Metrics]:
        setting, problem = given
        optimizer = optax.flatten(optax.adam(setting["learning_rate"]))
        score_fn = task.make_score_fn(problem)

        def update(state: TrainState, step: Array) -> tuple[TrainState, Metrics]:
            key = step_key(setting["seed"], Purpose.SAMPLE, step)
            rollout = task.sample(state.params, problem, key, config.batch // group_size, group_size)
            ref_logprobs, context = task.reference(problem, rollout)
            state, metrics = policy_gradient_update(
                state,
                rollout,
                task.reward(problem, rollout),
                estimator=estimator,
                score_fn=score_fn,
                optimizer=optimizer,
                group_size=group_size,
                ref_logprobs=ref_logprobs,
                context=context,
            )
            return state, {name: metrics[name] for name in ("reward", "kl_k1")}

        state = init_state(problem.ref_params, optimizer, config.kl_coefficient)
        state, metrics = jax.lax.scan(update, state, jnp.arange(config.completions // config.batch))
        return state.params, metrics

    return run


class Field(NamedTuple):
    """The runs of an estimator on a task, and how far each may get. R = rates * all seeds, the seeds consecutive.

    Attributes:
        rates: the learning rates tried.
        grid: "learning_rate" and "seed" of each run. [R].
        problems: of each run. [R, ...].
        start: the objective of the reference policy, whose KL is 0. [R].
        best: the highest objective there is. [R].
        evaluate: parameters, problems and keys [R, ...] -> "reward" and "kl" [R].
    """

    rates: tuple[float, ...]
    grid: dict[str, np.ndarray]
    problems: Any
    start: np.ndarray
    best: np.ndarray
    evaluate: Callable[..., Metrics]


def make_field(config: Config, task: Task, rates: tuple[float, ...]) -> Field:
    """The runs that every estimator is given on a task."""
    grid = product_grid(learning_rate=rates, seed=range(config.seeds + config.selection_seeds))
    problems = jax.tree.map(lambda x: x[grid["seed"]], jax.device_get(task.problems))
    evaluate = make_sweep(lambda end: task.evaluate(*end), make_mesh())
    best = make_sweep(lambda problem: task.best(problem, config.kl_coefficient), make_mesh())(task.problems)
    start = evaluate((problems.ref_params, problems, run_keys(grid)))["reward"]
    return Field(rates, grid, problems, np.asarray(start), np.asarray(best)[grid["seed"]], evaluate)


def run_keys(grid: dict[str, np.ndarray]) -> Array:
    """What each run's end is evaluated with. [R]."""
    return jax.vmap(lambda seed: step_key(seed, Purpose.EVALUATE))(grid["seed"])


class Result(NamedTuple):
    """What an estimator did on a task, at the learning rate that its selection seeds preferred, by the other seeds.

    "Way" is how far the objective, reward - kl_coefficient * KL in nats a completion, has come from the reference
    policy's to the highest there is, per cent.

    Attributes:
        contender: the estimator.
        rate: the learning rate.
        reward: of the policies at the end. [seeds].
        kl: of the same. [seeds].
        way: of the same. [seeds].
        curve: the way of what was sampled in the course. [seeds, points].
        by_rate: the way at the end, at every rate. [rates, seeds].
    """

    contender: Contender
    rate: float
    reward: np.ndarray
    kl: np.ndarray
    way: np.ndarray
    curve: np.ndarray
    by_rate: np.ndarray


def run_contender(config: Config, task: Task, contender: Contender, field: Field) -> Result:
    """Every run of an estimator, at every rate and seed, in one program, and what came out at its best rate."""
    params, metrics = make_sweep(make_run(config, task, contender), make_mesh())((field.grid, field.problems))
    ends = field.evaluate((params, field.problems, run_keys(field.grid)))
    return judge(config, contender, field, *jax.device_get((ends, metrics)))


def judge(
    config: Config, contender: Contender, field: Field, ends: dict[str, np.ndarray], metrics: dict[str, np.ndarray]
) -> Result:
    """The runs at the rate with the highest mean way at the end over the selection seeds, which are the last ones.

    From reward and kl of the policies at the end [R], and reward and kl_k1 of every update [R, U], the result over the
    first `seeds` seeds, which the choice has not seen.
    """
    rates, judged = len(field.rates), slice(config.seeds)
    sampled = metrics["reward"] - config.kl_coefficient * metrics["kl_k1"]
    curve = sampled.reshape(len(sampled), config.points, -1).mean(axis=-1)
    objective = ends["reward"] - config.kl_coefficient * ends["kl"]
    ways = 100 * (np.column_stack([curve, objective]) - field.start[:, None]) / (field.best - field.start)[:, None]
    ways = ways.reshape(rates, -1, config.points + 1)
    preferred = ways[:, config.seeds :, -1].mean(axis=1)
    best = int(np.argmax(np.nan_to_num(preferred, nan=-np.inf)))
    return Result(
        contender,
        rate=field.rates[best],
        reward=ends["reward"].reshape(rates, -1)[best, judged],
        kl=ends["kl"].reshape(rates, -1)[best, judged],
        way=ways[best, judged, -1],
        curve=ways[best, judged, :-1],
        by_rate=ways[:, judged, -1],
    )


def table_rows(name: str, results: list[Result]) -> list[dict[str, Any]]:
    """The table of a task, the best first; intervals are 95 % over seeds, of differences between the same seeds."""
    rivals = [result.way for result in results if result.contender.label == RIVAL]
    rows = []
    for result in sorted(results, key=lambda result: -result.way.mean()):
        row = {
            "task": name,
            "estimator": result.contender.label,
            "learning rate": result.rate,
            "reward": mean_interval(result.reward),
            "KL, nats": mean_interval(result.kl),
            "way to the optimum, %": mean_interval(result.way),
        }
        row |= {f"less {RIVAL}": mean_interval(result.way - way) for way in rivals if way is not result.way}
        rows.append(row | {"published win rate, %": PUBLISHED.get(result.contender.label)})
    return rows


def main(config: Config) -> None:
    check(config)
    compared = contenders(config)
    began = time.perf_counter()
    folder = open_results(config.results)
    rows, runs = [], {}
    for name, task, rates in make_tasks(config):
        field = make_field(config, task, rates)
        results = []
        with show_progress(name, 0, len(compared)) as progress:
            for contender in compared:
                results.append(run_contender(config, task, contender, field))
                progress.show(len(results), {"seconds": time.perf_counter() - began})
        rows += table_rows(name, results)
        runs[name] = {
            result.contender.label: dict(zip(Result._fields[1:], result[1:], strict=True)) for result in results
        }
        draw(folder / f"{name}.png", config, results, rates)
    write_json(folder / "runs.json", runs)
    write_table(folder, rows, dataclasses.asdict(config) | {"seconds": time.perf_counter() - began})


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


def draw(path: Path, config: Config, results: list[Result], rates: tuple[float, ...]) -> None:
    """The way to the optimum over completions, at the end, and at the end by rate; bands are 95 % over seeds."""
    titles = ["In the course", "At the end", "At the end, by learning rate"]
    with open_figure(path, titles, width=4.4, height=3.8) as (learning, ranking, sensitivity):
        completions = config.completions * (np.arange(config.points) + 0.5) / config.points
        ranked = sorted(results, key=lambda result: result.way.mean())
        for place, result in enumerate(ranked):
            label, _, _, colour, dashed = result.contender
            course, by_rate = (band_of(map(mean_interval, ways)) for ways in (result.curve.T, result.by_rate))
            draw_band(learning, completions, course, label, colour, dashed)
            draw_band(sensitivity, np.array(rates), by_rate, label, colour, dashed)
            face = "white" if dashed else colour
            draw_interval(ranking, mean_interval(result.way), place, colour, markersize=6, markerfacecolor=face)
        ranking.set_yticks(range(len(ranked)), [result.contender.label for result in ranked])
        for label, result in zip(ranking.get_yticklabels(), ranked, strict=True):
            label.set(color=result.contender.colour, fontweight="bold")
        way = "way from the reference to the optimum, %"
        learning.set(xlabel="completions", ylabel=way, ylim=(0, 100))
        ranking.set(xlabel=way, xlim=(None, 100))
        sensitivity.set(xlabel="learning rate", xscale="log", ylim=(0, 100))
        sensitivity.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
        sensitivity.set_xticks([], minor=True)


if __name__ == "__main__":
    run_main(main, Config)
