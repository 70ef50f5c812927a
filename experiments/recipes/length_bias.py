"""GRPO's division by length makes wrong completions longer: exactly, by enumeration, and over a training.

    python experiments/recipes/length_bias.py

Two cores of an Intel Xeon, JAX 0.10.2: 2.2 minutes of processor time.

A policy is a table of logits for each prompt, first token and place. It writes steps, and which of its tokens says
whether a completion is right is one of two: the first, an idea that nothing later can mend or spoil, or the last, an
answer. Counted: the expected update of every algorithm, over all groups of 4 completions that there are, for random
policies of one prompt and up to 6 tokens; and how fast accuracy and mean lengths change along it, for a step of
length 1, in the parameters or, as the natural gradient goes, in the policy. Trained: 200 updates by Adam, with 8
completions of each of 16 hard prompts and up to 24 tokens. What is measured is exact, over all prompts; no algorithm
charges a KL. How a language model fared is in `verifiable.py`.

Published (Liu 2025): GRPO makes wrong completions longer, because it divides by a completion's length, and Dr. GRPO,
which divides neither by that nor by the standard deviation, does not; both are as accurate.

Measured, with 95 % intervals over 8 problems and 8 seeds. Mean tokens that a step adds to wrong and right completions:

| settled | algorithm                 | along the gradient         | along the natural gradient |
|---------|---------------------------|----------------------------|----------------------------|
| first   | grpo, only / length       | +0.06 ± 0.03, -0.10 ± 0.05 | +0.23 ± 0.25, -0.82 ± 0.50 |
| first   | dr_grpo, rloo, only / std | 0.00, 0.00                 | 0.00, 0.00                 |
| last    | grpo, only / length       | +0.25 ± 0.11, -0.14 ± 0.10 | +0.32 ± 0.21, -0.47 ± 0.39 |
| last    | dr_grpo, rloo, only / std | +0.20 ± 0.13, -0.08 ± 0.11 | 0.00, 0.00                 |

It is the division by length, and it alone: where any distribution can be had, the natural gradient changes log p(y) by
A(y) / length less its mean, which falls with the length of right completions and rises with that of wrong ones. In each
of the problems wrong completions grow by it. But Dr. GRPO's may grow too: where the last token settles, the plain
gradient of accuracy itself does it, which unlearns early wrong answers first, for their places are reached more often.
Accuracy rises nearly as fast by grpo as by dr_grpo, along the gradient by 0.198 and 0.202 settled first, 0.194 and
0.199 last.

And after training; less is than dr_grpo, seed by seed. Wrong completions have 6.5 tokens before, or 5.8 settled last:

| settled | algorithm     | wrong     | less          | right     | right, % | less       |
|---------|---------------|-----------|---------------|-----------|----------|------------|
| first   | grpo          | 8.4 ± 0.5 | 2.4 ± 0.6     | 4.5 ± 0.3 | 50 ± 7   | -6.0 ± 2.3 |
|         | only / length | 8.4 ± 0.4 | 2.4 ± 0.5     | 4.4 ± 0.3 | 51 ± 7   | -5.0 ± 2.1 |
|         | only / std    | 5.9 ± 0.3 | -0.03 ± 0.04  | 7.9 ± 0.5 | 56 ± 7   | -0.6 ± 0.7 |
|         | dr_grpo       | 6.0 ± 0.3 |               | 7.9 ± 0.5 | 56 ± 7   |            |
|         | rloo          | 6.0 ± 0.3 | -0.01 ± 0.01  | 7.9 ± 0.5 | 56 ± 7   | 0.0        |
| last    | grpo          | 9.1 ± 0.7 | 0.72 ± 0.27   | 6.6 ± 1.1 | 27 ± 9   | -0.3 ± 2.1 |
|         | only / length | 9.1 ± 0.8 | 0.77 ± 0.33   | 7.0 ± 1.1 | 28 ± 9   | 1.6 ± 2.7  |
|         | only / std    | 8.3 ± 0.7 | -0.03 ± 0.31  | 6.4 ± 1.2 | 26 ± 8   | -0.4 ± 1.6 |
|         | dr_grpo       | 8.3 ± 0.7 |               | 6.2 ± 1.3 | 27 ± 7   |            |
|         | rloo          | 8.2 ± 0.7 | -0.10 ± 0.32  | 6.5 ± 1.2 | 27 ± 8   | 0.5 ± 2.0  |

So it is found where the first token settles, but there grpo ends somewhat less accurate. Where the last does, both are
as accurate, and grpo's wrong completions are longer, but most of the growth is Dr. GRPO's too.

Trained on, by `--updates 1000` (3 minutes), the first kind is as published: 98.7 % are right by grpo and 99.0 % by
dr_grpo, and wrong completions have 12.3 ± 2.2 and 4.7 ± 0.2 tokens. Of the last kind 99.6 and 99.5 % are right, and the
few wrong ones are as long by either, 6.4 ± 0.6 and 6.3 ± 0.8.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rl_jax.errors import InputError
from rl_jax.evaluation import mean_interval
from rl_jax.keys import Purpose, step_key
from rl_jax.learner import init_state, policy_gradient_update
from rl_jax.reinforce import exact
from rl_jax.reinforce.composition import Estimator
from rl_jax.reinforce.distributions import entropy, token_logprobs
from rl_jax.reinforce.estimators import make_estimator
from rl_jax.reinforce.gradient import Scores
from rl_jax.run.figures import PALETTE, band_of, draw_band, open_figure
from rl_jax.run.folder import write_json
from rl_jax.run.loop import run_main
from rl_jax.run.spmd import make_mesh
from rl_jax.run.tables import open_results, write_table
from rl_jax.sweep import make_sweep
from rl_jax.types import Array, Metrics, PyTree, Rollout, TrainState

GO, RIGHT, WRONG, END = range(4)  # the tokens: more steps, a right or a wrong idea or answer, the end
SETTLED = ("first", "last")  # which of a completion's tokens says whether it is right
RIVAL = "dr_grpo"  # which the others are compared with, seed by seed
MEASURES = ("accuracy", "length of wrong", "length of right")


@dataclasses.dataclass(frozen=True)
class Config:
    """How algorithms change the length of wrong and of right completions, exactly and in training."""

    problems: int = 8
    """Random policies that the expected gradient is summed for, of one prompt each."""
    counted_length: int = 6
    """Most tokens of their completions."""
    counted_group: int = 4
    """Completions in each of the groups that are summed."""
    length: int = 24
    """Most tokens of a completion in training."""
    prompts: int = 16
    """Prompts in training, all of them in every update."""
    group_size: int = 8
    """Completions of each in an update."""
    updates: int = 200
    """Updates of a run."""
    learning_rate: float = 0.02
    """Adam's."""
    epsilon: float = 1e-8
    """Adam's. Far above any gradient it makes Adam plain ascent with momentum, at a rate of learning_rate / epsilon."""
    odds: float = -5.0
    """Mean logarithm of the odds of right against wrong, of a policy at the start of training."""
    seeds: int = 8
    """Runs of each algorithm, each with prompts of its own."""
    results: Path = Path("results/length_bias")
    """Folder that the table and the figures are written to."""


