"""Small multiples of a run's metrics, as inline SVG."""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rl_jax.run.run_files import Rows, finite

Line = tuple[np.ndarray, np.ndarray]
"""Steps [n] and values [n] of a metric."""


class Panel(NamedTuple):
    """One small figure: its title, its vertical axis, and a label for each metric drawn in it, the last on top."""

    title: str
    unit: str
    series: dict[str, str]
    log: bool = False  # a logarithmic axis, where the values span a factor of ten
    lost: str = "not finite"  # what a value that is no number means


LEARNING = (
    Panel("Gradient norm", "global L2 norm", {"grad_norm": ""}),
    Panel("Learning rate", "step size", {"learning_rate": ""}),
)
LANGUAGE = (Panel("Loss", "nats a token", {"loss": "training", "held_out_loss": "held out"}), *LEARNING)
PANELS = {
    "pretrain": LANGUAGE,
    "finetune": LANGUAGE,
    "reward": (
        Panel("Loss", "a judgement", {"loss": "training", "held_out_loss": "held out"}),
        Panel("Accuracy", "share of pairs", {"accuracy": "training", "held_out_accuracy": "held out"}),
        Panel("Ensemble’s spread", "std over members", {"spread": ""}),
        *LEARNING,
    ),
    "rl": (
        Panel("Reward", "mean a completion", {"reward": ""}),
        Panel("Proxy and gold", "std of the reference", {"reward_gain": "proxy", "gold_gain": "gold"}),
        Panel("Gold reward", "mean a completion", {"gold": ""}),
        Panel("KL", "nats a completion", {"kl_k1": "estimated", "kl": "exact"}),
        Panel("Entropy", "nats a token", {"entropy": ""}),
        Panel("Reward spread", "standard deviation", {"reward_std": ""}),
        Panel("Completion length", "tokens", {"length": ""}),
        Panel(
            "Lost signal",
            "share",
            {"truncated": "truncated", "zero_signal_groups": "zero-signal", "clipped": "clipped"},
        ),
        Panel("Sampler–learner gap", "nats a token", {"logprob_gap": ""}),
        Panel("Importance ratio", "of a token", {"ratio_max": "highest", "ratio_min": "lowest"}, log=True),
        Panel("Effective sample size", "share of completions", {"effective_sample_size": ""}),
        Panel("Gradient norm", "global L2 norm", {"grad_norm": ""}),
        Panel("Gradient signal to noise", "squared norm / variance", {"grad_snr": ""}),
        Panel("Critical batch size", "prompts", {"critical_batch_size": ""}, log=True, lost="without a signal"),
        Panel("Explained variance", "share of the returns’", {"explained_variance": ""}),
        Panel("Value loss", "half the squared error", {"value_loss": ""}),
        Panel("KL coefficient", "reward a nat", {"kl_coefficient": ""}),
        Panel("Sampling rounds", "an update", {"rounds": ""}),
        Panel("Learning rate", "step size", {"learning_rate": ""}),
    ),
}
TITLES = {
    "pretrain": "Pretraining",
    "finetune": "Supervised fine-tuning",
    "reward": "Reward model",
    "rl": "Reinforcement learning",
}
RESTS = {
    "spread": 0.0,  # of one member
    "clipped": 0.0,
    "ratio_min": 1.0,
    "ratio_max": 1.0,
    "effective_sample_size": 1.0,
    "kl_coefficient": None,
}
"""Metrics that are not drawn while they stay within a thousandth of a value; None stands for their first."""
COLOURS = ("#2a6fb0", "#d9822b", "#1b222c")  # told apart with every common kind of colour blindness, and without colour
GREY = "#5b6573"
STYLE = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be searched
    "font.size": 8,
    "axes.labelcolor": GREY,
    "axes.edgecolor": "#c3cad3",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebef",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
}
UNSMOOTHED = ("held_out_loss", "held_out_accuracy", "learning_rate", "kl_coefficient")  # few points, or no noise
NOTE = "Faint: every update. Strong: a centred mean over a twentieth of them, where they are 40 or more."
STILL = "Not drawn, because they never moved: {}."


def split_round(stage: str) -> tuple[str, int]:
    """A stage's kind and the number of its round: "reward_2" is the second of "reward"."""
    kind, _, number = stage.rpartition("_")
    return (kind, int(number)) if kind in PANELS and re.fullmatch("[1-9][0-9]{0,5}", number) else (stage, 1)


def stage_title(stage: str) -> str:
    """What a page calls a stage; of one that it does not know, the name."""
    kind, number = split_round(stage)
    return TITLES.get(kind, kind.capitalize()) + (f", round {number}" if number > 1 else "")


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


def resting_value(name: str, values: np.ndarray) -> float | None:
    """The value that a metric of RESTS never left in any of its rows; None of other metrics, and where it moved."""
    if name not in RESTS or not len(values):
        return None
    known = RESTS[name]
    rest = float(values[0]) if known is None else known
    return rest if np.all(np.abs(values - rest) <= 1e-3 * abs(rest)) else None  # NaN is no rest


def ordered(stages: Iterable[str]) -> list[str]:
    """Those of the stages that have panels, in the order of the work."""
    kinds = list(PANELS)
    known = [stage for stage in stages if split_round(stage)[0] in kinds]
    return sorted(known, key=lambda stage: (kinds.index(split_round(stage)[0]), split_round(stage)[1]))


