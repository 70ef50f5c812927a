"""Accuracy of reward models by data and by size: the points that a doubling of either adds.

    python experiments/recipes/reward_scaling.py

Two cores of an Intel Xeon, JAX 0.10.2: 12 minutes of processor time.

The policy, the gold reward, its noisy judgements of pairs and the reward models are those of `overoptimization.py`,
whose table has a few sizes and amounts of data; here every size learns from every amount. The reward models of a width
are pretrained once and learn side by side, each seed from judgements of its own, with as many updates whatever their
number of pairs: of few pairs they see each more often. Accuracy is the share of held-out pairs that are ordered as the
gold reward orders them, without noise. For each seed accuracy = a + b log2(n) is fitted, and a parabola, whose bend is
0 where every doubling adds the same; intervals are 95 % over seeds, which share the policy and the held-out pairs.
Size is in parameters without the embedding, which the width doubles twice.

Published (Stiennon 2020, from secondary notes): twice the data adds 1.1 % to accuracy, twice the model 1.8 %.

Measured, in % of 4,000 held-out pairs, four seeds: partly reproduced.

| width | parameters | 500 pairs    | 2,000 pairs | 4,000 pairs | 16,000 pairs | a doubling of the pairs |
|-------|------------|--------------|-------------|-------------|--------------|-------------------------|
| 4     | 916        | 51.29 ± 0.98 | 52.7 ± 2.1  | 53.3 ± 1.1  | 55.7 ± 5.2   | 1.00 ± 0.95             |
| 8     | 2,088      | 52.8 ± 1.8   | 57.6 ± 4.1  | 60.2 ± 2.6  | 64.49 ± 0.51 | 2.41 ± 0.48             |
| 16    | 8,272      | 52.0 ± 1.9   | 58.3 ± 4.5  | 62.6 ± 3.4  | 68.4 ± 2.1   | 3.67 ± 0.86             |
| 32    | 26,784     | 53.77 ± 0.72 | 59.5 ± 2.4  | 64.7 ± 2.1  | 69.9 ± 3.0   | 3.49 ± 0.48             |

Accuracy grows with data, by 2.64 ± 0.40 points a doubling over all widths, and by as much at each: the next one adds
0.05 ± 0.60 less. It grows with size, by 1.63 ± 0.27 points a doubling, but by less at each: the next one adds 0.83 ±
0.54 less. From 2,000 pairs on the step from width 4 to 8 is the largest, and the intervals of widths 16 and 32 overlap
everywhere; from 500 pairs no size learns much. A doubling of the pairs is worth more to the larger models.

It is the smallest width that bends the line. `--widths 8 16 32 64`, 17 minutes, gives 0.78 ± 0.02 points a doubling of
the size, and the next one 0.10 ± 0.10 less: nearly a line, of half the slope.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.recipes import overoptimization as over
from experiments.recipes.overoptimization_config import GROUP_SIZE, shape_of
from experiments.recipes.overoptimization_curves import Line
from experiments.recipes.overoptimization_models import Learning, block_parameters
from rl_jax.errors import InputError
from rl_jax.evaluation import Estimate, mean_interval
from rl_jax.run.figures import PALETTE, band_of, draw_band, open_figure
from rl_jax.run.folder import write_json
from rl_jax.run.loop import run_main
from rl_jax.run.progress import show_progress
from rl_jax.run.tables import open_results, write_table

# Of the pairs in a column, of the size in a row.
DOUBLING, BEND = "points per doubling", "and the next one's, less that"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Accuracy of reward models of several widths, from several numbers of judged pairs."""

    pairs: tuple[int, ...] = (500, 1000, 2000, 4000, 8000, 16_000)
    """Numbers of judged pairs that they learn from, each the first of the same, in rising order."""
    widths: tuple[int, ...] = (4, 8, 16, 32)
    """Their widths, in rising order."""
    learning: Learning = over.Config.learning
    """How they learn, whatever their number of pairs."""
    pretraining: Learning = over.Config.pretraining
    """Pretraining of the policy and of every width."""
    noise: float = over.Config.noise
    """Lead in gold reward, in standard deviations, by which the judge of pairs prefers one with odds of e to 1."""
    held_out_pairs: int = 4000
    """Pairs that accuracy is measured on, by the gold reward without the judge's noise."""
    corpus: str = over.Config.corpus
    """What the policy and the reward models are pretrained on; see pretrain.py."""
    seeds: int = 4
    """Repetitions, each with judgements and reward models of its own."""
    seed: int = 0
    """Seed of everything random."""
    results: Path = Path("results/reward_scaling")
    """Folder that the table and the figure are written to."""


def world_settings(config: Config) -> over.Config:
    """The policy, the gold reward and the judgements of `overoptimization`, with what this recipe varies."""
    return dataclasses.replace(
        over.Config(),
        corpus=config.corpus,
        pretraining=config.pretraining,
        noise=config.noise,
        widths=config.widths,
        width=config.widths[0],
        pairs=config.pairs,
        default_pairs=config.pairs[0],
        learning=config.learning,
        held_out_pairs=config.held_out_pairs,
        samples=GROUP_SIZE,  # of each prompt, to standardise the gold reward on
        seeds=config.seeds,
        seed=config.seed,
    )