def algorithms() -> dict[str, Estimator]:
    """Those that are compared, none with a KL."""
    return {
        "grpo": make_estimator("grpo", kl="none"),
        "only / length": make_estimator("dr_grpo", normalize="sequence"),
        "only / std": make_estimator("grpo", kl="none", normalize="constant"),
        RIVAL: make_estimator(RIVAL),
        "rloo": make_estimator("rloo", kl="none"),
    }


class Task(NamedTuple):
    """Completions whose first or last token says whether they are right.

    Attributes:
        completions: every completion of each of N prompts. B = N * K.
        right: whether they are. bool [K].
        lengths: tokens of each. [K].
        allowed: tokens that may stand in each place. bool [C, V].
    """

    completions: Rollout
    right: Array
    lengths: Array
    allowed: Array


def make_task(settled: str, prompts: int, length: int) -> Task:
    """Completions of up to C tokens.

    Settled last, they are steps and then an answer, right or wrong; what is cut has no answer, which is wrong. Settled
    first, they are an idea, right or wrong, and then steps and the end; being cut does no harm.
    """
    if settled == "last":
        rows = [[GO] * n + [answer] for n in range(length) for answer in (RIGHT, WRONG)] + [[GO] * length]
        allowed = np.tile(np.isin(np.arange(4), (GO, RIGHT, WRONG)), (length, 1))
    else:
        ends = [[GO] * n + [END] for n in range(length - 1)] + [[GO] * (length - 1)]
        rows = [[idea, *end] for idea in (RIGHT, WRONG) for end in ends]
        allowed = np.tile(np.isin(np.arange(4), (GO, END)), (length, 1))
        allowed[0] = np.isin(np.arange(4), (RIGHT, WRONG))
    lengths = np.array([len(row) for row in rows])
    tokens = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
    ids = np.repeat(np.arange(prompts, dtype=np.int32), len(rows))[:, None]
    completions = Rollout(
        prompts=jnp.asarray(ids),
        prompt_mask=jnp.ones(ids.shape, bool),
        completions=jnp.tile(tokens, (prompts, 1)),
        completion_mask=jnp.tile(np.arange(length)[None, :] < lengths[:, None], (prompts, 1)),
        behavior_logprobs=jnp.zeros((len(ids), length)),
        truncated=jnp.tile(~np.isin([row[-1] for row in rows], (RIGHT, WRONG, END)), prompts),
    )
    return Task(completions, rewards(completions)[: len(rows)] > 0, jnp.asarray(lengths), jnp.asarray(allowed))


