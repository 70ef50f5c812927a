"""What the recipe `verifiable` says of completions that were checked: shares, lengths and pass@k, in a table's rows."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.recipes.verifiable_tasks import Problem
from rl_jax.best_of_n import best_of_n_weights
from rl_jax.evaluation import mean_interval, share_interval

BEFORE, ALL = "before RL", "all"  # the row of the policy that RL begins with; the rows of all seeds
EXAMPLES = 8  # problems whose completions are written to examples.md


class Measured(NamedTuple):
    """What a policy did with N held-out problems, G completions of each.

    Attributes:
        right: whether the answer is right, in its format. bool [N, G].
        greedy: whether that of the likeliest tokens is. bool [N, 1].
        formatted: whether the format is kept. [N, G].
        lengths: tokens of the completions. [N, G].
        kl: exact, from the policy before RL, nats a completion. [N, G].
        texts: the completions. N * G of them.
    """

    right: np.ndarray
    greedy: np.ndarray
    formatted: np.ndarray
    lengths: np.ndarray
    kl: np.ndarray
    texts: list[str]


Curves = Mapping[str, Sequence[Sequence[Measured]]]
"""By estimator and seed, what was measured after each part of RL."""


def pass_at_k(right: np.ndarray, k: int) -> np.ndarray:
    """Chance that of k completions of each problem one is right (Chen 2021, eq. 1). bool [N, G] -> [N]."""
    return np.sum(best_of_n_weights(right, k) * right, axis=1)


def powers(most: int) -> list[int]:
    """1, 2, 4 and so on, up to `most`."""
    return [2**n for n in range(most.bit_length())]


def line(measured: Sequence[Measured], most: int) -> dict[str, Any]:
    """What the table says of one policy, or of those of some seeds; pass@k up to k = `most`."""
    arrays = (np.concatenate(part, axis=1) for part in zip(*(each[:-1] for each in measured), strict=True))
    right, greedy, formatted, lengths, kl = arrays
    found: dict[str, Any] = {"accuracy": share_interval(right), "greedy accuracy": share_interval(greedy)}
    for k in powers(most)[1:]:
        found[f"pass@{k}"] = share_interval(np.stack([pass_at_k(each.right, k) for each in measured], axis=1))
    found["format"] = share_interval(formatted)
    for name, chosen in (("right", lengths[right]), ("wrong", lengths[~right])):
        found[f"length of {name}"] = float(chosen.mean()) if chosen.size else math.nan
    return found | {"KL, nats": mean_interval(kl)}


def table_rows(before: Measured, curves: Curves, most: int) -> list[dict[str, Any]]:
    """A row for the policy before RL, for each run, and for all runs of an estimator; pass@k up to k = `most`."""
    rows = [{"policy": BEFORE, "seed": ""} | line([before], most)]
    for name, runs in curves.items():
        ends = [curve[-1] for curve in runs]
        rows += [{"policy": name, "seed": str(seed)} | line([end], most) for seed, end in enumerate(ends)]
        rows += [{"policy": name, "seed": ALL} | line(ends, most)] if len(ends) > 1 else []
    return rows


def curve_rows(before: Measured, curves: Curves, updates: int) -> list[dict[str, Any]]:
    """What the figure draws: a row for each point of each run, so many updates after the one before."""
    return [
        {"policy": name, "seed": seed, "updates": number * updates} | line([point], 1)
        for name, runs in curves.items()
        for seed, curve in enumerate(runs)
        for number, point in enumerate([before, *curve])
    ]


def write_examples(folder: Path, problems: Sequence[Problem], before: Measured, curves: Curves) -> None:
    """The first completion of each of the first held-out problems, before RL and after."""
    shown = {BEFORE: before} | {name: runs[0][-1] for name, runs in curves.items()}
    lines = ["# The first completions of the first held-out problems\n"]
    for number, problem in enumerate(problems[:EXAMPLES]):
        lines.append(f"## {problem.words} {problem.answer}\n")
        for name, measured in shown.items():
            text = measured.texts[number * measured.right.shape[1]]
            lines.append(f"- {name} ({'right' if measured.right[number, 0] else 'wrong'}): `{text}`")
        lines.append("")
    (folder / "examples.md").write_text("\n".join(lines), "utf-8")
