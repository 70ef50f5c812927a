"""The report's section on a reward model: what was measured of it on held-out judgements."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from rl_jax.run.curves import draw_axes, figure_element
from rl_jax.run.figures import GUIDE, PALETTE
from rl_jax.run.report_sections import ACCURACY, MISSING, Measure, measured, part, table_row
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
    about = part(summary, "reward_model")
    rows = ""
    for measure in MEASURES:
        cells = measured(about, measure)
        if cells.after != MISSING:
            label = f"{measure.label} <small>{measure.unit}</small>"
            rows += table_row(label, f"{cells.after}<small>{cells.after_interval}</small>")
    table = rows and f'<table class="measures judged"><tbody>{rows}</tbody></table>'
    calibration = _reliability(about)
    figures = calibration + _by_gap(about) + _learning_curve(about)
    grid = figures and f'<div class="grid">{figures}</div>'
    note = f'<p class="note">{BARS}{DIAGONAL if calibration else ""}</p>'
    return _counts(about) + table + grid + note if table or grid else ""


def read_points(rows: Any, across: str, up: str) -> Points:
    """Of rows of a summary, those whose two names are numbers; an interval that is none shrinks to the point."""
    found = []
    for row in _known(rows, across, up):
        y, low, high = row[up], finite(row.get("low")), finite(row.get("high"))
        found.append((row[across], y, y if low is None else min(low, y), y if high is None else max(high, y)))
    return Points(*np.array(sorted(found), float).reshape(-1, 4).T)


def _known(rows: Any, *names: str) -> list[dict[str, Any]]:
    """Those of the rows that have a number by each of the names."""
    known = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [row for row in known if all(finite(row.get(name)) is not None for name in names)]


def _counts(about: dict[str, Any]) -> str:
    kind = about.get("kind")
    shown = [escape(kind.capitalize())] if isinstance(kind, str) and kind else []
    for name, phrase in COUNTS.items():
        count = finite(about.get(name))
        if count is not None and count > LEAST.get(name, -1):
            shown.append(phrase.format(f"{count:,.0f}"))
    return f'<p class="note">{", ".join(shown)}.</p>' if shown else ""


def _reliability(about: dict[str, Any]) -> str:
    lines = [(read_points(about.get("reliability"), "confidence", "observed"), PALETTE[0])]

    def diagonal(axes: Any) -> None:
        axes.plot([0.5, 1], [0.5, 1], **GUIDE, zorder=1)  # below the points

    return _figure("Reliability", "probability by the rewards", "share of judges", "reliability", lines, diagonal)


def _by_gap(about: dict[str, Any]) -> str:
    lines = [(read_points(about.get("accuracy_by_gap"), "gap", "accuracy"), PALETTE[0])]
    return _figure("Accuracy by gap", "gap between the ratings", "pair accuracy", "by-gap", lines)


def _learning_curve(about: dict[str, Any]) -> str:
    rows = [row for row in _known(about.get("learning_curve"), "pairs", "layers", "accuracy") if row["pairs"] > 0]
    layers = sorted({row["layers"] for row in rows})[: len(PALETTE)]
    lines, keys = [], []
    for number, (layer, colour) in enumerate(zip(layers, PALETTE, strict=False)):
        points = read_points([row for row in rows if row["layers"] == layer], "pairs", "accuracy")
        aside = 1.02 ** (number - (len(layers) - 1) / 2)  # so that no bar hides another
        lines.append((points._replace(across=aside * points.across), colour))
        keys.append((f"{layer:g} layer{'' if layer == 1 else 's'}", colour))

    def count_across(axes: Any) -> None:
        """A logarithmic axis with a label at each count that has room for one."""
        from matplotlib.ticker import NullLocator

        axes.set_xscale("log")
        counts, kept = sorted({row["pairs"] for row in rows}), []
        for count in counts:
            if not kept or count >= (counts[-1] / counts[0]) ** 0.14 * kept[-1]:
                kept.append(count)
        axes.set_xticks(kept, [f"{count:,.0f}" for count in kept])
        axes.xaxis.set_minor_locator(NullLocator())

    return _figure("Learning curve", "pairs learned from", "pair accuracy", "learning", lines, count_across, keys)


def _figure(
    title: str,
    across: str,
    up: str,
    prefix: str,
    lines: Sequence[tuple[Points, str]],
    finish: Callable[[Any], None] = lambda axes: None,
    keys: Sequence[tuple[str, str]] = (),
) -> str:
    """A figure of lines of shares, each with its colour, "" without a point; `finish` draws what else there is."""
    if not any(len(points.up) for points, _ in lines):
        return ""

    def fill(axes: Any) -> None:
        from matplotlib.ticker import FuncFormatter

        style = {"marker": "o", "markersize": 2.5, "linewidth": 1.5, "elinewidth": 0.7}
        for points, colour in lines:
            bars = np.stack([points.up - points.low, points.high - points.up])
            axes.errorbar(points.across, points.up, bars, color=colour, **style)
        finish(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))

    return figure_element(title, keys, draw_axes(fill, across, up, f"reward-model-{prefix}"))