def rewards(rollout: Rollout) -> Array:
    """1 for a completion with the right token in it. [B]."""
    return jnp.any((rollout.completions == RIGHT) & rollout.completion_mask, axis=1).astype(jnp.float32)


def init_policy(key: Array, prompts: int, length: int, odds: float) -> Array:
    """Random logits for every prompt, first token and place; steps come in runs of about a third of C. [N, 3, C, V]."""
    steps = jnp.log(length / 3)  # against one token that ends them, or against two
    means = jnp.stack([steps, odds, 0.0, 0.0])
    return means[None, None, None] + jax.random.normal(key, (prompts, 3, length, 4))


def policy_logits(table: Array, rollout: Rollout, allowed: Array) -> Array:
    """By the prompt, the first token and the place. [N, 3, C, V] -> [B, C, V]."""
    places = jnp.arange(rollout.completions.shape[1])[None, :]
    first = jnp.where(places == 0, 0, jnp.minimum(rollout.completions[:, :1], WRONG))
    return jnp.where(allowed[None], table[rollout.prompts, first, places], -1e9)


def score(allowed: Array, params: PyTree, rollout: Rollout, context: Any) -> Scores:
    """The policy as the library asks for one, without a reference."""
    del context
    logits = policy_logits(params, rollout, allowed)
    logprobs = token_logprobs(logits, rollout.completions)
    return Scores(logprobs, entropy(logits), jnp.zeros_like(logprobs))


def update(
    task: Task, estimator: Estimator, state: TrainState, rollout: Rollout, optimizer: Any, group_size: int
) -> TrainState:
    """One update by an algorithm."""
    return policy_gradient_update(
        state,
        rollout,
        rewards(rollout),
        estimator=estimator,
        score_fn=partial(score, task.allowed),
        optimizer=optimizer,
        group_size=group_size,
        ref_logprobs=rollout.behavior_logprobs,
    )[0]


