"""The figures of the recipe `human_preferences`: what rewards make of held-out snippets, and what came of one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rl_jax.evaluation import Estimate
from rl_jax.run.figures import GREY, GUIDE, PALETTE, band_of, draw_band, draw_interval, open_figure

LEVEL = 0.5  # what a coin reaches


def draw_reward_model(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    gaps: Mapping[str, list[tuple[float, Estimate]]],
    found: Sequence[list[dict[str, float]]],
) -> None:
    """How often rewards order snippets as people do, by the gap between these, and calibration.

    Gaps are, by reward, the middles of ranges of the gap and the share of their pairs; found are the rows of
    `reliability` of the reward models of single votes, by seed.
    """
    column = next(name for name in rows[0] if name.startswith("pairs over"))
    shares = {f"{row['reward']} ({row['seed']})".removesuffix(" ()"): row[column] for row in rows}
    human = {name: value for name, value in shares.items() if not isinstance(value, tuple)}
    shares = {name: value for name, value in shares.items() if name not in human}
    titles = [
        "Held-out pairs in the raters' order",
        "By the gap of their mean ratings",
        "Odds of the model of single votes",
    ]
    with open_figure(path, titles, 4.8, 3.8) as (bars, lines, odds):
        places = np.arange(len(shares))[::-1]
        for place, (name, estimate) in zip(places, shares.items(), strict=True):
            colour = PALETTE[0] if "Transformer" in name else GREY
            draw_interval(bars, [100 * end for end in estimate], place, colour)
        for name, value in human.items():
            bars.axvline(100 * value, **GUIDE)
            bars.annotate(
                name, (100 * value, places[0] + 0.4), (-3, 0), textcoords="offset points", ha="right", fontsize=7
            )
        bars.set(
            yticks=places,
            yticklabels=list(shares),
            xlabel="% of the pairs over 0.5 apart",
            ylim=(-0.6, places[0] + 0.8),
        )
        for (name, points), colour in zip(gaps.items(), PALETTE, strict=False):
            x, estimates = zip(*points, strict=True)
            draw_band(lines, np.array(x), 100 * band_of(estimates), name, colour)
        lines.axhline(100 * LEVEL, **GUIDE)
        lines.set(xlabel="gap of the mean ratings", ylabel="% in order")
        lines.legend(fontsize=7, loc="lower right")
        for seed, (points, colour) in enumerate(zip(found, PALETTE, strict=False)):
            x, y = ([point[key] for point in points] for key in ("confidence", "observed"))
            odds.plot(x, y, "o-", color=colour, linewidth=1.2, markersize=3, label=f"seed {seed}")
        odds.plot([LEVEL, 1], [LEVEL, 1], **GUIDE)
        odds.set(xlabel="probability that the rewards give", ylabel="share of the raters who agree")
        if found:
            odds.legend(fontsize=7)


def draw_policy(path: Path, metrics: Sequence[Sequence[Mapping[str, Any]]], rows: Sequence[Mapping[str, Any]]) -> None:
    """The rewards as RL goes on, by the metrics of each seed, and the win rates of what came of it, from the table."""
    names = [name for name in rows[0] if name.startswith("wins by ")]
    wins = {name.removeprefix("wins by "): [row[name] for row in rows[: len(metrics)]] for name in names}
    titles = ["Rewards of the prompts to learn from", "Wins of the tuned policy over the pretrained"]
    with open_figure(path, titles, 4.8, 3.4) as (curves, points):
        for seed, steps in enumerate(metrics):
            for name, label, colour in (("reward_gain", "learned", PALETTE[0]), ("gold_gain", "VADER", PALETTE[1])):
                gain = smooth([step[name] for step in steps])
                curves.plot(gain, color=colour, linewidth=1.2, label=label if seed == 0 else None)
        curves.set(xlabel="updates", ylabel="gain, in standard deviations of its own")
        curves.legend()
        for place, estimates in enumerate(reversed(wins.values())):
            for seed, estimate in enumerate(estimates):
                y = place + 0.15 * (seed - (len(estimates) - 1) / 2)
                draw_interval(points, [100 * end for end in estimate], y, PALETTE[0], markersize=3.5)
        points.axvline(100 * LEVEL, **GUIDE)
        points.set(yticks=range(len(wins)), yticklabels=[*wins][::-1], xlabel="% of pairs of completions of a prompt")


def smooth(values: Sequence[float], window: int = 8) -> np.ndarray:
    """Means of so many values in a row, of as many as there are at the beginning."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
