"""The page of a comparison: self-contained and safe to open, as a run's report is, with a colour for each entry."""

import functools
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from experiments.comparison import Entry, differences, measures, moved
from rl_jax.errors import InputError
from rl_jax.run.curves import (
    PANELS,
    Line,
    Panel,
    draw_axes,
    figure_element,
    ordered,
    read_line,
    resting_value,
    set_ticks,
    smooth,
    split_round,
    stage_title,
    thin,
    window_of,
)
from rl_jax.run.figures import PALETTE
from rl_jax.run.folder import write_text
from rl_jax.run.report import page
from rl_jax.run.report_sections import MEASURES, Cells, interval, measured, table_row
from rl_jax.run.run_files import finite

DASHES = ("solid", "dashed")  # lines of the first colours, and of the same colours once more
TITLED = 4  # names in the title
MOST = len(DASHES) * len(PALETTE)
NO_BREAK = "\u00a0"  # a space at which a line does not end
RANGES = (
    '<p class="note">The range beneath a number is its 95% interval; of pooled runs, the number is their mean and the '
    "range goes from the lowest to the highest.</p>"
)
LINES = (
    '<p class="note">Lines are as in the reports: a centred mean over a twentieth of the updates, where they are 40 or '
    "more. Pooled runs are the mean of these over the steps that all have, in a band from the lowest to the highest. A "
    "metric is drawn where two columns have it.</p>"
)


def write_comparison(path: str | Path, entries: Sequence[Entry]) -> Path:
    """Writes the page of a comparison, whole or not at all, and returns its path.

    Raises:
        InputError: the entries have no metric in common, or are too many to be told apart.
    """
    source = render(entries)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return write_text(path, source)


def render(entries: Sequence[Entry]) -> str:
    """The page as HTML."""
    if len(entries) > MOST:
        raise InputError(f"These are {len(entries)} different runs, and {MOST} can be told apart: give fewer of them.")
    figures = training(entries)
    if not figures:
        raise InputError("These runs share no metrics: compare runs of the same stages.")
    runs = [run for entry in entries for run in entry.runs]
    names = [entry.name for entry in entries]
    title = ", ".join(names[:TITLED]) + (f" and {len(names) - TITLED} more" if len(names) > TITLED else "")
    scripts = dict.fromkeys(str(run.config["script"]) for run in runs if "script" in run.config)
    sections = {"Before and after": results(entries), "What differs": settings(entries), "Training": figures}
    about = [f"Comparison of {len(runs)} runs", *scripts]
    return page(title, about, headline(entries), legend(entries), sections)


def headline(entries: Sequence[Entry]) -> str:
    """Which entry has the highest reward after tuning, as plain text; "" where that cannot be told."""
    rewards = {e.name: e.summary for e in entries if finite(e.summary.get("reward_after")) is not None}
    if len(rewards) < 2 or len({str(each.get("reward")) for each in rewards.values()}) > 1:
        return ""
    first, second, *_ = sorted(rewards, key=lambda name: rewards[name]["reward_after"], reverse=True)
    best, next_best = (measured(rewards[name], MEASURES["reward"], rewards.values()).after for name in (first, second))
    kl = finite(rewards[first].get("kl"))
    at = "" if kl is None else f" at an exact KL of {measured(rewards[first], MEASURES['kl']).after} nats a completion"
    bounds = [interval(rewards[name], "reward_after") for name in (first, second)]
    overlap = all(bounds) and bounds[1][1] >= bounds[0][0]
    sentence = f"{first} has the highest mean reward after tuning, {best}{at}; next is {second} with {next_best}"
    return sentence + (", and their ranges overlap." if overlap else ".")


def legend(entries: Sequence[Entry]) -> str:
    """The colour of each entry, and which runs it pools."""
    items = ""
    for number, entry in enumerate(entries):
        values = [f"{name} {text}" for name, text in entry.pooled.items()]
        about = "; ".join([f"{len(entry.runs)} runs", *values]) if len(entry.runs) > 1 else ""
        items += f"<span>{_key(entry, number)}{about and f' <small>{escape(about)}</small>'}</span>"
    return f'<p class="entries">{items}</p>'


def results(entries: Sequence[Entry]) -> str:
    """The tables of before and after as one, "" where no entry has a measure."""

    def cell(cells: Cells) -> str:
        before, number, between = moved(cells)
        return f"<small>{before.replace(' ', NO_BREAK)}</small>{number}<small>{between}</small>"

    rows = [(f"{m.label} <small>{m.unit}</small>", list(map(cell, every))) for m, every in measures(entries)]
    return _table("Measure", entries, rows) + RANGES if rows else ""


def settings(entries: Sequence[Entry]) -> str:
    """The settings that are not the same for all entries, and where they ran."""
    rows = [(escape(name), list(map(escape, texts))) for name, texts in differences(entries).items()]
    return _table("Setting", entries, rows) if rows else ""


