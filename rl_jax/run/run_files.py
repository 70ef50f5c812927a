"""What the files of a run's folder hold."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rl_jax.errors import InputError

Rows = Sequence[dict[str, Any]]


class Run(NamedTuple):
    """What the files of a run's folder hold; empty where a run has not written them."""

    name: str
    config: dict[str, Any]
    metrics: dict[str, Rows]  # the rows of each stage, sorted by step
    unreadable: int  # lines of the metrics that are no row
    summary: dict[str, Any]
    pairs: list[dict[str, Any]]


def read_run(folder: Path) -> Run:
    """Reads the files of a run's folder.

    Raises:
        InputError: there is no config.json, or a file is not what a run writes.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not the folder of a run: it has no config.json.")
    config, summary, both = (_read_json(folder / f"{name}.json") for name in ("config", "summary", "completions"))
    pairs = both.get("pairs") or []
    for number, pair in enumerate(pairs):
        match pair:
            case {"prompt": str(), "before": old, "after": new} if _is_completion(old) and _is_completion(new):
                continue
        need = "a prompt, and before and after with tokens and one log_ratio for each; mend it or remove the file"
        raise InputError(f"{folder / 'completions.json'}: pair {number} should have {need}.")
    metrics, unreadable = _read_metrics(folder / "metrics.jsonl")
    return Run(folder.resolve().name, config, metrics, unreadable, summary, pairs)


def finite(value: Any) -> float | None:
    """The value as a float; None where it is no number, or none that is finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); mend it or remove it.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} should hold a JSON object, not a {type(value).__name__}; mend it or remove it.")
    return value


def _read_metrics(path: Path) -> tuple[dict[str, Rows], int]:
    """Rows of each stage by step, the later row of a step written twice; and how many lines are no row."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    unreadable = 0
    for line in filter(None, path.read_bytes().splitlines() if path.exists() else ()):
        try:
            row = json.loads(line)
        except ValueError:  # the line that a killed run left half-written
            row = None
        match row:
            case {"stage": str(stage), "step": int(step)}:
                rows[stage, step] = row
            case _:
                unreadable += 1
    stages = dict.fromkeys(stage for stage, _ in rows)
    return {stage: [rows[key] for key in sorted(rows) if key[0] == stage] for stage in stages}, unreadable


def _is_completion(value: Any) -> bool:
    match value:
        case {"tokens": [*tokens], "log_ratio": [*ratios]}:
            return len(tokens) == len(ratios)
    return False