def measure(config: Config) -> np.ndarray:
    """Accuracy on held-out pairs, per cent. [widths, pairs, seeds]."""
    settings, found = world_settings(config), []
    world = over.make_world(settings)
    with show_progress("widths", 0, len(config.widths)) as progress:
        for number, width in enumerate(config.widths, 1):
            lines = [Line(width, pairs) for pairs in config.pairs]
            found.append(over.train_proxies(settings, world, width, lines).accuracy)
            progress.show(number, {"accuracy": float(np.mean(found[-1]))})
    return 100 * np.array(found)


def sizes(config: Config) -> np.ndarray:
    """Parameters of each width, the embedding aside. [widths]."""
    settings = world_settings(config)
    return np.array([block_parameters(shape_of(settings, width)) for width in config.widths])


def per_doubling(amounts: Sequence[int] | np.ndarray, accuracy: np.ndarray) -> tuple[Estimate, Estimate | None]:
    """Accuracy over x = log2(amount), fitted for each seed: b of a + b x, and c of a + b x + c x^2, 0 if log-linear.

    Args:
        amounts: pairs or parameters. [n].
        accuracy: per cent. [n, seeds].

    Returns:
        Points per doubling, and what the next doubling brings more than this one, 2 c, or None of two amounts; with
        95 % intervals over seeds.
    """
    doublings = np.log2(amounts) - np.log2(amounts).mean()
    slopes = np.polyfit(doublings, accuracy, 1)[0]
    bends = 2 * np.polyfit(doublings, accuracy, 2)[0] if len(amounts) > 2 else None
    return mean_interval(slopes), None if bends is None else mean_interval(bends)


def table_rows(pairs: tuple[int, ...], widths: tuple[int, ...], sizes: np.ndarray, accuracy: np.ndarray) -> list[Row]:
    """A row for each width and one for their mean, then what doublings of the size bring. [W], [W, pairs, seeds]."""

    def row(name: str, size: int | None, found: np.ndarray) -> Row:
        slope, bend = per_doubling(pairs, found)
        cells = {f"{n:,} pairs": mean_interval(x) for n, x in zip(pairs, found, strict=True)}
        every = {"all": mean_interval(found.mean(axis=0)), DOUBLING: slope, BEND: bend}
        return {"width": name, "parameters": size} | cells | every

    rows = [row(str(width), int(size), x) for width, size, x in zip(widths, sizes, accuracy, strict=True)]
    rows.append(row("all", None, accuracy.mean(axis=0)))
    every = [*np.moveaxis(accuracy, 1, 0), accuracy.mean(axis=1)]  # of each number of pairs, and of all
    names = [*(f"{n:,} pairs" for n in pairs), "all"]
    of_size = [per_doubling(sizes, x) for x in every]
    for place, name in enumerate((DOUBLING, BEND)):
        rows.append({"width": name} | dict(zip(names, (x[place] for x in of_size), strict=True)))
    return rows


def draw(path: Path, config: Config, sizes: np.ndarray, accuracy: np.ndarray) -> None:
    """Accuracy over pairs and over parameters; bands are 95 % over seeds."""
    with open_figure(path, ["By data", "By size"], height=3.6) as (by_data, by_size):
        for width, found, colour in zip(config.widths, accuracy, PALETTE, strict=False):
            band = band_of(map(mean_interval, found))
            draw_band(by_data, np.array(config.pairs), band, f"width {width}", colour)
        for number, found, colour in zip(config.pairs, np.moveaxis(accuracy, 1, 0), PALETTE, strict=False):
            draw_band(by_size, sizes, band_of(map(mean_interval, found)), f"{number:,} pairs", colour)
        by_data.set(xlabel="judged pairs", xscale="log", ylabel="held-out accuracy, %")
        by_size.set(xlabel="parameters, the embedding aside", xscale="log", ylabel="held-out accuracy, %")
        for axes in (by_data, by_size):
            axes.legend()


def check(config: Config) -> None:
    """Raise InputError for settings that cannot work, before the long work."""
    for name in ("pairs", "widths"):
        given = getattr(config, name)
        if len(given) < 2 or list(given) != sorted(set(given)):
            raise InputError(f"{name} are {given}; give at least two, in rising order.")
    over.check(world_settings(config))


def main(config: Config) -> None:
    check(config)
    began, folder = time.perf_counter(), open_results(config.results)
    accuracy, parameters = measure(config), sizes(config)
    write_json(folder / "accuracy.json", {"widths": config.widths, "pairs": config.pairs, "accuracy": accuracy})
    draw(folder / "reward_scaling.png", config, parameters, accuracy)
    rows = table_rows(config.pairs, config.widths, parameters, accuracy)
    write_table(folder, rows, dataclasses.asdict(config) | {"seconds": time.perf_counter() - began})


if __name__ == "__main__":
    run_main(main, Config)