def _table(corner: str, entries: Sequence[Entry], rows: Iterable[tuple[str, list[str]]]) -> str:
    head = "".join(f'<th scope="col">{_key(entry, number)}</th>' for number, entry in enumerate(entries))
    body = "".join(table_row(name, *cells) for name, cells in rows)
    return (
        f'<div class="scroll"><table class="measures compared" style="--columns:{len(entries)}"><thead><tr>'
        f'<th scope="col">{corner}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _look(number: int) -> tuple[str, str]:
    """The colour and the dashes of an entry."""
    return PALETTE[number % len(PALETTE)], DASHES[number // len(PALETTE)]


def _key(entry: Entry, number: int) -> str:
    colour, dashes = _look(number)
    return f'<span class="key {dashes}" style="--colour:{colour}">{escape(entry.name)}</span>'


# Figures


def training(entries: Sequence[Entry]) -> str:
    """A figure of every metric that two entries have, or that the only one has; "" where there is none."""
    grids = ""
    for stage in ordered(dict.fromkeys(stage for entry in entries for run in entry.runs for stage in run.metrics)):
        figures = ""
        for number, panel in enumerate(PANELS[split_round(stage)[0]]):
            for name in panel.series:
                figures += _figure(entries, stage, panel, name, f"{stage}-{number}-{name}")
            if "reward" in panel.series:
                figures += _reward_over_kl(entries, stage)
        grids += f'<h3>{stage_title(stage)}</h3><div class="grid">{figures}</div>' if figures else ""
    return grids and grids + LINES


def band(name: str, lines: Sequence[Line]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all lines of a metric have, [n]; the lowest, the mean and the highest of them, smoothed, [3, n]."""
    known = []
    for steps, values in lines:
        smoothed = smooth(values, window_of(name, values))
        known.append((steps[np.isfinite(smoothed)], smoothed[np.isfinite(smoothed)]))
    steps = functools.reduce(np.intersect1d, [steps for steps, _ in known])
    values = np.stack([values[np.isin(each, steps)] for each, values in known])
    return steps, np.stack([values.min(axis=0), values.mean(axis=0), values.max(axis=0)])


def _shared(entries: Sequence[Entry], stage: str, name: str) -> dict[int, list[Line]]:
    """A metric of each run that has finite values of it, by the entry's number; none where it is not to be drawn."""
    found = {}
    for number, entry in enumerate(entries):
        lines = [read_line(run.metrics.get(stage, ()), name) for run in entry.runs]
        if lines := [line for line in lines if np.isfinite(line[1]).any()]:
            found[number] = lines
    moving = any(resting_value(name, values) is None for lines in found.values() for _, values in lines)
    return found if moving and len(found) >= min(2, len(entries)) else {}


def _figure(entries: Sequence[Entry], stage: str, panel: Panel, name: str, prefix: str) -> str:
    """One metric of all entries."""
    shared = _shared(entries, stage, name)
    if not shared:
        return ""

    def fill(axes: Any) -> None:
        for number, lines in shared.items():
            colour, dashes = _look(number)
            steps, (low, mean, high) = band(name, lines)
            kept = thin(mean)
            axes.fill_between(steps[kept], low[kept], high[kept], color=colour, alpha=0.15, lw=0)
            marker = "o" if len(kept) <= 30 else ""
            axes.plot(steps[kept], mean[kept], color=colour, ls=dashes, lw=1.4, marker=marker, ms=2.5)
        set_ticks(axes, [values for lines in shared.values() for _, values in lines], panel.log)

    label = panel.series[name]
    title = f"{panel.title}, {label}" if label else panel.title
    return figure_element(title, (), draw_axes(fill, "step", panel.unit, prefix))


def _reward_over_kl(entries: Sequence[Entry], stage: str) -> str:
    """What the reward costs: each entry's way through the plane of exact KL and reward, with a dot at its end."""
    rewards, kls = (_shared(entries, stage, name) for name in ("reward", "kl"))
    if not rewards or not kls:
        return ""

    def fill(axes: Any) -> None:
        for number in rewards.keys() & kls.keys():
            colour, dashes = _look(number)
            steps, reward = band("reward", rewards[number])
            others, kl = band("kl", kls[number])
            x, y = kl[1, np.isin(others, steps)], reward[1, np.isin(steps, others)]
            axes.plot(x, y, color=colour, ls=dashes, lw=1.2)
            axes.plot(x[-1:], y[-1:], color=colour, marker="o", ms=4)
        set_ticks(axes, (), whole=False)

    svg = draw_axes(fill, "exact KL, nats a completion", "reward, mean a completion", f"{stage}-frontier")
    return figure_element("Reward over KL", (), svg)
