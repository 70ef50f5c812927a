"""The figure of the recipe `best_of_n`: KL and win rate over n, beside what they are at most."""

from pathlib import Path
from typing import Any

from rl_jax.run.figures import GREY, PALETTE, open_figure


def draw_best_of_n(path: Path, rows: list[dict[str, Any]]) -> None:
    """Three panels over n, a line for each task; the bounds are dashed.

    Args:
        path: of the PNG file.
        rows: the table's; best of 1 is left out.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    titles = ["KL from the policy, nats", "KL as a share of its bound", "Win rate against the policy"]
    columns = (("KL, nats", "log n - (n-1)/n"), ("KL / bound", None), ("win rate", "n / (n+1)"))
    with open_figure(path, titles, 4.4, 3.8) as every:
        numbers = sorted({row["n"] for row in rows})
        for axes, (column, bound) in zip(every, columns, strict=True):
            for task, colour in zip(tasks, PALETTE, strict=False):
                lines = sorted((row for row in rows if row["task"] == task and row["n"] > 1), key=lambda row: row["n"])
                x, y = [row["n"] for row in lines], [row[column] for row in lines]
                axes.plot(x, y, color=colour, linewidth=1.4, marker="o", markersize=3, label=task)
            if bound is not None:
                heights = [next(row[bound] for row in rows if row["n"] == n) for n in numbers]
                axes.plot(numbers, heights, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), label=bound)
            axes.set(xscale="log", xlabel="n", xticks=numbers, xticklabels=numbers)
            axes.minorticks_off()
        every[0].legend(frameon=False, fontsize=7)
        every[2].legend(*(part[-1:] for part in every[2].get_legend_handles_labels()), frameon=False, fontsize=7)
