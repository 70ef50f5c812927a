"""docs/results.md: what was published, what the recipes measured, and whether the one bears out the other.

    python experiments/gallery.py

The page, and the README's table, are made of results/*/table.json and settings.json alone, which
`experiments/results.py` writes; a test holds them to these.
"""

import dataclasses
import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments import claims_exact as exact
from experiments import claims_learned as learned
from experiments.claims import Claim
from rl_jax.errors import InputError
from rl_jax.run.loop import run_main

CLAIMS = (
    exact.THEOREM,
    exact.LEAVE_ONE_OUT,
    exact.BEST_OF_N,
    exact.FRONTIER,
    learned.HUMAN,
    exact.ADAPTIVE,
    learned.SCALING,
    learned.OVEROPTIMIZATION,
    learned.COMPARISON,
    exact.LENGTH_BIAS,
    learned.VERIFIABLE_LENGTH,
    learned.VERIFIABLE,
    exact.LINEAR,
    learned.DIALOGUE,
    learned.STORY,
)
RESULTS, GALLERY, README = Path("results"), Path("docs/results.md"), Path("README.md")
BEGIN, END = "<!-- results: experiments/gallery.py writes this table -->", "<!-- end of results -->"
HEAD = """\
# Results

`make results` runs every recipe, in the size that two cores can bear, and writes this page anew: each measured figure,
and each yes or no, is worked out from the tables in `results/`. A verdict is "reproduced" where every part of a claim
holds in the recipe's problem, "partly" where half of them or more do. ± is half of a 95 % interval. † marks what is
told from secondary notes, not from the paper itself. `make results ARGS="--size full"` runs larger settings, for a GPU,
into `results_full/`; nothing here is from them.

"""


class Held(NamedTuple):
    """A claim, held against what its recipe found.

    Attributes:
        claim: the claim.
        measured: the figures, in a phrase; "" where there are no results.
        parts: what it comes to, each with whether it holds; none where there are no results.
        about: the recipe's settings.json.
    """

    claim: Claim
    measured: str
    parts: Mapping[str, bool]
    about: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        """In a word or three."""
        holding = self.parts.values()
        if not holding:
            return "not run yet"
        return "reproduced" if all(holding) else "partly" if 2 * sum(holding) >= len(holding) else "not reproduced"


def hold(claim: Claim, results: Path = RESULTS) -> Held:
    """Holds a claim against the results of its recipe, if there are any.

    Raises:
        InputError: they are not what the recipe writes.
    """
    folder = results / claim.recipe
    if not (folder / "table.json").exists():
        return Held(claim, "", {}, {})
    try:
        rows, about = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("table", "settings"))
        about["processor_seconds"], about["device"], about["versions"]["jax"]
        return Held(claim, claim.measured(rows), {part: bool(true(rows)) for part, true in claim.parts.items()}, about)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{folder} is not what {claim.recipe} writes ({error!r}): make it anew, by "
            f'make results ARGS="--only {claim.recipe}".'
        ) from error


def command(claim: Claim) -> str:
    """What runs the recipe."""
    return f"python experiments/recipes/{claim.recipe}.py"


def short_table(results: Path = RESULTS) -> str:
    """All claims in Markdown, a row each, as the README has them."""
    rows = [("claim", "published", "measured", "verdict", "command"), ("---",) * 5]
    for held in (hold(claim, results) for claim in CLAIMS):
        claim = held.claim
        said = (f"{claim.claim} ({claim.source})", claim.published or "–", held.measured or "–", held.verdict)
        rows.append((*said, f"`{command(claim)}`"))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def index(every: list[Held]) -> str:
    """The verdicts in Markdown, each with a link to its section."""
    rows = [("claim", "verdict"), ("---", "---")]
    for held in every:
        anchor = re.sub(r"[^\w -]", "", held.claim.claim.lower()).replace(" ", "-")
        rows.append((f"[{held.claim.claim}](#{anchor})", held.verdict))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def section(held: Held) -> str:
    """Everything about a claim, with the figure."""
    claim, folder = held.claim, f"../results/{held.claim.recipe}"
    published = f" Published: {claim.published}." if claim.published else ""
    parts = [f"## {claim.claim}", f"{claim.source[0].upper()}{claim.source[1:]}.{published}"]
    if held.parts:
        judged = "; ".join(f"{part}: {'yes' if true else 'no'}" for part, true in held.parts.items())
        parts += [f"Measured: {held.measured}.", f"**{held.verdict.capitalize()}:** {judged}."]
    else:
        parts.append(
            f"**Not run yet** for this page; what an earlier run gave, if there was one, is in the recipe's docstring. "
            f"To be judged: {'; '.join(claim.parts)}."
        )
    parts.append(claim.note)
    text = "\n\n".join(textwrap.fill(part, 120, break_long_words=False, break_on_hyphens=False) for part in parts)
    text += f"\n\n    {command(claim)}\n"
    if not held.parts:
        return text
    run = f"{describe(held.about['processor_seconds'])} of processor time, {held.about['device']}"
    about = f"{run}, JAX {held.about['versions']['jax']}: [the table]({folder}/table.md)."
    return f"{text}\n{about}\n\n![{claim.claim}]({folder}/{claim.figure})\n"


def describe(seconds: float) -> str:
    """A time in seconds or minutes."""
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"


def gallery(results: Path = RESULTS) -> str:
    """The whole page."""
    every = [hold(claim, results) for claim in CLAIMS]
    return HEAD + index(every) + "".join(f"\n{section(held)}" for held in every)


def with_table(readme: str, table: str) -> str:
    """The README with the table between its two marks, if it has them."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    return f"{head}{begin}\n\n{table}\n{end}{tail}" if end else readme


def write_gallery() -> None:
    """Writes docs/results.md, and the README's table, from the results that there are."""
    GALLERY.write_text(gallery(), "utf-8")
    readme = README.read_text("utf-8")
    if (written := with_table(readme, short_table())) != readme:
        README.write_text(written, "utf-8")
    print(f"Wrote {GALLERY}, and the table of {README}.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Write docs/results.md, and the README's table, from the tables in results/."""


def main(config: Config) -> None:
    del config
    write_gallery()


if __name__ == "__main__":
    run_main(main, Config)
