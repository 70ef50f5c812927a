"""Figures of recipes, with the report's look, on white."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from rl_jax.run.curves import COLOURS, GREY, STYLE

# After the report's own, those of Okabe and Ito (2008), darkened where a line on white needs it: told apart with every
# common kind of colour blindness.
PALETTE = (*COLOURS, "#009e73", "#b0508c", "#8c6d1f", "#4fb0d9", "#c2402a")


@contextlib.contextmanager
def open_figure(path: str | Path, titles: list[str], width: float = 4.2, height: float = 3.2) -> Generator[list[Any]]:
    """Axes side by side, one for each title, and a PNG file of them when the context ends, whole or not at all.

    Args:
        path: of the PNG file.
        titles: of the axes.
        width: of each, inches.
        height: inches.
    """
    from matplotlib import rc_context  # slow to import, and only a figure needs it
    from matplotlib.figure import Figure

    path = Path(path)
    with rc_context({**STYLE, "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(width * len(titles), height), layout="constrained")
        every = figure.subplots(1, len(titles), squeeze=False)[0]
        for axes, title in zip(every, titles, strict=True):
            axes.set_title(title, fontweight="bold")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e8ebef", linewidth=0.6)
            axes.set_axisbelow(True)
        yield list(every)
        half = path.with_name(path.name + ".tmp")
        figure.savefig(half, format="png", dpi=200, metadata={"Software": None})
        os.replace(half, path)


def draw_band(axes: Any, x: np.ndarray, band: np.ndarray, label: str, colour: str, dashed: bool = False) -> None:
    """A line with a band of the same colour about it.

    Args:
        axes: from `open_figure`.
        x: [n].
        band: the band's lower edge, the line, and the band's upper edge. [3, n].
        label: of the line.
        colour: of both.
        dashed: whether the line is.
    """
    axes.fill_between(x, band[0], band[2], color=colour, alpha=0.15, linewidth=0)
    axes.plot(x, band[1], color=colour, linewidth=1.6, linestyle="--" if dashed else "-", label=label)


def draw_limit(axes: Any, y: float, label: str) -> None:
    """A dashed level that nothing can pass, with its name above it."""
    axes.axhline(y, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(
        label,
        (1, y),
        (0, 2),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=GREY,
        fontsize=8,
    )
