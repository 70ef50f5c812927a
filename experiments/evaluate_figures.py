"""The figure of `evaluate`: the rewards of every policy, and the first of them against the divergence."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rl_jax.run.figures import PALETTE, draw_interval, open_figure


def draw_policies(path: Path, rows: list[dict[str, Any]], rewards: Sequence[str]) -> None:
    """Each reward by policy, with its interval; and the first over the root of the KL, where that is known.

    A best of n stands at the root of what its KL is at most.

    Args:
        path: of the PNG file.
        rows: the table's. "KL, nats" and "KL at most" may be None.
        rewards: columns of the table.
    """
    distances = [distance(row) for row in rows]
    known = sum(d is not None for d in distances) > 1
    titles = [*rewards, *([f"{rewards[0]} over the divergence"] if known else [])]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    colours = {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(policies)}
    with open_figure(path, titles, 3.8, max(2.2, 0.8 + 0.32 * len(rows))) as every:
        places = np.arange(len(rows))[::-1]
        for axes, reward in zip(every, rewards, strict=False):
            for place, row in zip(places, rows, strict=True):
                draw_interval(axes, row[reward], place, colours[row["policy"]], markersize=5)
            axes.set(yticks=places, yticklabels=[label(row) if axes is every[0] else "" for row in rows])
        if known:
            for name in policies:
                points = [
                    (d, row[rewards[0]].value)
                    for d, row in zip(distances, rows, strict=True)
                    if d is not None and row["policy"] == name
                ]
                x, y = np.array(sorted(points)).reshape(-1, 2).T
                every[-1].plot(x, y, "o-", color=colours[name], linewidth=1.2, markersize=4, label=short_name(name))
            every[-1].set(xlabel="√KL from the first policy, √nats", xlim=(0, None))
            every[-1].legend(fontsize=7)


def short_name(folder: str) -> str:
    """The last two parts of a path."""
    return "/".join(Path(folder).parts[-2:])


def label(row: dict[str, Any]) -> str:
    """The policy, and what it is the best of."""
    name = short_name(row["policy"])
    return name if row["best of"] == 1 else f"{name}, best of {row['best of']}"


def distance(row: dict[str, Any]) -> float | None:
    """The root of the KL, or of its bound; None where neither is known."""
    kl = row["KL, nats"].value if row["KL, nats"] is not None else row["KL at most"]
    return None if kl is None else math.sqrt(max(kl, 0.0))
