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

FINETUNED = Measure("Fine-tuning", "nats a token", "held_out_loss_before", "held_out_loss")  # in "finetune"
ACCURACY = Measure("Reward model", "of held-out pairs", "", "pair_accuracy", True)  # in the summary's "reward_model"

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


def _values(summary: dict[str, Any], measure: Measure) -> list[float]:
    """The finite numbers of a measure, those of its intervals among them."""
    names = (measure.before, measure.after)
    known = [finite(summary.get(name)) for name in names]
    return [
        value for value in (*known, *interval(summary, names[0]), *interval(summary, names[1])) if value is not None
    ]


def measured(summary: dict[str, Any], measure: Measure, beside: Iterable[dict[str, Any]] = ()) -> Cells:
    """A measure of a summary as text, with as many decimals as the summaries that it stands beside ask for too."""
    scale, mark = (100, "%") if measure.percent else (1, "")
    before, after = (finite(summary.get(name)) for name in (measure.before, measure.after))
    bounds = [interval(summary, name) for name in (measure.before, measure.after)]
    decimals = _decimals(scale * value for each in (summary, *beside) for value in _values(each, measure))

    def number(value: float | None) -> str:
        return MISSING if value is None else _show(scale * value, decimals) + mark

    ranges = [" to ".join(map(number, pair)) for pair in bounds]
    change = "" if before is None or after is None else _show(scale * (after - before), decimals, "+")
    return Cells(number(before), ranges[0], number(after), ranges[1], change)


def reward_model(summary: dict[str, Any]) -> dict[str, Any]:
    """What the summary says of the reward model, {} where it has none."""
    return _part(summary, "reward_model")


def _part(summary: dict[str, Any], name: str) -> dict[str, Any]:
    about = summary.get(name)
    return about if isinstance(about, dict) else {}


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
    finetuned = measured(_part(summary, "finetune"), FINETUNED)
    if finetuned.change:
        moved = f"from {finetuned.before} to {finetuned.after} nats a token"
        sentences.append(f"Fine-tuning moved the held-out loss of completions {moved}.")
    accuracy = measured(reward_model(summary), ACCURACY)
    if accuracy.after != MISSING:
        between = f" ({accuracy.after_interval})" if accuracy.after_interval else ""
        sentences.append(f"The reward model prefers what was preferred in {accuracy.after} of held-out pairs{between}.")
    if not sentences or "rl" in metrics:
        reached = [f"step {rows[-1]['step']:,} of {stage_title(name).lower()}" for name, rows in metrics.items()]
        sentences.append(f"Unfinished: the metrics reach {(reached or ['no step'])[-1]}.")
    return " ".join(sentences)


def _reward_sentences(summary: dict[str, Any], cells: dict[str, Cells]) -> str:
    reward, gold = cells["reward"], cells["gold"]
    apart = _apart(summary, "reward")
    verb = _verb(apart, reward, "raised", "lowered", "moved")
    sentence = f"Tuning {verb} the mean reward{_named(summary, 'reward')} from {reward.before} to {reward.after}"
    sentence += ", with 95% intervals that overlap," if apart is False else ""
    if cells["kl"].after != MISSING:
        sentence += f" at an exact KL of {cells['kl'].after} nats a completion"
    if cells["win_rate"].after != MISSING:
        sentence += f"; its completions win {cells['win_rate'].after} of pairs with the pretrained"
    sentence = sentence.rstrip(",") + "."
    if gold.change:
        apart = _apart(summary, "gold")
        verb = _verb(apart, gold, "rose", "fell", "moved")
        sentence += f" The gold reward{_named(summary, 'gold')} {verb} from {gold.before} to {gold.after}"
        sentence += ", with 95% intervals that overlap" if apart is False else ""
        if cells["gold_win_rate"].after != MISSING:
            sentence += f"; by it they win {cells['gold_win_rate'].after} of the pairs"
        sentence += "."
    return sentence


def _apart(summary: dict[str, Any], name: str) -> bool | None:
    """Whether the intervals before and after do not overlap; None where one is not known."""
    before, after = (interval(summary, f"{name}_{side}") for side in ("before", "after"))
    return (before[1] < after[0] or after[1] < before[0]) if before and after else None


def _verb(apart: bool | None, cells: Cells, up: str, down: str, neither: str) -> str:
    return (down if cells.change.startswith("−") else up) if apart else neither


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
    tiles.append((ACCURACY.label, measured(reward_model(summary), ACCURACY).after, ACCURACY.unit))
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
        if cells.before == cells.after == MISSING:
            continue
        rows += (
            f'<tr><th scope="row">{measure.label} <small>{measure.unit}</small></th>'
            f"<td>{cells.before}<small>{cells.before_interval}</small></td>"
            f"<td>{cells.after}<small>{cells.after_interval}</small></td><td>{cells.change}</td></tr>"
        )
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
        rows += (
            f'<tr><th scope="row">{escape(stage_title(stage))}</th>'
            f"<td>{_scaled(seconds, DURATIONS)}</td>"
            f'<td><span class="bar" style="--share:{seconds / longest:.4f}"></span></td><td>{speed}</td></tr>'
        )
    return rows and f'<table class="times"><tbody>{rows}</tbody></table>'


def flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Dotted names and texts of nested settings, in the order of the file."""
    if isinstance(value, dict) and value:
        return [row for key, inner in value.items() for row in flatten(inner, f"{name}.{key}" if name else key)]
    return [(name, value if isinstance(value, str) and value else json.dumps(value))]


def _rows(title: str, values: dict[str, Any]) -> str:
    """A titled table of names and values, "" where there are none."""
    rows = flatten(values) if values else []
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows)
    return body and f'<div class="group"><h3>{escape(title)}</h3><table><tbody>{body}</tbody></table></div>'


def settings(config: dict[str, Any]) -> str:
    """The settings, one table for each nested group, what the estimator made of them, and the versions of what ran."""
    values = config.get("config") or {}
    groups = {"general": {name: value for name, value in values.items() if not isinstance(value, dict)}}
    groups |= {name: value for name, value in values.items() if isinstance(value, dict)}
    groups |= {name: config.get(name) or {} for name in ("estimator", "versions")}
    tables = "".join(_rows(name, group) for name, group in groups.items())
    return tables and f'<div class="groups">{tables}</div>'
