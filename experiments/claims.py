"""What was published, or is hoped of an application, and how the table of a recipe is held against it.

Words and published figures are written by hand; every measured figure, and whether it bears a claim out, is worked out
from the table. A dagger marks a published figure that is told here from secondary notes, not from the paper.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from rl_jax.run.tables import format_cell

Row = Mapping[str, Any]
Rows = Sequence[Row]
"""Of table.json, where an interval is an object with value, low and high."""


class Claim(NamedTuple):
    """One entry of the gallery.

    Attributes:
        recipe: the file in experiments/recipes, without its ending.
        claim: in a few words.
        source: who says so, and where.
        published: the figures, or the shape.
        measured: the same in the recipe's table, in a phrase.
        parts: what the claim comes to, each with whether the table bears it out.
        note: what else to know when comparing the two.
        figure: a file among the recipe's results.
    """

    recipe: str
    claim: str
    source: str
    published: str
    measured: Callable[[Rows], str]
    parts: Mapping[str, Callable[[Rows], bool]]
    note: str
    figure: str


def find(rows: Rows, **cells: Any) -> list[Row]:
    """The rows that have these cells, at least one.

    Raises:
        LookupError: there is none.
    """
    found = [row for row in rows if all(row.get(name) == cell for name, cell in cells.items())]
    if not found:
        raise LookupError(f"no row has {cells}")
    return found


def cell(rows: Rows, name: str, **cells: Any) -> Any:
    """A cell of the first row that has these cells."""
    return find(rows, **cells)[0][name]


def column(rows: Rows, name: str, **cells: Any) -> list[float]:
    """The numbers of a column, or the middles of its intervals, in the rows that have these cells."""
    return [mid(row[name]) for row in find(rows, **cells)]


def mid(cell: Any) -> float:
    """A number, or the middle of an interval."""
    return cell["value"] if isinstance(cell, Mapping) else cell


def show(rows: Rows, name: str, scale: float = 1.0, **cells: Any) -> str:
    """A cell of the first of these rows as text, multiplied."""
    found = cell(rows, name, **cells)
    if isinstance(found, Mapping):
        return format_cell({end: scale * number for end, number in found.items()})
    return format_cell(scale * found)


def above(rows: Rows, name: str, level: float, **cells: Any) -> bool:
    """Whether the intervals of all these rows lie above a level."""
    return all(row[name]["low"] > level for row in find(rows, **cells))


def beyond(higher: Row, lower: Row) -> bool:
    """Whether an interval lies above another."""
    return higher["low"] > lower["high"]


def holds(rows: Rows, name: str, value: float, **cells: Any) -> bool:
    """Whether the intervals of all these rows hold a value."""
    return all(row[name]["low"] <= value <= row[name]["high"] for row in find(rows, **cells))


def falls(values: Sequence[float]) -> bool:
    """Whether each is less than the one before."""
    return all(after < before for before, after in pairwise(values))
