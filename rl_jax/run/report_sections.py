"""The sections of a run's report: the headline is plain text, the others are HTML.

Each is "" where the run has nothing for it, and every text that came from a file is escaped.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from rl_jax.run.curves import stage_title
from rl_jax.run.run_files import Rows, finite

LEVELS = 6  # shades on either side of zero
SHADES = [f"down{n}" for n in range(LEVELS, 0, -1)] + [""] + [f"up{n}" for n in range(1, LEVELS + 1)]  # in report.css
OPEN_PAIRS = 8  # prompts shown before the fold
MISSING = "–"
COUNTS = ((1e9, " billion"), (1e6, " million"), (1e3, " thousand"), (1, ""))
DURATIONS = ((3600, " h"), (60, " min"), (1, " s"))


class Measure(NamedTuple):
    """A row of the table: the names that hold it in `summary.json` before and after tuning."""

    label: str
    unit: str
    before: str
    after: str
    percent: bool = False  # a share in the file, a percentage on the page
    part: str = ""  # of the summary, where it is not the whole that has the names


class Cells(NamedTuple):
    """A measure as text; a dash for an unknown value, "" for an unknown interval or change."""

    before: str
    before_interval: str
    after: str
    after_interval: str
    change: str


MEASURES = {
    "reward": Measure("Reward", "mean a completion", "reward_before", "reward_after"),
    "gold": Measure("Gold reward", "mean a completion", "gold_before", "gold_after"),
    "kl": Measure("Exact KL", "nats a completion, tuned from pretrained", "", "kl"),
    "win_rate": Measure("Win rate", "of pairs, tuned over pretrained on one prompt", "", "win_rate", True),
    "gold_win_rate": Measure("Gold win rate", "of the same pairs, by the gold reward", "", "gold_win_rate", True),
    "length": Measure("Completion length", "tokens", "length_before", "length_after"),
    "truncated": Measure("Truncated", "of completions", "truncated_before", "truncated_after", True),
    "perplexity": Measure(
        "Reference perplexity", "a token", "reference_perplexity_before", "reference_perplexity_after"
    ),
    "distinct": Measure("Distinct-2", "share of bigrams", "distinct_2_before", "distinct_2_after"),
    "held_out_loss": Measure("Held-out loss", "nats a token", "held_out_loss", ""),
    "held_out_perplexity": Measure("Held-out perplexity", "a token", "held_out_perplexity", ""),
    "bits": Measure("Held-out bits", "bits a byte", "held_out_bits_per_byte", ""),
    "bits_before": Measure("Held-out bits", "bits a byte, of the given model", "held_out_bits_per_byte_before", ""),
}

FINETUNED = Measure("Fine-tuning", "nats a token", "held_out_loss_before", "held_out_loss", part="finetune")
ACCURACY = Measure("Reward model", "of held-out pairs", "", "pair_accuracy", True, part="reward_model")

HACKING = (
    '<div class="aside"><h3>Is the reward hacked?</h3><p><strong>Reference perplexity</strong> is the pretrained '
    "model’s perplexity on the completions. A steep rise says that the tuned policy has left the language it "
    "learned; a steep fall, that it keeps to a few safe phrases.</p><p><strong>Distinct-2</strong> is the share of "
    "bigrams that are distinct. It falls as completions repeat themselves and each other.</p><p>A higher reward is "
    "worth most where neither has moved far; the completions below show what it was paid for.</p></div>"
)
LEGEND = (
    '<p class="note">Each token is coloured by its log-ratio, log π<sub>tuned</sub> − log π<sub>pretrained</sub>: '
    "tuning made it likelier (blue) or less likely (orange). Hold the pointer over a token for the number.</p>"
    '<div class="legend"><span>−{limit:g} nats or less</span><span class="scale">'
    + "".join(f'<span class="{name}"></span>' for name in SHADES)
    + "</span><span>+{limit:g} nats or more</span></div>"
)
INTERVALS = '<p class="note">The range beneath a number is its 95% interval.</p>'


# Numbers as text


def _decimals(values: Iterable[float]) -> int:
    """Decimals that give the largest of the values three significant digits."""
    largest = max(map(abs, values), default=0.0)
    return min(max(2 - math.floor(math.log10(largest)), 0), 6) if largest > 0 else 0


def _show(value: float | None, decimals: int, sign: str = "") -> str:
    if value is None:
        return MISSING
    form = f",.{decimals}f" if abs(value) < 1e7 else ".2e"
    return format(value, f"{sign}z{form}").replace("-", "−")


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """The value in the largest of the units that is not above it."""
    size, unit = next((row for row in units if value >= row[0]), units[-1])
    return (_show(value / size, _decimals([value / size])) if unit else f"{value:.0f}") + unit


def interval(summary: dict[str, Any], name: str) -> list[float]:
    """The two finite bounds of a measure's interval, [] where there are none."""
    known = [bound for bound in map(finite, summary.get(f"{name}_interval") or ()) if bound is not None]
    return known if len(known) == 2 else []


