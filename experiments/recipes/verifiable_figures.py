"""The figure of the recipe `verifiable`: accuracy as RL goes on, pass@k, and the length of right and wrong answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rl_jax.run.figures import GREY, PALETTE, draw_band, open_figure

Rows = Sequence[Mapping[str, Any]]
NAMES = {"rloo": "RLOO", "grpo": "GRPO", "dr_grpo": "Dr. GRPO"}  # of estimators, as papers have them


def draw_verifiable(path: Path, rows: Rows, points: Rows) -> None:
    """Three panels, a colour for each estimator; a band is from the lowest to the highest of its seeds.

    Args:
        path: of the PNG file.
        rows: of the table, of which the first is the policy before RL.
        points: of the curves.
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
            estimates = [last["accuracy" if k == 1 else f"pass@{k}"] for k in ks]
            band = 100 * np.array([(each.low, each.value, each.high) for each in estimates]).T
            draw_band(passed, np.array(ks), band, NAMES.get(name, name), colour)
        accuracy.set(xlabel="updates", ylabel="%", ylim=(0, 100))
        passed.set(xscale="log", xlabel="k", ylabel="% of held-out problems", xticks=ks, xticklabels=ks, ylim=(0, 101))
        passed.minorticks_off()
        lengths.set(xlabel="updates", ylabel="tokens")
        for axes in (accuracy, passed, lengths):
            axes.legend(frameon=False, fontsize=7)


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
