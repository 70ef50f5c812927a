"""The house stands as docs/design.md draws it: imports point downwards, and each tool stays in its room."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the top of the house to the bottom: a module may import from its own floor and from those below it.
FLOORS = (
    ("experiments",),
    (
        "rl_jax.preferences",
        "rl_jax.pretraining",
        "rl_jax.evaluation",
        "rl_jax.best_of_n",
        "rl_jax.sweep",
        "rl_jax.sign_check",
    ),
    ("rl_jax.learner",),
    ("rl_jax.scoring",),
    ("rl_jax.reinforce",),
    ("rl_jax.rewards",),
    ("rl_jax.slots", "rl_jax.packing"),
    ("rl_jax.rollout", "rl_jax.microbatch"),
    ("rl_jax.sampling",),
    ("rl_jax.models",),
    ("rl_jax.data",),
    ("rl_jax.run",),
    ("rl_jax.keys", "rl_jax.masked"),
    ("rl_jax.types",),
    ("rl_jax.errors",),
    ("rl_jax",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, ast.Module]:
    """Every module of the library and the experiments by its dotted name."""
    paths = [path for folder in ("rl_jax", "experiments") for path in (ROOT / folder).rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): ast.parse(path.read_text("utf-8")) for path, name in names.items()}


MODULES = modules()


def imported(tree: ast.Module) -> set[str]:
    """Dotted names of what a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(tree: ast.Module) -> set[str]:
    """The modules of this project that a module imports."""
    return {name for name in imported(tree) if name in MODULES and name not in ("rl_jax", "experiments")}


def room(name: str) -> str:
    """The longest entry of FLOORS that the module lies in."""
    parts = name.split(".")
    return next(r for n in range(len(parts), 0, -1) if (r := ".".join(parts[:n])) in FLOOR)


def used(tree: ast.Module) -> set[str]:
    """Dotted names such as "jax.jit" that occur in a module's code, and the full names of what it imports."""
    return imported(tree) | {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_there_are_modules_to_read():
    assert {"rl_jax.learner", "rl_jax.models.transformer", "experiments.pipeline"} <= set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_never_point_up(name):
    above = {other for other in ours(MODULES[name]) if FLOOR[room(other)] < FLOOR[room(name)]}
    assert not above


def test_imports_have_no_circle():
    remaining = {name: ours(tree) - {name} for name, tree in MODULES.items()}
    while free := [name for name, needs in remaining.items() if not needs & set(remaining)]:
        for name in free:
            del remaining[name]
    assert not remaining, "these import each other"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_each_tool_stays_in_its_room(name):
    names = used(MODULES[name])
    if room(name) != "rl_jax.models":
        assert not {n for n in names if n == "flax" or n.startswith("flax.")}
    if name != "rl_jax.run.spmd" and room(name) != "experiments":
        compiled = ("jax.jit", "jax.pmap", "jax.shard_map", "jax.sharding", "jax.experimental.shard_map", "jax.lax.p")
        allowed = ("jax.lax.pad", "jax.lax.platform_dependent")
        assert not {n for n in names if n.startswith(compiled) and n not in allowed}
    assert not {n for n in names if n.startswith(("pickle", "torch"))}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_stay_short(name):
    path = ROOT / Path(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert len(path.read_text("utf-8").splitlines()) <= 400


def test_what_is_not_python_is_packaged_too():
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    others = [path for path in (ROOT / "rl_jax").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {".".join(path.parent.relative_to(ROOT).parts): [path.name] for path in others} == packaged
