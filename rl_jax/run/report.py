"""The report of a run: one self-contained HTML page made from the files in the run's folder.

The page fetches nothing and runs no script: styles and figures are inline, a content security policy forbids
the rest, and every text that came from a file is escaped.
"""

import importlib.resources
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from rl_jax.run.curves import curves
from rl_jax.run.folder import write_text
from rl_jax.run.parting import parting_warning
from rl_jax.run.report_sections import before_after, completions, figures, headline, settings, times
from rl_jax.run.reward_sections import reward_section
from rl_jax.run.run_files import Run, read_run

UNREADABLE = '<p class="note lost">Lines of metrics.jsonl left out because they are no whole row: {}.</p>'

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" 
 content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>
{css}</style>
</head>
<body>
<main>
<header>
<p class="about">{about}</p>
<h1>{name}</h1>
<p class="headline">{headline}</p>
</header>
{body}
</main>
</body>
</html>
"""


def write_report(folder: str | Path) -> Path:
    """Writes `report.html` into a run's folder, whole or not at all, and returns its path.

    The folder's config.json is needed; metrics.jsonl, summary.json and completions.json are shown where they exist.

    Raises:
        InputError: the folder is not a run's, or a file in it cannot be read.
    """
    folder = Path(folder)
    return write_text(folder / "report.html", render(read_run(folder)))


def render(run: Run) -> str:
    """The report as HTML."""
    sections = {
        "Before and after": before_after(run.summary),
        "Training": curves(run.metrics) + (UNREADABLE.format(run.unreadable) if run.unreadable else ""),
        "Reward model": reward_section(run.summary),
        "Completions": completions(run.pairs),
        "Time": times(run.summary, run.metrics),
        "Settings": settings(run.config),
    }
    warning = parting_warning(run.metrics)
    about = [run.config[name] for name in ("script", "device") if name in run.config]
    about += [f"seed {run.summary['seed']}"] if "seed" in run.summary else []
    begin = f'<p class="warning"><strong>Warning.</strong> {escape(warning)}</p>' if warning else ""
    return page(run.name, about, headline(run.summary, run.metrics), begin + figures(run.summary), sections)


def page(name: str, about: Iterable[Any], headline: str, begin: str, sections: dict[str, str]) -> str:
    """A page of HTML: its name, what it is about, and a headline, as text; then HTML, and sections of it by title.

    A section that is empty is left out.
    """
    return PAGE.format(
        css=importlib.resources.files("rl_jax.run").joinpath("report.css").read_text("utf-8"),
        name=escape(name),
        about=escape(" · ".join(map(str, about))),
        headline=escape(headline),
        body="\n".join((begin, *(f"<section><h2>{h}</h2>{body}</section>" for h, body in sections.items() if body))),
    )