def completion_logprobs(table: Array, task: Task) -> Array:
    """Of every completion of each prompt. [N, 3, C, V] -> [N, K]."""
    tokens = score(task.allowed, table, task.completions, None).logprobs
    return exact.sequence_logprobs(tokens, task.completions.completion_mask, len(table))


def measure(table: Array, task: Task) -> dict[str, Array]:
    """Exact: the share of right completions, and the mean length of wrong and of right ones, over all prompts. []."""
    probabilities = jnp.exp(completion_logprobs(table, task)) / len(table)

    def length_of(chosen: Array) -> Array:
        weights = jnp.where(chosen[None], probabilities, 0.0)
        return jnp.sum(weights * task.lengths[None]) / jnp.sum(weights)

    accuracy = jnp.sum(jnp.where(task.right[None], probabilities, 0.0))
    return dict(zip(MEASURES, (accuracy, length_of(~task.right), length_of(task.right)), strict=True))


class Counted(NamedTuple):
    """What was summed for a policy; P parameters.

    Attributes:
        gradient: the mean of what an update at a learning rate of 1 adds to the parameters, over every group. [P].
        scores: gradient of the log-probability of each completion. [K, P].
        probabilities: of each completion. [K].
        measured: gradients of the measures. [P] each.
    """

    gradient: Array
    scores: Array
    probabilities: Array
    measured: dict[str, Array]


def count(config: Config, task: Task, estimator: Estimator) -> Counted:
    """Of every problem. [problems, ...]."""

    def run(seed: Array) -> Counted:
        table = init_policy(step_key(seed, Purpose.INIT), 1, config.counted_length, 0.0)
        optimizer = optax.sgd(1.0)
        tokens = score(task.allowed, table, task.completions, None).logprobs

        def gradient(rollout: Rollout) -> Array:
            state = init_state(table, optimizer, kl_coefficient=0.0)
            return update(task, estimator, state, rollout, optimizer, config.counted_group).params - table

        mean = exact.expected_gradient(gradient, task.completions, tokens, config.counted_group)
        scores = jax.jacrev(lambda x: completion_logprobs(x, task)[0])(table)
        measured = jax.jacrev(lambda x: measure(x, task))(table)
        return Counted(
            mean.reshape(-1),
            scores.reshape(len(scores), -1),
            jnp.exp(completion_logprobs(table, task)[0]),
            {name: value.reshape(-1) for name, value in measured.items()},
        )

    return jax.device_get(make_sweep(run, make_mesh())(np.arange(config.problems)))


def effects(counted: Counted) -> dict[str, dict[str, float]]:
    """How fast each measure changes along the expected update, and along its natural gradient, for one policy.

    Along a step of length 1: in the parameters, and for the natural gradient (Amari 1998), which does not depend on how
    the policy is parametrised, in the root of twice the KL, nats.
    """
    gradient, scores, probabilities, measured = jax.tree.map(lambda x: np.asarray(x, np.float64), counted)
    fisher = np.einsum("k,kp,kq->pq", probabilities, scores, scores)
    natural = np.linalg.pinv(fisher, rcond=1e-7, hermitian=True) @ gradient
    steps = {
        "gradient": gradient / np.linalg.norm(gradient),
        "natural gradient": natural / np.sqrt(gradient @ natural),
    }
    return {way: {name: round(float(x @ step), 5) for name, x in measured.items()} for way, step in steps.items()}


def train(config: Config, task: Task, estimator: Estimator) -> dict[str, np.ndarray]:
    """Every seed's run: the measures before each update and after the last. [seeds, U + 1] each."""
    optimizer = optax.adam(config.learning_rate, eps=config.epsilon)

    def run(seed: Array) -> Metrics:
        def step(state: TrainState, number: Array) -> tuple[TrainState, Metrics]:
            tokens = score(task.allowed, state.params, task.completions, None).logprobs
            key = step_key(seed, Purpose.SAMPLE, number)
            rollout = exact.draw_groups(key, task.completions, tokens, config.prompts, config.group_size)
            updated = update(task, estimator, state, rollout, optimizer, config.group_size)
            return updated, measure(state.params, task)

        table = init_policy(step_key(seed, Purpose.INIT), config.prompts, config.length, config.odds)
        end, course = jax.lax.scan(step, init_state(table, optimizer, kl_coefficient=0.0), jnp.arange(config.updates))
        return jax.tree.map(lambda x, last: jnp.append(x, last), course, measure(end.params, task))

    return jax.device_get(make_sweep(run, make_mesh())(np.arange(config.seeds)))


