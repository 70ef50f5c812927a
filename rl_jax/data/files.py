"""Rows out of JSONL and Parquet files, one after another, each with its place in the file."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rl_jax.errors import InputError

SURROGATE = re.compile(r"[\ud800-\udfff]")  # JSON can write what no UTF-8 text can hold
HALF_SURROGATE = "has half of a surrogate pair, which is no character: remove it"


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        place: "FILE, line 7" of JSONL, counted from 1; "FILE, row 7" of Parquet, counted from 0.
        values: its columns; empty where the row cannot be read.
        broken: why it cannot be read; "" where it can.
    """

    place: str
    values: dict[str, Any]
    broken: str = ""


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file; InputError where it is none, or cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (at byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def read_rows(path: Path, column: str | None = None) -> Iterator[Row]:
    """The rows of a .jsonl or .parquet file, of which only a part is held at a time. Empty lines are none.

    Args:
        path: the file.
        column: the only column that is wanted, or None for all of them; JSONL has the others all the same.

    Raises:
        InputError: there is no such file, it is of another kind, Parquet that cannot be read, or Parquet without
            that column; or pyarrow, which reads Parquet, is missing.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if path.suffix == ".jsonl":
        return _jsonl_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path, column)
    raise InputError(f"{path} is of no kind whose rows can be read: .jsonl, .parquet")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    yield _jsonl_row(f"{path}, line {number}", line)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _jsonl_row(place: str, line: bytes) -> Row:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Row(place, {}, f"is not UTF-8 (at byte {error.start} of the line): save it as UTF-8")
    except (ValueError, RecursionError) as error:
        return Row(place, {}, f"is not JSON: {error}")
    return Row(place, values) if isinstance(values, dict) else Row(place, {}, "is not a JSON object")


def _parquet_rows(path: Path, column: str | None) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise InputError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column is not None and column not in names:
                raise InputError(f'{path} has no column "{column}", only {", ".join(names)}')
            for batch in file.iter_batches(columns=None if column is None else [column]):
                for values in batch.to_pylist():
                    yield Row(f"{path}, row {number}", values)
                    number += 1
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # a date may have no place in Python
        raise InputError(f"{path} is not a Parquet file that can be read: {error}") from error
