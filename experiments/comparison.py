"""What several runs were and what came out, side by side; `comparison_page.py` draws it.

Runs that differ in nothing but what is pooled, as a rule the seed, are one entry.
"""

import collections
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rl_jax.errors import InputError
from rl_jax.run.report_sections import ACCURACY, FINETUNED, MEASURES, MISSING, Cells, Measure, flatten, measured
from rl_jax.run.run_files import Run, finite, read_run

ELSEWHERE = ("run", "resume", "track", "machine")  # settings that say where a run was, and not what it was
POOLED = ("seed",)
SHORT = ("reward", "kl", "win_rate", "bits")  # measures for the terminal


class Entry(NamedTuple):
    """Runs that are one line in a figure, and one column of a table.

    Attributes:
        name: the run's, or one for all of them.
        runs: one, or those that are pooled.
        summary: of the run, or of all of them.
        pooled: texts of the settings in which they differ: {"seed": "0, 1, 2"}.
    """

    name: str
    runs: Sequence[Run]
    summary: dict[str, Any]
    pooled: dict[str, str]


def read_entries(folders: Sequence[Path], pooled: Collection[str] = POOLED) -> list[Entry]:
    """Reads runs, and makes one entry of those that differ in nothing but pooled settings.

    Args:
        folders: of the runs; the entries stand in the order of their first ones.
        pooled: names of settings, or of groups of them, as config.json has them ("reinforce.options").

    Raises:
        InputError: a folder is not a run's, or there twice; there is one alone; or no run has a pooled setting.
    """
    if len(folders) < 2:
        raise InputError("There is nothing to compare: give the folders of at least two runs.")
    for number, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:number]]:
            raise InputError(f"{folder} is given twice; leave one out.")
    runs = [read_run(folder)._replace(name=name) for folder, name in zip(folders, _names(folders), strict=True)]
    for name in pooled:
        if name not in POOLED and not any(_is_of(setting, [name]) for run in runs for setting in _settings(run)):
            raise InputError(f"No run has a setting {name} to pool: give names as config.json has them.")
    groups: dict[tuple[Any, ...], list[Run]] = {}
    same: collections.Counter[tuple[Any, ...]] = collections.Counter()
    for run in runs:
        script, settings = run.config.get("script"), _settings(run)
        said = {name: text for name, text in settings.items() if not _is_of(name, pooled)}
        repeat = same[script, *settings.items()]  # of other code or another device: no further seed
        same[script, *settings.items()] += 1
        groups.setdefault((script, repeat, *said.items()), []).append(run)
    stems = [_stem(group) for group in groups.values()]
    taken = [*stems, *(run.name for run in runs)]
    return [
        Entry(
            stem if stem and taken.count(stem) == 1 else _first_of(group),
            group,
            pooled_summary([run.summary for run in group]),
            _various([_settings(run) for run in group]),
        )
        for stem, group in zip(stems, groups.values(), strict=True)
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names; where two have the same, the paths from the folder that they are all in."""
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    within = os.path.commonpath([path.parent for path in paths])
    return names if len(set(names)) == len(names) else [path.relative_to(within).as_posix() for path in paths]


def _stem(group: Sequence[Run]) -> str:
    """What the names of runs have before their numbers, "" where that differs: "grpo" of "grpo_seed0" and its like."""
    stems = {re.sub(r"([-_. ]+s|[-_. ]*seed)?[-_. ]*[0-9]+$", "", run.name) for run in group}
    return stems.pop() if len(stems) == 1 and len(group) > 1 else ""


def _first_of(group: Sequence[Run]) -> str:
    return group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")


def _settings(run: Run) -> dict[str, str]:
    """Names and texts of the settings that say what a run is."""
    settings = flatten(run.config.get("config") or {})
    return {name: text for name, text in settings if not _is_of(name, ELSEWHERE)}


def _is_of(name: str, groups: Collection[str]) -> bool:
    return f"{name}.".startswith(tuple(f"{group}." for group in groups))


# What came out


def pooled_summary(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One summary of several: the mean of each number that all have, with the lowest and the highest as its interval.

    What else is the same in all of them stays; of one summary, all.
    """
    first = summaries[0]
    if len(summaries) == 1:
        return first
    found: dict[str, Any] = {}
    for name, value in first.items():
        every = [summary.get(name) for summary in summaries]
        numbers = [number for number in map(finite, every) if number is not None]
        parts = [each for each in every if isinstance(each, dict)]
        if len(numbers) == len(every):
            found |= {name: float(np.mean(numbers)), f"{name}_interval": [min(numbers), max(numbers)]}
        elif len(parts) == len(every):
            found[name] = pooled_summary(parts)
        elif all(each == value for each in every) and not name.endswith("_interval"):
            found[name] = value
    return found


def measures(entries: Sequence[Entry]) -> list[tuple[Measure, list[Cells]]]:
    """Each measure that an entry has, with its texts for every entry, all to the same decimals."""
    summaries = [entry.summary for entry in entries]
    every = (*MEASURES.values(), ACCURACY, FINETUNED)
    rows = [(measure, [measured(summary, measure, summaries) for summary in summaries]) for measure in every]
    return [row for row in rows if any((cells.before, cells.after) != (MISSING, MISSING) for cells in row[1])]


def moved(cells: Cells) -> tuple[str, str, str]:
    """A measure in short: "0.072 → ", "0.704", and the range of the latter, "" where it is not known or no range."""
    before = f"{cells.before} → " if MISSING not in (cells.before, cells.after) else ""
    number, between = cells.after, cells.after_interval
    if number == MISSING:
        number, between = cells.before, cells.before_interval
    return before, number, "" if between == f"{number} to {number}" else between


def short_table(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Rows of a table for the terminal: an entry, how many runs it has, and what came out."""
    several = any(len(entry.runs) > 1 for entry in entries)
    rows: list[dict[str, Any]] = [
        {"run": entry.name} | ({"runs": len(entry.runs)} if several else {}) for entry in entries
    ]
    for measure, every in measures(entries):
        if measure in [MEASURES[name] for name in SHORT]:
            for row, cells in zip(rows, every, strict=True):
                before, number, between = moved(cells)
                name = measure.label[0].lower() + measure.label[1:]
                row[name] = before + number + (f" ({between})" if between else "")
    return rows


def facts(run: Run) -> dict[str, str]:
    """Names and texts of what a run was: its script, its settings, the device and the versions that it ran on."""
    about = {name: run.config[name] for name in ("script", "device", "versions") if name in run.config}
    return _settings(run) | dict(flatten(about))


def differences(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """What is not the same for all entries, what all have first: a text for each, "–" where it has no such setting."""
    every = [[facts(run) for run in entry.runs] for entry in entries]
    names = dict.fromkeys(name for each in every for run in each for name in run)
    texts = {name: [_each(name, runs) for runs in every] for name in names}
    differing = [(name, row) for name, row in texts.items() if len(set(row)) > 1]
    return dict(sorted(differing, key=lambda item: MISSING in item[1]))


def _various(runs: Sequence[dict[str, str]]) -> dict[str, str]:
    """The settings that are not the same in all runs, with every text of each."""
    return {name: _each(name, runs) for run in runs for name in run if len({each.get(name) for each in runs}) > 1}


def _each(name: str, runs: Sequence[dict[str, str]]) -> str:
    """The different texts of a setting, in the order of the runs."""
    return ", ".join(dict.fromkeys(run.get(name, MISSING) for run in runs))