def _numbers(summary: dict[str, Any], measure: Measure) -> list[tuple[float | None, list[float]]]:
    """A measure's number and its interval, before and after."""
    about = part(summary, measure.part) if measure.part else summary
    return [(finite(about.get(name)), interval(about, name)) for name in (measure.before, measure.after)]


def measured(summary: dict[str, Any], measure: Measure, beside: Iterable[dict[str, Any]] = ()) -> Cells:
    """A measure of a summary as text, with as many decimals as the summaries that it stands beside ask for too."""
    scale, mark = (100, "%") if measure.percent else (1, "")
    (before, _), (after, _) = sides = _numbers(summary, measure)
    every = (side for each in (summary, *beside) for side in _numbers(each, measure))
    decimals = _decimals(scale * x for value, bounds in every for x in (value, *bounds) if x is not None)

    def number(value: float | None) -> str:
        return MISSING if value is None else _show(scale * value, decimals) + mark

    ranges = [" to ".join(map(number, bounds)) for _, bounds in sides]
    change = "" if before is None or after is None else _show(scale * (after - before), decimals, "+")
    return Cells(number(before), ranges[0], number(after), ranges[1], change)


def part(summary: dict[str, Any], name: str) -> dict[str, Any]:
    """What the summary says of "reward_model" or "finetune", {} where it says nothing."""
    about = summary.get(name)
    return about if isinstance(about, dict) else {}


def table_row(name: str, *cells: str) -> str:
    """A row of a table, of HTML."""
    return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


# Sections


def headline(summary: dict[str, Any], metrics: dict[str, Rows]) -> str:
    """The result of the run as a sentence or two of plain text."""
    cells = {name: measured(summary, measure) for name, measure in MEASURES.items()}
    if cells["reward"].change:
        return _reward_sentences(summary, cells)
    sentences = []
    if cells["held_out_loss"].before != MISSING:
        loss, perplexity, bits = (cells[name].before for name in ("held_out_loss", "held_out_perplexity", "bits"))
        also = f"perplexity {perplexity}, {bits} bits a byte"
        if cells["bits_before"].before != MISSING:
            also += f"; {cells['bits_before'].before} before this run"
        sentences.append(f"The pretrained model has a held-out loss of {loss} nats a token ({also}).")
    finetuned = measured(summary, FINETUNED)
    if finetuned.change:
        moved = f"from {finetuned.before} to {finetuned.after} nats a token"
        sentences.append(f"Fine-tuning moved the held-out loss of completions {moved}.")
    accuracy = measured(summary, ACCURACY)
    if accuracy.after != MISSING:
        between = f" ({accuracy.after_interval})" if accuracy.after_interval else ""
        sentences.append(f"The reward model prefers what was preferred in {accuracy.after} of held-out pairs{between}.")
    if not sentences or "rl" in metrics:
        reached = [f"step {rows[-1]['step']:,} of {stage_title(name).lower()}" for name, rows in metrics.items()]
        sentences.append(f"Unfinished: the metrics reach {(reached or ['no step'])[-1]}.")
    return " ".join(sentences)


