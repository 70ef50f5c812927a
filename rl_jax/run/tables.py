"""A recipe's result: `results/NAME/` with table.json, the same table as Markdown, and the settings that gave it."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rl_jax.errors import InputError
from rl_jax.run.folder import jsonable, write_json, write_text
from rl_jax.run.metrics import describe_device, versions

Rows = Sequence[Mapping[str, Any]]


def open_results(folder: str | Path) -> Path:
    """Makes the folder of a recipe's results; what an earlier run left there stays until it is written over.

    Raises:
        InputError: nothing can be written there. Call it before the long work.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".trial"
        trial.write_text("")
        trial.unlink()
    except OSError as error:
        raise InputError(f"Results cannot be written to {folder} ({error.strerror}); give another folder.") from error
    return folder


def write_table(folder: str | Path, rows: Rows, settings: Any) -> None:
    """Writes table.json, table.md and settings.json into the folder, each whole or not at all, and prints the table.

    A cell is a string, a number, a boolean or None; a value with its interval, `(value, low, high)`, such as
    `evaluation.Estimate`; or an interval alone, `(low, high)`. An interval is an object with these names in
    table.json, and in Markdown "0.70 ± 0.03" where the value is in the middle, "0.70 [0.60, 0.75]" where it is not.
    Columns stand in the order in which the rows name them; a row may leave some out.

    Args:
        folder: usually results/NAME; made if it is missing.
        rows: one mapping a row, from a column's name to its cell.
        settings: what the recipe was run with, a dataclass or a mapping; the processor time of the process so far, the
            device and versions are written beside it.

    Raises:
        InputError: nothing can be written to the folder.
    """
    folder = open_results(folder)
    text = markdown_table(rows)
    write_json(folder / "table.json", [{name: _cell(value) for name, value in row.items()} for row in rows])
    about = {"settings": jsonable(settings), "processor_seconds": time.process_time()}
    about |= {"device": describe_device(), "versions": versions()}
    write_json(folder / "settings.json", about)
    print(f"\n{text}\nThe table is {write_text(folder / 'table.md', text)}; everything else is in {folder}.")


def markdown_table(rows: Rows) -> str:
    """The table in Markdown, its columns padded so that it reads well as plain text too; numbers stand to the right."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = []
    for name in names:
        cells = [row.get(name, "") for row in rows]
        left = any(isinstance(cell, str) and cell for cell in cells)
        texts = [_escape(name), *(format_cell(cell) for cell in cells)]
        width = max(3, *map(len, texts))
        padded = [text.ljust(width) if left else text.rjust(width) for text in texts]
        columns.append([padded[0], "-" * width if left else "-" * (width - 1) + ":", *padded[1:]])
    return "".join(f"| {' | '.join(line)} |\n" for line in zip(*columns, strict=True))


def format_cell(value: Any) -> str:
    """A cell as text: four significant digits of a number, two of an interval's half; "–" where there is no number."""
    value = _cell(value)
    if isinstance(value, dict):
        return _format_interval(**value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else _escape(str(value))


def _format_interval(low: float, high: float, value: float | None = None) -> str:
    half = (high - low) / 2
    if not math.isfinite(half):
        return "–" if value is None else format_cell(value)
    decimals = min(max(1 - math.floor(math.log10(half)), 0), 12) if half > 0 else 4
    ends = f"[{low:.{decimals}f}, {high:.{decimals}f}]"
    if value is None:
        return ends
    middle = abs((low + high) / 2 - value) < 0.05 * half or half == 0
    return f"{value:.{decimals}f} " + (f"± {half:.{decimals}f}" if middle else ends)


def _cell(value: Any) -> Any:
    """Intervals as mappings, and NumPy's and JAX's numbers as Python's."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple) and len(value) in (2, 3):
        names = ("value", "low", "high")[-len(value) :]
        return {name: _cell(number) for name, number in zip(names, value, strict=True)}
    return value


def _escape(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
