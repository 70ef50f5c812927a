"""Figures of recipes, with the report's look, on white: a PNG file for reading, and what it shows beside it in JSON."""

import contextlib
import math
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rl_jax.run.curves import COLOURS, GREY, STYLE
from rl_jax.run.figure_data import figure_data, layout
from rl_jax.run.folder import write_text

# After the report's own, those of Okabe and Ito (2008), darkened where a line on white needs it: told apart with every
# common kind of colour blindness.
PALETTE = (*COLOURS, "#009e73", "#b0508c", "#8c6d1f", "#4fb0d9", "#c2402a")
MARKERS = dict(zip(PALETTE, "os^DvPX*", strict=True))  # of a line of each colour, where there are many
GUIDE = {"color": GREY, "linewidth": 0.9, "linestyle": (0, (4, 3))}  # how a line to compare with is drawn
FEW = 4  # lines that their colours tell apart, also in print
FEW_POINTS = 12  # that have room for a marker each


@contextlib.contextmanager
def open_figure(path: str | Path, titles: list[str], width: float = 4.2, height: float = 3.2) -> Generator[list[Any]]:
    """Axes side by side, one for each title, and when the context ends a PNG file of them and the JSON file beside it.

    NAME.png.json has what NAME.png shows, see `figure_data`. Each file is written whole or not at all. Where an axes
    has lines of more than four colours, each colour gets a marker of its own, in the legends too.

    Args:
        path: of the PNG file.
        titles: of the axes.
        width: of each, inches.
        height: inches.
    """
    from matplotlib import rc_context  # slow to import, and only a figure needs it
    from matplotlib.figure import Figure

    path = Path(path)
    titled = {"axes.titlesize": 10, "axes.titlelocation": "left"}
    with rc_context({**STYLE, **titled, "font.size": 9, "legend.fontsize": 8, "legend.frameon": False}):
        figure = Figure(figsize=(width * len(titles), height))
        figure.set_layout_engine("constrained", wspace=0.05)
        every = list(figure.subplots(1, len(titles), squeeze=False)[0])
        for axes, title in zip(every, titles, strict=True):
            axes.set_title(title, fontweight="bold")
        yield every
        mark_lines(every)
        half = path.with_name(path.name + ".tmp")
        figure.savefig(half, format="png", dpi=200, metadata={"Software": None})
        half.replace(path)
        write_text(path.with_name(path.name + ".json"), layout([figure_data(axes) for axes in every]))


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
    # What begins with "_" is in no legend, but tells whose band it is.
    axes.fill_between(x, band[0], band[2], color=colour, alpha=0.15, linewidth=0, label=f"_{label}")
    axes.plot(x, band[1], color=colour, linewidth=1.6, linestyle="--" if dashed else "-", label=label)


def band_of(estimates: Iterable[Sequence[float]]) -> np.ndarray:
    """What `draw_band` takes, of n estimates: each a value and the ends of its interval. [3, n]."""
    return np.array([(low, value, high) for value, low, high in estimates]).T


def draw_interval(axes: Any, estimate: Sequence[float], place: float, colour: str, **dot: Any) -> None:
    """A dot, and its interval as far as that is finite, on a line of its own.

    Args:
        axes: from `open_figure`.
        estimate: a value and the ends of its interval.
        place: of the line, upwards.
        colour: of both.
        dot: what else matplotlib is to know of the dot, such as its label.
    """
    value, low, high = estimate
    if math.isfinite(high - low):
        axes.plot([low, high], [place, place], color=colour, linewidth=1.4)
    axes.plot(value, place, "o", color=colour, **({"markersize": 4} | dot))


def draw_limit(axes: Any, y: float, label: str) -> None:
    """A dashed level that nothing can pass, with its name above it."""
    axes.axhline(y, **GUIDE, label=f"_{label}")
    style = {"ha": "right", "va": "bottom", "color": GREY, "fontsize": 8}
    axes.annotate(label, (1, y), (0, 2), ("axes fraction", "data"), "offset points", **style)


def mark_lines(every: list[Any]) -> None:
    """Gives each colour a marker of its own, hollow on lines that are not solid, if an axes has lines of many colours.

    A line that has a marker already keeps it at as many points; another gets one at each of a few points, or about
    eight along it, of which few lie under others.
    """
    curves = [[line for line in axes.lines if _is_curve(line) and len(line.get_xdata()) > 2] for axes in every]
    if all(len({line.get_color() for line in lines}) <= FEW for lines in curves):
        return
    legends = [legend for axes in every if (legend := axes.get_legend())]
    for line in (line for lines in curves for line in lines):
        if line.get_marker() in ("None", "", None):
            few = len(line.get_xdata()) <= FEW_POINTS
            line.set(markersize=4, markevery=None if few else (0.015 * [*MARKERS].index(line.get_color()), 0.12))
    keys = [line for legend in legends for line in legend.get_lines() if _is_curve(line)]
    for line in keys + [line for lines in curves for line in lines]:
        face = line.get_color() if line.get_linestyle() == "-" else "white"
        line.set(marker=MARKERS[line.get_color()], markerfacecolor=face)
    for line in keys:
        line.set_markersize(4)


def _is_curve(line: Any) -> bool:
    return line.get_linestyle() != "None" and line.get_color() in MARKERS
