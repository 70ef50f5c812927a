"""What the README, the docs and the scripts' docstrings hold: programs, commands, links, names."""

import ast
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("experiments/**/*.py"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(\S*\bpython) ((?:experiments|benchmarks)/[\w/]+\.py)([^`\n]*)")
VARIABLES = {"$RESUME": "--resume", "$i": "0"}


class Command(NamedTuple):
    """A line that runs a script.

    Attributes:
        place: the page, or the script whose docstring it is from.
        python: the interpreter, as it is written.
        script: path of the script.
        words: what is given to it.
    """

    place: str
    python: str
    script: str
    words: tuple[str, ...]


def programs(text: str) -> list[str]:
    """The blocks of Python of a page."""
    return [code for language, code in FENCE.findall(text) if language == "python"]


def prose(text: str) -> str:
    """A page without its blocks of Python."""
    return FENCE.sub(lambda block: "" if block[1] in ("python", "math") else block[0], text)


def spans(text: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"`([^`]+)`", FENCE.sub("", text))


def code(text: str) -> list[str]:
    """Lines of indented or fenced code that is no Python, lines that go on joined, and what stands in backticks."""
    lines = [line for line in joined(prose(text)).splitlines() if line.startswith("    ")]
    fenced = [
        line for language, block in FENCE.findall(text) if language in ("", "bash") for line in block.splitlines()
    ]
    return lines + fenced + spans(text)


def joined(text: str) -> str:
    """Text whose lines that end in a backslash go on with the next."""
    return re.sub(r"\\\n\s*", " ", text)


def commands(place: str, text: str) -> list[Command]:
    """The commands of a page or a docstring."""
    found = []
    for python, script, rest in COMMAND.findall(joined(prose(text))):
        for variable, value in VARIABLES.items():
            rest = rest.replace(variable, value)
        words = shlex.split(rest, comments=True)
        ends = [number for number, word in enumerate(words) if word in ("&", "&&", "|", ";")]
        found.append(Command(place, python, script, tuple(words[: min(ends, default=len(words))])))
    return found


PAGES_COMMANDS = list(dict.fromkeys(command for name, text in PAGES.items() for command in commands(name, text)))
DOCSTRINGS_COMMANDS = [
    command
    for script in SCRIPTS
    for command in commands(script, ast.get_docstring(ast.parse((ROOT / script).read_text("utf-8"))) or "")
]


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def defined(path: Path) -> set[str]:
    """What a module defines at its top, and the methods and attributes of its classes."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names
