"""Compare runs: what differs in their settings, what came out before and after, and their metrics, in one page.

    python experiments/compare_runs.py runs/rloo runs/grpo --out runs/comparison.html
    python experiments/compare_runs.py runs/rloo_* runs/grpo_* --pool seed policy

It reads what runs have written, finished or not, of any script that trains, and needs no device. Runs whose settings
differ in the seed alone are pooled: one line with a band, and one column.
"""

import dataclasses
from pathlib import Path

import tyro

from experiments.comparison import POOLED, read_entries, short_table
from experiments.comparison_page import write_comparison
from rl_jax.run.loop import run_main
from rl_jax.run.tables import markdown_table


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare runs: their settings, what came out, and their metrics."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path = Path("runs/comparison.html")
    """The page to write."""
    pool: tuple[str, ...] = POOLED
    """Settings, as config.json names them, in which runs may differ and still be pooled; none pools nothing."""


def main(config: Config) -> None:
    entries = read_entries(config.runs, config.pool)
    page = write_comparison(config.out, entries)
    print(f"{markdown_table(short_table(entries))}\nThe comparison is {page}.")


if __name__ == "__main__":
    run_main(main, Config)