def read_line(rows: Rows, name: str) -> Line:
    """A metric, of the rows that have it; NaN where it was not finite."""
    points = [(row["step"], finite(row[name])) for row in rows if name in row]
    return np.array([step for step, _ in points]), np.array([value for _, value in points], dtype=float)


def window_of(name: str, values: np.ndarray) -> int:
    """How many rows a metric is averaged over: a twentieth of them, an odd number; 1 where it has few, or no noise."""
    return 1 if name in UNSMOOTHED else max(1, len(values) // 20) | 1


def _plot(axes: Any, name: str, line: Line, colour: str) -> None:
    """One metric: faint raw values beneath their centred mean, or the values alone where they are few."""
    steps, values = line
    window = window_of(name, values)
    marker = "o" if len(values) <= 30 else ""
    for heights, width, alpha in ((values, 0.7, 0.3), (smooth(values, window), 1.5, 1.0))[window == 1 :]:
        kept = thin(heights)
        axes.plot(steps[kept], heights[kept], marker=marker, ms=2.5, lw=width, alpha=alpha, color=colour)


def _inline(svg: str, prefix: str) -> str:
    """An SVG file as an element of a page: no prologue, no fixed size, and ids that no other figure has."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    box, inner = re.findall(r'<svg[^>]*viewBox="([^"]*)"[^>]*>(.*)', svg, flags=re.DOTALL)[0]
    inner = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", inner)
    return f'<svg viewBox="{box}" aria-hidden="true">{inner.strip()}'


def draw(series: dict[str, Line], unit: str, prefix: str, log: bool = False) -> str:
    """An inline SVG of at most three metrics over steps.

    Args:
        series: each metric by name.
        unit: the label of the vertical axis.
        prefix: begins every id in the SVG; one for each figure of a page.
        log: makes the vertical axis logarithmic where the positive values span a factor of ten.
    """

    def fill(axes: Any) -> None:
        for (name, line), colour in zip(series.items(), COLOURS, strict=False):
            _plot(axes, name, line, colour)
        set_ticks(axes, [values for _, values in series.values()], log)

    return draw_axes(fill, "step", unit, prefix)


def set_ticks(axes: Any, drawn: Sequence[np.ndarray], log: bool = False, whole: bool = True) -> None:
    """Round numbers along both axes, whole ones across; `log` is as in `draw`, for the values that are drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if log and (decades := _decades(drawn)) >= 1:
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if whole else f"{x:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}".replace("-", "−")))


def draw_axes(fill: Callable[[Any], None], across: str, up: str, prefix: str) -> str:
    """An inline SVG of what `fill` draws on the axes that it is given.

    Args:
        fill: matplotlib axes -> nothing.
        across: the label of the horizontal axis.
        up: that of the vertical one.
        prefix: begins every id in the SVG; one for each figure of a page.
    """
    import matplotlib  # slow to import, and only a report needs it
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": prefix}):
        figure = Figure(figsize=(3.5, 2.2), layout="constrained")
        fill(figure.add_subplot(xlabel=across, ylabel=up))
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    return _inline(target.getvalue(), prefix)


def _decades(drawn: Sequence[np.ndarray]) -> float:
    """Powers of ten that the positive finite values span."""
    values = np.concatenate(drawn)
    values = values[np.isfinite(values) & (values > 0)]
    return float(np.log10(values.max() / values.min())) if len(values) else 0.0


def figure_element(title: str, keys: Iterable[tuple[str, str]], svg: str, more: str = "") -> str:
    """A figure of the page: its caption, with a key for each label and colour, and the SVG."""
    shown = "".join(f'<span class="key" style="--colour:{colour}">{label}</span>' for label, colour in keys if label)
    return f"<figure><figcaption><strong>{title}</strong>{shown}{more}</figcaption>{svg}</figure>"


def _panel(panel: Panel, lines: dict[str, Line], prefix: str) -> str:
    series = {name: lines[name] for name in panel.series if name in lines}
    if not series:
        return ""
    keys = zip((panel.series[name] for name in series), COLOURS, strict=False)
    lost = sum(int((~np.isfinite(values)).sum()) for _, values in series.values())
    more = f'<span class="lost">{lost} {panel.lost}</span>' if lost else ""
    return figure_element(panel.title, keys, draw(series, panel.unit, prefix, panel.log), more)


def curves(metrics: dict[str, Rows]) -> str:
    """The figures of every stage as HTML, "" where there is nothing to draw.

    Args:
        metrics: the rows of each stage, sorted by "step"; a value may be None.
    """
    grids = ""
    for stage in ordered(metrics):
        panels = PANELS[split_round(stage)[0]]
        lines = {name: read_line(metrics[stage], name) for panel in panels for name in panel.series}
        still = {name: resting_value(name, values) for name, (_, values) in lines.items()}
        lines = {name: line for name, line in lines.items() if still[name] is None and np.isfinite(line[1]).any()}
        figures = "".join(_panel(panel, lines, f"{stage}-{number}") for number, panel in enumerate(panels))
        grids += f'<h3>{stage_title(stage)}</h3><div class="grid">{figures}</div>' if figures else ""
        names = ", ".join(f"{name} {value:g}" for name, value in still.items() if value is not None)
        grids += f'<p class="note">{STILL.format(names)}</p>' if figures and names else ""
    return grids and grids + f'<p class="note">{NOTE}</p>'
