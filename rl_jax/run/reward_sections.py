"""The report's section on a reward model: what was measured of it on held-out judgements."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from rl_jax.run.curves import GREY, draw_axes, figure_element
from rl_jax.run.figures import PALETTE
from rl_jax.run.report_sections import ACCURACY, MISSING, Measure, measured, reward_model
from rl_jax.run.run_files import finite

MEASURES = (
    Measure("Pair accuracy", "of held-out pairs that are not tied", "", ACCURACY.after, True),
    Measure("Log-loss", "nats a pair; 0.693 knows nothing", "", "log_loss"),
    Measure("Calibration error", "ECE, probability", "", "ece"),
    Measure("Agreement with raters", "of their votes, mean over raters", "", "agreement_with_raters", True),
    Measure("Raters among each other", "one rater with most of the others", "", "agreement_among_raters", True),
    Measure("Kendall’s tau", "mean over held-out rankings", "", "kendall_tau"),
    Measure("Pearson’s correlation", "with held-out ratings", "", "pearson"),
    Measure("Spearman’s correlation", "with held-out ratings", "", "spearman"),
)
COUNTS = {
    "members": "an ensemble of {}",
    "train_rows": "{} learned from",
    "held_out_rows": "{} held out",
    "broken_rows": "{} broken and left out",
}
LEAST = {"members": 1, "broken_rows": 0}  # counts that go without saying
BARS = "Bars and ranges are 95% intervals."
DIAGONAL = (
    " On the dashed diagonal, what the rewards call 80% likely is preferred by 80% of the judges; below it, the reward "
    "model is too sure."
)


class Points(NamedTuple):
    """Places [n] and shares [n] of a line, with the ends of their intervals."""

    across: np.ndarray
    up: np.ndarray
    low: np.ndarray
    high: np.ndarray


def reward_section(summary: dict[str, Any]) -> str:
    """The section as HTML, "" for a run without a reward model."""
    about = reward_model(summary)
    rows = ""
    for measure in MEASURES:
        cells = measured(about, measure)
        if cells.after != MISSING:
            rows += f'<tr><th scope="row">{measure.label} <small>{measure.unit}</small></th>'
            rows += f"<td>{cells.after}<small>{cells.after_interval}</small></td></tr>"
    table = rows and f'<table class="measures judged"><tbody>{rows}</tbody></table>'
    calibration = _reliability(about)
    figures = calibration + _by_gap(about) + _learning_curve(about)
    grid = figures and f'<div class="grid">{figures}</div>'
    note = f'<p class="note">{BARS}{DIAGONAL if calibration else ""}</p>'
    return _counts(about) + table + grid + note if table or grid else ""


def read_points(rows: Any, across: str, up: str) -> Points:
    """Of rows of a summary, those whose two names are numbers; an interval that is none shrinks to the point."""
    found = []
    for row in rows if isinstance(rows, list) else ():
        x, y, low, high = (
            finite(row.get(name)) if isinstance(row, dict) else None for name in (across, up, "low", "high")
        )
        if x is not None and y is not None:
            found.append((x, y, y if low is None else min(low, y), y if high is None else max(high, y)))
    return Points(*np.array(sorted(found)).reshape(-1, 4).T)


def _counts(about: dict[str, Any]) -> str:
    kind = about.get("kind")
    shown = [escape(kind.capitalize())] if isinstance(kind, str) and kind else []
    for name, phrase in COUNTS.items():
        count = finite(about.get(name))
        if count is not None and count > LEAST.get(name, -1):
            shown.append(phrase.format(f"{count:,.0f}"))
    return f'<p class="note">{", ".join(shown)}.</p>' if shown else ""


def _reliability(about: dict[str, Any]) -> str:
    points = read_points(about.get("reliability"), "confidence", "observed")

    def fill(axes: Any) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
        _plot(axes, points, PALETTE[0])

    return _figure("Reliability", fill, "probability by the rewards", "share of judges", "reliability", points)


def _by_gap(about: dict[str, Any]) -> str:
    points = read_points(about.get("accuracy_by_gap"), "gap", "accuracy")

    def fill(axes: Any) -> None:
        _plot(axes, points, PALETTE[0])

    return _figure("Accuracy by gap", fill, "gap between the ratings", "pair accuracy", "by-gap", points)


def _learning_curve(about: dict[str, Any]) -> str:
    rows = about.get("learning_curve")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    rows = [row for row in rows if (finite(row.get("pairs")) or 0.0) > 0]
    layers = sorted({layer for row in rows if (layer := finite(row.get("layers"))) is not None})[: len(PALETTE)]
    lines = [read_points([row for row in rows if finite(row.get("layers")) == n], "pairs", "accuracy") for n in layers]
    drawn = [(n, line, colour) for n, line, colour in zip(layers, lines, PALETTE, strict=False) if len(line.up)]
    keys = [(f"{n:g} layer{'' if n == 1 else 's'}", colour) for n, _, colour in drawn]

    def fill(axes: Any) -> None:
        for number, (_, line, colour) in enumerate(drawn):
            aside = 1.02 ** (number - (len(drawn) - 1) / 2)  # so that no bar hides another
            _plot(axes, line._replace(across=line.across * aside), colour)
        _count_across(axes, sorted({x for _, line, _ in drawn for x in line.across}))

    every = (
        Points(*(np.concatenate(part) for part in zip(*(line for _, line, _ in drawn), strict=True))) if drawn else None
    )
    return _figure("Learning curve", fill, "pairs learned from", "pair accuracy", "learning", every, keys)


def _plot(axes: Any, points: Points, colour: str) -> None:
    bars = np.stack([points.up - points.low, points.high - points.up])
    axes.errorbar(
        points.across, points.up, bars, color=colour, marker="o", markersize=2.5, linewidth=1.5, elinewidth=0.7
    )


def _count_across(axes: Any, counts: Sequence[float]) -> None:
    """A logarithmic axis with a label at each count that has room for one."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    kept: list[float] = []
    for count in counts:
        if not kept or count >= (max(counts) / min(counts)) ** 0.14 * kept[-1]:
            kept.append(count)
    axes.set_xticks(kept, [f"{count:,.0f}" for count in kept])
    axes.xaxis.set_minor_locator(NullLocator())


def _figure(
    title: str,
    fill: Callable[[Any], None],
    across: str,
    up: str,
    prefix: str,
    points: Points | None,
    keys: Sequence[tuple[str, str]] = (),
) -> str:
    """A figure of shares, "" without a point."""
    if points is None or not len(points.up):
        return ""

    def finish(axes: Any) -> None:
        from matplotlib.ticker import FuncFormatter

        fill(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))

    return figure_element(title, keys, draw_axes(finish, across, up, f"reward-model-{prefix}"))