def _reward_sentences(summary: dict[str, Any], cells: dict[str, Cells]) -> str:
    reward, gold = cells["reward"], cells["gold"]
    verb, overlap = _moved(summary, "reward", reward, "raised", "lowered")
    sentence = (
        f"Tuning {verb} the mean reward{_named(summary, 'reward')} from {reward.before} to {reward.after}{overlap}"
    )
    if cells["kl"].after != MISSING:
        sentence += f"{overlap and ','} at an exact KL of {cells['kl'].after} nats a completion"
    if cells["win_rate"].after != MISSING:
        sentence += f"; its completions win {cells['win_rate'].after} of pairs with the pretrained"
    if gold.change:
        verb, overlap = _moved(summary, "gold", gold, "rose", "fell")
        sentence += f". The gold reward{_named(summary, 'gold')} {verb} from {gold.before} to {gold.after}{overlap}"
        if cells["gold_win_rate"].after != MISSING:
            sentence += f"; by it they win {cells['gold_win_rate'].after} of the pairs"
    return sentence + "."


def _moved(summary: dict[str, Any], name: str, cells: Cells, up: str, down: str) -> tuple[str, str]:
    """The verb for how a reward moved, and a clause where its intervals before and after overlap."""
    before, after = (interval(summary, f"{name}_{side}") for side in ("before", "after"))
    if not before or not after:
        return "moved", ""
    if before[0] <= after[1] and after[0] <= before[1]:
        return "moved", ", with 95% intervals that overlap"
    return down if cells.change.startswith("−") else up, ""


def _named(summary: dict[str, Any], name: str) -> str:
    return f" ({summary[name]})" if name in summary else ""


def figures(summary: dict[str, Any]) -> str:
    """The row of headline figures, those that the summary has."""
    tuned = finite(summary.get("reward_after")) is not None
    names = (
        ("reward", "gold", "kl", "win_rate", "perplexity")
        if tuned
        else ("held_out_loss", "held_out_perplexity", "bits")
    )
    tiles = []
    for measure in (MEASURES[name] for name in names):
        cells = measured(summary, measure)
        note = f"from {cells.before}" if cells.change else measure.unit.split(",")[0]
        tiles.append((measure.label, cells.after if tuned else cells.before, note))
    tiles.append((ACCURACY.label, measured(summary, ACCURACY).after, ACCURACY.unit))
    for label, name, units in (("Parameters", "parameters", COUNTS), ("Time", "seconds", DURATIONS)):
        if (value := finite(summary.get(name))) is not None:
            number, _, unit = _scaled(value, units).partition(" ")
            tiles.append((label, number, unit))
    shown = "".join(
        f"<div><dt>{label}</dt><dd>{value}<small>{note}</small></dd></div>"
        for label, value, note in tiles
        if value != MISSING
    )
    return shown and f'<dl class="tiles">{shown}</dl>'


def before_after(summary: dict[str, Any]) -> str:
    """The table of every measure before and after, and how to read it; "" for a run without tuning."""
    if finite(summary.get("reward_after")) is None:
        return ""
    rows = ""
    for measure in MEASURES.values():
        cells = measured(summary, measure)
        if (cells.before, cells.after) != (MISSING, MISSING):
            before = f"{cells.before}<small>{cells.before_interval}</small>"
            after = f"{cells.after}<small>{cells.after_interval}</small>"
            rows += table_row(f"{measure.label} <small>{measure.unit}</small>", before, after, cells.change)
    columns = "".join(f'<th scope="col">{name}</th>' for name in ("Measure", "Pretrained", "Tuned", "Change"))
    table = f'<table class="measures"><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="results"><div class="scroll">{table}{INTERVALS}</div>{HACKING}</div>'


