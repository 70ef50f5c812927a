"""What the files of a run's folder hold."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rl_jax.errors import InputError

Rows = Sequence[dict[str, Any]]

GROUPS = ("config", "estimator", "versions")  # of names and values, in config.json
DEEPEST = 50  # brackets in each other, in a file of a run
LARGEST = 1e150  # its square is a float too
LARGEST_STEP = 1 << 53  # beyond it a figure could not tell one step from the next


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
    _check_kinds(folder / "config.json", config, dict, [*GROUPS])
    _check_kinds(folder / "summary.json", summary, dict, ["seconds_by_stage", "reward_model"])
    _check_kinds(folder / "summary.json", summary, list, [name for name in summary if name.endswith("_interval")])
    _check_kinds(folder / "completions.json", both, list, ["pairs"])
    for number, pair in enumerate(pairs):
        match pair:
            case {"prompt": str(), "before": old, "after": new} if _is_completion(old) and _is_completion(new):
                continue
        need = "a prompt, and before and after with tokens and one log_ratio for each; mend it or remove the file"
        raise InputError(f"{folder / 'completions.json'}: pair {number} should have {need}.")
    metrics, unreadable = read_metrics(folder / "metrics.jsonl")
    return Run(folder.resolve().name, config, metrics, unreadable, summary, pairs)


def finite(value: Any) -> float | None:
    """The value as a float; None where it is no number, or none that is finite and can be counted with."""
    return float(value) if isinstance(value, int | float) and abs(value) <= LARGEST else None


def _check_kinds(path: Path, values: dict[str, Any], kind: type, names: Sequence[str]) -> None:
    """Raises InputError where a value that is there, and not null, is not of the kind that a run writes."""
    for name in names:
        value = values.get(name)
        if value is not None and not isinstance(value, kind):
            found, wanted = type(value).__name__, {dict: "an object", list: "a list"}[kind]
            raise InputError(f"{path}: {name} should be {wanted}, not a {found}; mend it or remove the file.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes()) if path.exists() else {}
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets in each other
        raise InputError(f"{path} is not valid JSON ({error}); mend it or remove it.") from error
    if _is_deeper(value, DEEPEST):
        raise InputError(f"{path} has more than {DEEPEST} brackets in each other; mend it or remove it.")
    if not isinstance(value, dict):
        raise InputError(f"{path} should hold a JSON object, not a {type(value).__name__}; mend it or remove it.")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (levels == 0 or any(_is_deeper(each, levels - 1) for each in inner))


def read_metrics(path: Path) -> tuple[dict[str, Rows], int]:
    """Rows of each stage by step, the later row of a step written twice; and how many lines of the file are no row."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    unreadable = 0
    for line in filter(None, path.read_bytes().splitlines() if path.exists() else ()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the line that a killed run left half-written, or what was no row ever
            row = None
        match row:
            case {"stage": str(stage), "step": int(step)} if abs(step) < LARGEST_STEP:
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
