"""Small multiples of a run's metrics, as inline SVG."""

import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Rows = Sequence[dict[str, Any]]


class Panel(NamedTuple):
    """One small figure: its title, its vertical axis, and a label for each metric drawn in it."""

    title: str
    unit: str
    series: dict[str, str]


PANELS = {
    "pretrain": (
        Panel("Loss", "nats a token", {"loss": "training", "held_out_loss": "held out"}),
        Panel("Gradient norm", "global L2 norm", {"grad_norm": ""}),
        Panel("Learning rate", "step size", {"learning_rate": ""}),
    ),
    "rl": (
        Panel("Reward", "mean a completion", {"reward": ""}),
        Panel("Exact KL", "nats a completion", {"kl": ""}),
        Panel("Entropy", "nats a token", {"entropy": ""}),
        Panel("Reward spread", "standard deviation", {"reward_std": ""}),
        Panel("Completion length", "tokens", {"length": ""}),
        Panel("Lost signal", "share", {"truncated": "truncated", "zero_signal_groups": "zero-signal groups"}),
        Panel("Gradient norm", "global L2 norm", {"grad_norm": ""}),
        Panel("Sampler–learner gap", "nats a token", {"logprob_gap": ""}),
        Panel("Learning rate", "step size", {"learning_rate": ""}),
    ),
}
TITLES = {"pretrain": "Pretraining", "rl": "Reinforcement learning"}
COLOURS = ("#2a6fb0", "#d9822b")  # blue and orange: told apart by every common kind of colour blindness
GREY = "#5b6573"
STYLE = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be searched
    "font.size": 8,
    "axes.labelcolor": GREY,
    "axes.edgecolor": "#c3cad3",
    "axes.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
}
UNSMOOTHED = frozenset({"held_out_loss", "learning_rate"})  # few points, or no noise
NOTE = "Faint: every update. Strong: a centred mean over a twentieth of them, where they are 40 or more."


def finite(value: Any) -> float | None:
    """The value as a float; None where it is no number, or none that is finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean [n] of the finite values in a window of an odd number of rows; NaN where it has none."""
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), np.ones(window), "same")
    count = np.convolve(known, np.ones(window), "same")
    return np.where(count > 0.5, total / np.maximum(count, 1), np.nan)


def thin(values: np.ndarray, bins: int = 300) -> np.ndarray:
    """Sorted indices of the lowest and the highest value of each bin, so that a long run keeps its spikes."""
    if len(values) <= 2 * bins:
        return np.arange(len(values))
    keep: set[int] = set()
    for chunk in np.array_split(np.arange(len(values)), bins):
        known = chunk[np.isfinite(values[chunk])]
        ends = (known[values[known].argmin()], known[values[known].argmax()]) if len(known) else (chunk[0],)
        keep.update(map(int, ends))
    return np.array(sorted(keep))


def _series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] and values [n] of the rows that have the metric; NaN where it was not finite."""
    points = [(row["step"], finite(row[name])) for row in rows if name in row]
    return np.array([step for step, _ in points]), np.array([value for _, value in points], dtype=float)


def _plot(axes: Any, name: str, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """One metric: faint raw values beneath their centred mean, or the values alone where they are few."""
    window = 1 if name in UNSMOOTHED else max(1, len(values) // 20) | 1
    marker = "o" if len(values) <= 30 else ""
    for line, width, alpha in ((values, 0.7, 0.3), (smooth(values, window), 1.5, 1.0))[window == 1 :]:
        kept = thin(line)
        axes.plot(steps[kept], line[kept], marker=marker, ms=2.5, lw=width, alpha=alpha, color=colour)


def _inline(svg: str, prefix: str) -> str:
    """An SVG file as an element of a page: no prologue, no fixed size, and ids that no other figure has."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    box, inner = re.findall(r'<svg[^>]*viewBox="([^"]*)"[^>]*>(.*)', svg, flags=re.DOTALL)[0]
    inner = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", inner)
    return f'<svg viewBox="{box}" aria-hidden="true">{inner.strip()}'


def draw(series: dict[str, tuple[np.ndarray, np.ndarray]], unit: str, prefix: str) -> str:
    """An inline SVG of at most two metrics over steps.

    Args:
        series: steps [n] and values [n] of each metric by name.
        unit: the label of the vertical axis.
        prefix: begins every id in the SVG; one for each figure of a page.
    """
    import matplotlib  # slow to import, and only a report needs it
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": prefix}):
        figure = Figure(figsize=(3.5, 2.2), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=unit, axisbelow=True)
        for (name, (steps, values)), colour in zip(series.items(), COLOURS, strict=False):
            _plot(axes, name, steps, values, colour)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e8ebef", linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}".replace("-", "−")))
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    return _inline(target.getvalue(), prefix)


def _panel(panel: Panel, rows: Rows, prefix: str) -> str:
    series = {name: _series(rows, name) for name in panel.series}
    series = {name: line for name, line in series.items() if np.isfinite(line[1]).any()}
    if not series:
        return ""
    keys = "".join(
        f'<span class="key" style="--colour:{colour}">{panel.series[name]}</span>'
        for name, colour in zip(series, COLOURS, strict=False)
        if panel.series[name]
    )
    lost = sum(int((~np.isfinite(values)).sum()) for _, values in series.values())
    keys += f'<span class="lost">{lost} not finite</span>' if lost else ""
    caption = f"<figcaption><strong>{panel.title}</strong>{keys}</figcaption>"
    return f"<figure>{caption}{draw(series, panel.unit, prefix)}</figure>"


def curves(metrics: dict[str, Rows]) -> str:
    """The figures of every stage as HTML, "" where there is nothing to draw.

    Args:
        metrics: the rows of each stage, sorted by "step"; a value may be None.
    """
    grids = ""
    for stage, panels in PANELS.items():
        rows = metrics.get(stage, ())
        figures = "".join(_panel(panel, rows, f"{stage}-{number}") for number, panel in enumerate(panels))
        grids += f'<h3>{TITLES[stage]}</h3><div class="grid">{figures}</div>' if figures else ""
    return grids and grids + f'<p class="note">{NOTE}</p>'
