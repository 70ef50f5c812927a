"""Rows out of JSONL and Parquet files and data sets of the hub, one after another, each with its place."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rl_jax.errors import InputError

SURROGATE = re.compile(r"[\ud800-\udfff]")  # JSON can write what no UTF-8 text can hold
HALF_SURROGATE = "has half of a surrogate pair, which is no character: remove it"
ROW_KINDS = (".jsonl", ".parquet")
# A data set of the hub: org/name, org/name:split or org/name/configuration:split.
HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<configuration>[\w.-]+))?(:(?P<split>.+))?")


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        place: "FILE, line 7" of JSONL, counted from 1; "FILE, row 7" of others, counted from 0.
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


def is_hub_name(path: Path) -> bool:
    """Whether this is no file or folder, but may be a data set of the hub: org/name, with /configuration or :split."""
    return not path.exists() and HUB.fullmatch(str(path)) is not None and path.suffix not in (*ROW_KINDS, ".txt")


def read_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a .jsonl or .parquet file or a data set of the hub, of which only a part is held at a time.

    Empty lines are none. A data set is fetched by the package `datasets`, where no file has its name; without a split
    it is "train".

    Args:
        path: the file, or org/name, org/name:split or org/name/configuration:split.
        columns: the only ones that are wanted, where Parquet has them; none for all. Others have all the same.

    Raises:
        InputError: there is no such file, it is of another kind, Parquet that cannot be read, or Parquet without
            any of these columns; the data set cannot be had; or pyarrow, which reads Parquet, or `datasets` is missing.
    """
    if is_hub_name(path):
        return _hub_rows(str(path))
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if path.suffix == ".jsonl":
        return _jsonl_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path, columns)
    raise InputError(f"{path} is of no kind whose rows can be read: {', '.join(ROW_KINDS)}")


def _hub_rows(place: str) -> Iterator[Row]:
    found = HUB.fullmatch(place)
    assert found is not None, "the caller saw it"
    try:
        import datasets  # pyrefly: ignore[missing-import]
    except ModuleNotFoundError as error:
        raise InputError(
            f"there is no file {place}; to look for a data set of that name on the hub: pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(found["name"], found["configuration"], split=found["split"] or "train")
    except Exception as error:  # a package of somebody else's, and a network
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"there is no file {place}, and no such data set can be had from the hub ({why})") from error
    for number, values in enumerate(rows):
        yield Row(f"{place}, row {number}", dict(values))


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


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise InputError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in columns if name in names]
            if columns and not wanted:
                lacking = " or ".join(f'"{name}"' for name in columns)
                raise InputError(f"{path} has no column {lacking}, only {', '.join(names)}")
            for batch in file.iter_batches(columns=wanted or None):
                for values in batch.to_pylist():
                    yield Row(f"{path}, row {number}", values)
                    number += 1
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # a date may have no place in Python
        raise InputError(f"{path} is not a Parquet file that can be read: {error}") from error
