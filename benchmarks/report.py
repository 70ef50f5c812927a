"""From what was measured to the table and the figures."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.race import Round, compare, kept_pairs, rounds_of, spread
from benchmarks.races import OURS, STARTUP_TARGETS, TARGETS
from rl_jax.run.figures import COLOURS, GREY, PALETTE, open_figure

Row = dict[str, Any]


def race_rows(name: str, found: Mapping[str, Any]) -> list[Row]:
    """A row for each peer of a race, and one for the limit where it was measured."""
    rounds = rounds_of(found["runs"])
    rows = [_peer_row(name, found, rounds, peer) for peer in found["runs"] if peer != OURS]
    rows += [
        {"what": found["what"], "against": peer, "target": _target(name, peer), "notes": f"not measured: {why}"}
        for peer, why in found["left_out"].items()
    ]
    if found.get("floor"):
        rows.append(_limit_row(name, found, rounds))
    return rows


def _peer_row(name: str, found: Mapping[str, Any], rounds: Sequence[Round], peer: str) -> Row:
    result = compare(rounds, OURS, peer)
    return {
        "what": found["what"],
        "against": peer,
        "ours, s": result.ours,
        "theirs, s": result.peer,
        "ratio": result.ratio,
        "least to greatest": result.extremes,
        "target": _target(name, peer),
        "met": _met(result.ratio, name, peer),
        "pairs": result.kept,
        "spoilt": result.spoilt,
        "ours, tokens/s": _speed(rounds, OURS),
        "theirs, tokens/s": _speed(rounds, peer),
        "notes": _notes(rounds, peer),
    }


def _limit_row(name: str, found: Mapping[str, Any], rounds: Sequence[Round]) -> Row:
    kept = [run.seconds for run, _ in kept_pairs(rounds, OURS, OURS)]
    floor = found["floor"]["total"]
    shares = spread([floor / seconds for seconds in kept]) if kept else None
    parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in found["floor"].items() if part != "total")
    return {
        "what": found["what"],
        "against": "the limit",
        "ours, s": statistics.median(kept) if kept else None,
        "theirs, s": floor,
        "ratio": shares,
        "least to greatest": (floor / max(kept), floor / min(kept)) if kept else None,
        "target": _target(name, "the limit"),
        "met": _met(shares, name, "the limit"),
        "pairs": len(kept),
        "spoilt": len(rounds) - len(kept),
        "notes": f"its parts, s: {parts}; {' and '.join(found['measured_by'])}",
    }


def startup_rows(found: Mapping[str, Any]) -> list[Row]:
    """Cold and with a filled cache."""
    rows = []
    for name, target in STARTUP_TARGETS.items():
        about = found[name]
        seconds = about["seconds"]
        steady = "none" if about["later_programs"] == 0 else about["later_programs"]
        rows.append(
            {
                "what": f"start to first RL step, A, {name}",
                "ours, s": about["median"],
                "least to greatest": (min(seconds), max(seconds)) if seconds else None,
                "target": f"under {target:g} s",
                "met": about["median"] < target if seconds else None,
                "pairs": len(seconds),
                "spoilt": about["spoilt"],
                "notes": f"{about['compiled']} of {about['programs']} programs compiled; in two more steps {steady}",
            }
        )
    return rows


def _target(name: str, peer: str) -> str | None:
    target = TARGETS.get((name, peer))
    return None if target is None else f"at least {target:g}"


def _met(ratio: tuple[float, float, float] | None, name: str, peer: str) -> bool | None:
    target = TARGETS.get((name, peer))
    return None if target is None or ratio is None else ratio[0] >= target


def _speed(rounds: Sequence[Round], name: str) -> float | None:
    kept = [done[name] for done in rounds if kept_pairs([done], name, name)]
    return statistics.median(run.about["tokens"] / run.seconds for run in kept) if kept else None


def _notes(rounds: Sequence[Round], peer: str) -> str:
    ours, theirs = ([done[name].about for done in rounds] for name in (OURS, peer))
    notes = [f"peak MiB {max(a['peak_mib'] for a in ours):.0f} and {max(a['peak_mib'] for a in theirs):.0f}"]
    if "generate_seconds" in theirs[0]:
        notes.append(f"they generate {statistics.median(a['generate_seconds'] for a in theirs):.2f} s of it")
    if len({about.get("longest") for about in ours}) > 1:
        longest = (statistics.median(a["longest"] for a in side) for side in (ours, theirs))
        mean = (statistics.mean(a["tokens"] for a in side) for side in (ours, theirs))
        notes.append("tokens a batch {:.0f} and {:.0f}, the longest {:.0f} and {:.0f}".format(*mean, *longest))
    if "gap" in ours[0]:
        notes.append(f"our sampler is {ours[0]['gap']:.1e} nats a token from the float32 learner")
    return "; ".join(notes)


def draw_ratios(path: Path, rows: Sequence[Row]) -> None:
    """A bar for each comparison, its quartiles, and its target as a mark."""
    groups = {"Generation": "generation", "RL step": "RL step", "Pretraining": "pretraining"}
    measured = [row for row in rows if row.get("ratio") and row["against"] != "the limit"]
    groups = {t: start for t, start in groups.items() if any(row["what"].startswith(start) for row in measured)}
    if not groups:
        return
    longest = max(sum(row["what"].startswith(start) for row in measured) for start in groups.values())
    titles = [f"{title}: times as fast" for title in groups]
    with open_figure(path, titles, 5.4, 1.2 + 0.3 * longest) as every:
        for axes, start in zip(every, groups.values(), strict=True):
            bars = [row for row in measured if row["what"].startswith(start)]
            for place, row in enumerate(bars):
                middle, low, high = row["ratio"]
                missed = row["met"] is False
                axes.barh(place, middle, height=0.6, color=GREY if missed else COLOURS[0])
                axes.plot([low, high], [place, place], color="black", linewidth=1.2)
                if row["target"]:
                    goal = float(row["target"].split()[-1])
                    axes.plot([goal, goal], [place - 0.42, place + 0.42], color=COLOURS[1], linewidth=2)
            labels = [f"{row['what'].split(', ', 1)[1]}, {row['against']}" for row in bars]
            axes.set(yticks=range(len(bars)), yticklabels=labels)
            axes.invert_yaxis()
            axes.axvline(1, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.set_xlabel("their seconds / ours, quartiles (orange: target; grey: missed)", fontsize=7)


def draw_growth(path: Path, rows: Sequence[Row]) -> None:
    """Tokens a second of generation and of the RL step against batch, length and model."""
    names = {"batch": "completions", "length": "tokens of a completion", "model": "layers x width"}
    names = {varied: label for varied, label in names.items() if any(row["varied"] == varied for row in rows)}
    with open_figure(path, [f"Tokens a second against {name}" for name in names]) as every:
        for axes, (varied, label) in zip(every, names.items(), strict=True):
            for task, colour in zip(("generate", "rl_step"), PALETTE, strict=False):
                line = [row for row in rows if row["varied"] == varied and row["task"] == task]
                places = range(len(line))
                axes.plot(places, [row["tokens/s"] or float("nan") for row in line], marker="o", color=colour)
                axes.set(xticks=places, xticklabels=[row["value"].split(", ")[-1] for row in line])
            axes.set(xlabel=label, ylim=(0, None))
        every[0].legend(every[0].get_lines(), ("generation", "RL step"), frameon=False, fontsize=8)


def draw_memory(path: Path, rows: Sequence[Row], axes_of: Mapping[str, Sequence[int]], base: Mapping[str, int]) -> None:
    """MiB of the program and of the process against vocabulary, length and batch."""
    names = {"vocab_size": "vocabulary", "length": "tokens of a completion", "prompts": "prompts, 4 completions each"}
    with open_figure(path, [f"MiB against {name.split(',')[0]}" for name in names.values()]) as every:
        for axes, (varied, label) in zip(every, names.items(), strict=True):
            line = [row for row in rows if all(row[name] == base[name] for name in names if name != varied)]
            line = sorted(line, key=lambda row: row[varied])
            for column, colour in zip(("peak_mib", "program_mib"), PALETTE, strict=False):
                axes.plot([row[varied] for row in line], [row[column] for row in line], marker="o", color=colour)
            axes.set(xlabel=label, ylim=(0, None), xticks=axes_of[varied])
        every[0].legend(every[0].get_lines(), ("process, at most", "compiled program"), frameon=False, fontsize=8)
