"""The figure of the recipes `dialogue` and `story`: the reward over RL, its parts, and who wins by which judge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rl_jax.run.figures import GREY, GUIDE, PALETTE, draw_interval, open_figure

SMOOTH = 5  # updates that a line is the mean of


def draw_writing(
    path: Path,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    rows: Sequence[Mapping[str, Any]],
    parts: Sequence[str],
) -> None:
    """Three panels; every policy has a colour, the one before RL, which is the table's first row, is grey.

    Curves are metrics by the name of the policy, of which "whole" is the whole reward; its parts are columns of rows.
    """
    colours = {row["policy"]: colour for row, colour in zip(rows, (GREY, *PALETTE), strict=False)}
    wins = [name for name in rows[-1] if name.startswith("wins by ")]
    titles = ["The whole reward, as RL goes on", "Its parts, on held-out prompts", "Wins over the policy before, %"]
    with open_figure(path, titles, 4.6, 3.4) as (lines, points, bars):
        for name, metrics in curves.items():
            values = np.array([row["whole"] for row in metrics], float)
            width = min(SMOOTH, len(values))
            means = np.convolve(values, np.ones(width) / width, "valid")
            lines.plot(np.arange(width, len(values) + 1), means, color=colours[name], linewidth=1.6, label=name)
        lines.axhline(rows[0]["reward"].value, **GUIDE)
        lines.set(xlabel="updates", ylabel=f"mean of {SMOOTH} updates")
        lines.legend()
        draw_estimates(points, rows, parts, parts, colours, 1)
        draw_estimates(bars, rows[1:], wins, [name.removeprefix("wins by ") for name in wins], colours, 100)
        bars.axvline(50, **GUIDE)


def draw_estimates(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    names: Sequence[str],
    colours: Mapping[str, str],
    scale: float,
) -> None:
    """Points with their intervals, a line of them for each column, from the top, a colour for each policy."""
    for place, column in enumerate(columns):
        for number, row in enumerate(rows):
            y = -place + 0.16 * ((len(rows) - 1) / 2 - number)
            label = row["policy"] if place == 0 else None
            estimate = [scale * end for end in row[column]]
            draw_interval(axes, estimate, y, colours[row["policy"]], markersize=3.5, label=label)
    axes.set(yticks=[-place for place in range(len(columns))], yticklabels=names)
