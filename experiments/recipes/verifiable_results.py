"""What the recipe `verifiable` says of completions that were checked: shares, lengths and pass@k; table and figure."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.recipes.verifiable_tasks import Problem
from rl_jax.best_of_n import best_of_n_weights
from rl_jax.evaluation import mean_interval, share_interval
from rl_jax.run.figures import GREY, PALETTE, band_of, draw_band, open_figure

BEFORE, ALL = "before RL", "all"  # the row of the policy that RL begins with; the rows of all seeds
NAMES = {"rloo": "RLOO", "grpo": "GRPO", "dr_grpo": "Dr. GRPO"}  # of estimators, as papers have them
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

Rows = Sequence[Mapping[str, Any]]


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


def draw_verifiable(path: Path, rows: Rows, points: Rows) -> None:
    """Three panels, a colour for each estimator; a band is from the lowest to the highest of its seeds.

    The first of the table's rows is the policy before RL; points are those of the curves.
    """
    names = list(dict.fromkeys(point["policy"] for point in points))
    titles = ["Accuracy on held-out problems", "At least one of k is right", "Tokens of right and wrong completions"]
    with open_figure(path, titles, 4.4, 3.6) as (accuracy, passed, lengths):
        for name, colour in zip(names, PALETTE, strict=False):
            x, values = by_seed(points, name, "accuracy")
            label = NAMES.get(name, name)
            draw_band(accuracy, x, spread(100 * values), label, colour)
            for kind, dashed in (("wrong", False), ("right", True)):
                x, values = by_seed(points, name, f"length of {kind}")
                draw_band(lengths, x, spread(values), f"{label}, {kind}", colour, dashed)
        ks = [1, *(int(column.removeprefix("pass@")) for column in rows[0] if column.startswith("pass@"))]
        for name, colour in zip((rows[0]["policy"], *names), (GREY, *PALETTE), strict=False):
            last = [row for row in rows if row["policy"] == name][-1]  # of all seeds, where there are several
            band = 100 * band_of(last["accuracy" if k == 1 else f"pass@{k}"] for k in ks)
            draw_band(passed, np.array(ks), band, NAMES.get(name, name), colour)
        accuracy.set(xlabel="updates", ylabel="%", ylim=(0, 100))
        passed.set(xscale="log", xlabel="k", ylabel="% of held-out problems", xticks=ks, xticklabels=ks, ylim=(0, 101))
        passed.minorticks_off()
        lengths.set(xlabel="updates", ylabel="tokens")
        for axes in (accuracy, passed, lengths):
            axes.legend(fontsize=7)


def by_seed(points: Rows, name: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The updates [n] of an estimator's curve, and a column of it by seed [S, n]."""
    own = [point for point in points if point["policy"] == name]
    updates = sorted({point["updates"] for point in own})
    values = [point[column] if isinstance(point[column], float) else point[column].value for point in own]
    return np.array(updates), np.reshape(values, (-1, len(updates)))


def spread(values: np.ndarray) -> np.ndarray:
    """The least, the mean and the most of the seeds; without any number, none. [S, n] -> [3, n]."""
    masked = np.ma.masked_invalid(values)
    return np.stack([np.ma.filled(each(axis=0), np.nan) for each in (masked.min, masked.mean, masked.max)])