def shade(log_ratio: float | None, limit: float) -> str:
    """The class of a token: up1 to up6 where tuning made it likelier, down1 to down6 where less, "" near zero."""
    level = round((finite(log_ratio) or 0.0) / limit * LEVELS)
    return SHADES[LEVELS + min(max(level, -LEVELS), LEVELS)]


def _completion(title: str, completion: dict[str, Any], limit: float) -> str:
    chips = f'<span class="chip strong">reward {_show(finite(completion.get("reward")), 3)}</span>'
    if (advantage := finite(completion.get("advantage"))) is not None:
        chips += f'<span class="chip">advantage {_show(advantage, 3, "+")}</span>'
    body = "".join(
        f'<span class="{shade(ratio, limit)}" title="{_show(finite(ratio), 3, "+")} nats">'
        f"{escape(str(piece)).replace(chr(10), '↵' + chr(10)) or '·'}</span>"
        for piece, ratio in zip(completion["tokens"], completion["log_ratio"], strict=True)
    )
    return f'<div class="completion"><h4>{title}{chips}</h4><p class="tokens">{body}</p></div>'


def completions(pairs: list[dict[str, Any]]) -> str:
    """Completions of the same prompts, pretrained beside tuned, with tokens coloured by log-ratio."""
    ratios = [ratio for pair in pairs for side in ("before", "after") for ratio in pair[side]["log_ratio"]]
    sizes = [abs(finite(ratio) or 0.0) for ratio in ratios] or [0.0]
    limit = max(math.ceil(2 * float(np.quantile(sizes, 0.95))) / 2, 0.5)  # the outliers saturate
    shown = [
        f'<article><p class="prompt"><small>Prompt</small>{escape(pair["prompt"])}</p><div class="pair">'
        + _completion("Pretrained", pair["before"], limit)
        + _completion("Tuned", pair["after"], limit)
        + "</div></article>"
        for pair in pairs
    ]
    rest = shown[OPEN_PAIRS:]
    fold = f"<details><summary>{len(rest)} more</summary>{''.join(rest)}</details>" if rest else ""
    return LEGEND.format(limit=limit) + "".join(shown[:OPEN_PAIRS]) + fold if pairs else ""


def times(summary: dict[str, Any], metrics: dict[str, Rows]) -> str:
    """Time and median tokens per second of each stage."""
    spent = {stage: finite(value) or 0.0 for stage, value in (summary.get("seconds_by_stage") or {}).items()}
    longest = max(spent.values(), default=0.0) or 1.0
    rows = ""
    for stage, seconds in spent.items():
        speeds = [speed for row in metrics.get(stage, ()) if (speed := finite(row.get("tokens_per_second")))]
        speed = f"{statistics.median(speeds):,.0f} tokens/s" if speeds else ""
        bar = f'<span class="bar" style="--share:{seconds / longest:.4f}"></span>'
        rows += table_row(escape(stage_title(stage)), _scaled(seconds, DURATIONS), bar, speed)
    return rows and f'<table class="times"><tbody>{rows}</tbody></table>'


def flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Dotted names and texts of nested settings, in the order of the file."""
    if isinstance(value, dict) and (value or not name):
        return [row for key, inner in value.items() for row in flatten(inner, f"{name}.{key}" if name else key)]
    return [(name, value if isinstance(value, str) and value else json.dumps(value))]


def settings(config: dict[str, Any]) -> str:
    """The settings, one table for each nested group, what the estimator made of them, and the versions of what ran."""
    values = config.get("config") or {}
    groups = {"general": {name: value for name, value in values.items() if not isinstance(value, dict)}}
    groups |= {name: value for name, value in values.items() if isinstance(value, dict)}
    groups |= {name: config.get(name) or {} for name in ("estimator", "versions")}
    tables = ""
    for title, group in groups.items():
        rows = "".join(table_row(escape(name), escape(text)) for name, text in flatten(group))
        tables += rows and f'<div class="group"><h3>{escape(title)}</h3><table><tbody>{rows}</tbody></table></div>'
    return tables and f'<div class="groups">{tables}</div>'
