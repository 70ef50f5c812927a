"""The figures of `policy_gradient_theorem`: error over the number of batches, variance and bias over the group size."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from rl_jax.run.figures import GREY, GUIDE, PALETTE, open_figure


def draw_errors(path: Path, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Error over the number of batches, both logarithmic: the unbiased falls for ever, the biased comes to rest."""
    with open_figure(path, ["Error of the mean of m batches"], 6.2, 4.2) as (axes,):
        for (name, (counts, found)), colour in zip(curves.items(), PALETTE, strict=False):
            axes.plot(counts, found, color=colour, linewidth=1.6, label=name)
        ends = np.array([1.0, max(counts[-1] for counts, _ in curves.values())])
        guide = min(found[0] for _, found in curves.values()) / 2 / np.sqrt(ends)
        axes.plot(ends, guide, **GUIDE)
        middle = (math.sqrt(ends[1]), guide[0] / ends[1] ** 0.25)
        below = {"textcoords": "offset points", "ha": "right", "va": "top", "color": GREY, "fontsize": 8}
        axes.annotate("slope −1/2", middle, (-4, -2), **below)
        axes.set(xscale="log", yscale="log", xlabel="m, batches", ylabel="root mean square error / |exact gradient|")
        label_ends(axes, {name: (counts[-1], found[-1]) for name, (counts, found) in curves.items()})


def draw_group_sizes(path: Path, rows: list[dict[str, Any]]) -> None:
    """Variance for the same number of completions, and bias, over the group size."""
    sizes = sorted({line["group size"] for line in rows})
    titles = [f"Variance of {sizes[-1]} completions a prompt", "Bias along the exact gradient"]
    with open_figure(path, titles, 4.6, 3.6) as (variances, biases):
        ends: dict[str, list[tuple[float, float]]] = {}
        for label, colour in zip(dict.fromkeys(row["advantage"] for row in rows), PALETTE, strict=False):
            lines = sorted((x for x in rows if x["advantage"] == label), key=lambda x: x["group size"])
            variance = [line["variance"] * line["group size"] / sizes[-1] for line in lines]
            along = [100 * line["bias along"].value for line in lines]
            for axes, values in ((variances, variance), (biases, along)):
                axes.plot(sizes, values, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label)
            ends[label] = [(sizes[-1], variance[-1]), (sizes[-1], along[-1])]
        for number, axes in enumerate((variances, biases)):
            axes.set(xscale="log", xlabel="G, completions in a group", xticks=sizes, xticklabels=sizes)
            axes.minorticks_off()
            label_ends(axes, {label: end[number] for label, end in ends.items()})
        variances.set(ylabel="variance / |exact gradient|²", ylim=(0, None))
        biases.set(ylabel="per cent")


def label_ends(axes: Any, ends: dict[str, tuple[float, float]]) -> None:
    """The name of each line beside its end (x, y), in its colour, none over another."""
    axes.figure.canvas.draw()
    points = {name: axes.transData.transform(end) for name, end in ends.items()}
    step, height = 1.25 * 8 * axes.figure.dpi / 72, -math.inf
    colours = dict(zip(ends, PALETTE, strict=False))
    for name in sorted(points, key=lambda name: points[name][1]):
        height = max(points[name][1], height + step)
        shift = (height - points[name][1]) * 72 / axes.figure.dpi
        axes.annotate(
            name, ends[name], (6, shift), textcoords="offset points", va="center", color=colours[name], fontsize=8
        )