def counted_columns(found: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """What the expected update of an algorithm does, from `effects` for each problem."""
    columns = {
        f"{name}, along the {way}": mean_interval(np.array([each[way][name] for each in found]))
        for way in found[0]
        for name in MEASURES
    }
    longer = sum(each["gradient"]["length of wrong"] > 0 for each in found)
    return columns | {"problems with wrong ones longer": longer}


def trained_columns(runs: dict[str, np.ndarray], rival: dict[str, np.ndarray]) -> dict[str, Any]:
    """Where the runs of an algorithm end, and how far they are from the rival's of the same seeds."""
    ends = {name: values[:, -1] for name, values in runs.items()}
    columns = {name: mean_interval(values) for name, values in ends.items()}
    less = {f"{name}, less {RIVAL}": mean_interval(values - rival[name][:, -1]) for name, values in ends.items()}
    return {"length of wrong, before": mean_interval(runs["length of wrong"][:, 0])} | columns | less


def draw(path: Path, runs: dict[str, dict[str, dict[str, np.ndarray]]]) -> None:
    """Length of wrong and right completions and accuracy over updates; bands are 95 % over seeds."""
    for settled, of_algorithm in runs.items():
        with open_figure(path / f"settled_{settled}.png", [name.capitalize() for name in MEASURES]) as every:
            for axes, name in zip(every, MEASURES, strict=True):
                for (label, found), colour in zip(of_algorithm.items(), PALETTE, strict=False):
                    band = band_of(map(mean_interval, found[name].T))
                    draw_band(axes, np.arange(band.shape[1]), band, label, colour, dashed=label == "rloo")
                axes.set(xlabel="updates", ylabel="share" if name == "accuracy" else "tokens, exact mean")
            every[0].legend()


def check(config: Config) -> None:
    """Raise InputError for settings that cannot work, before the long work."""
    if min(config.problems, config.seeds) < 2 or min(config.prompts, config.updates) < 1:
        raise InputError("Two problems and two seeds, one prompt and one update are the least.")
    if min(config.length, config.counted_length) < 2 or min(config.group_size, config.counted_group) < 2:
        raise InputError("Completions of two tokens and groups of two completions are the least.")
    if not (config.learning_rate > 0 and config.epsilon > 0):
        raise InputError(f"learning_rate is {config.learning_rate} and epsilon {config.epsilon}; both must be above 0.")
    exact.check_groups(2 * config.counted_length + 1, config.counted_group)


def main(config: Config) -> None:
    check(config)
    began, folder, rows = time.perf_counter(), open_results(config.results), list[dict[str, Any]]()
    runs: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for settled in SETTLED:
        counting = make_task(settled, 1, config.counted_length)
        training = make_task(settled, config.prompts, config.length)
        runs[settled] = {name: train(config, training, estimator) for name, estimator in algorithms().items()}
        for name, estimator in algorithms().items():
            counted = count(config, counting, estimator)
            found = [effects(jax.tree.map(lambda x, n=n: x[n], counted)) for n in range(config.problems)]
            row = {"settled": settled, "algorithm": name} | counted_columns(found)
            rows.append(row | trained_columns(runs[settled][name], runs[settled][RIVAL]))
    write_json(folder / "runs.json", runs)
    draw(folder, runs)
    write_table(folder, rows, dataclasses.asdict(config) | {"seconds": time.perf_counter() - began})


if __name__ == "__main__":
    run_main(main, Config)
