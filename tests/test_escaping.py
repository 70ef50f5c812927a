"""What a model wrote, and every other text of a run, is shown by a browser and never run."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from rl_jax.run.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
PAYLOADS = (
    "<script>document.title='run'</script>",
    '"><img src=x onerror="document.title=\'run\'">',
    "'><svg onload='document.title=`run`'>",
    "</pre></p></td></style></title><script>document.title='run'</script>",
    "<!--<script>document.title='run'//--></script>",
    "&lt;script&gt; &amp;amp; {0} ${name}",
)
FOLDER = "<img src=x onerror=document.title=`run`>"  # a name cannot have a slash
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser on PATH: {', '.join(BROWSERS)}")


class Dom(HTMLParser):
    """The elements of a page, names of their attributes, and the text of each element, one after another."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], set(), [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    @property
    def title(self):
        return "".join(text for tag, text in self.texts if tag == "title")

    @property
    def text(self):
        return "".join(text for _, text in self.texts)


def dom_of(page, tmp_path):
    """The page as the browser has it once it is loaded and its scripts have run."""
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", profile]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=90, check=False
    )
    assert "<html" in done.stdout, done.stderr[-2000:]
    return Dom(done.stdout)


def write_run(folder):
    """A run all of whose texts are hostile, each payload in a place of its own; how often the page shows each."""
    folder.mkdir()
    every = "".join(PAYLOADS)
    side = {"tokens": list(PAYLOADS), "log_ratio": [0.5] * len(PAYLOADS), "reward": every, "advantage": every}
    files = {
        "config": {
            "script": every,
            "device": every,
            "config": {every: {every: every}, "rewards": list(PAYLOADS), "plain": every},
            "estimator": {"name": every},
            "versions": {every: every},
        },
        "summary": {
            "reward": every,
            "gold": every,
            "seed": every,
            "reward_before": 0.1,
            "reward_after": 0.5,
            "gold_before": 0.1,
            "gold_after": 0.5,
            "kl": every,
            "win_rate_interval": [every, every],
            "seconds_by_stage": {every: 1.0},
            "reward_model": {"kind": every, "pair_accuracy": 0.5, "learning_curve": [{"pairs": every}]},
        },
        "completions": {"pairs": [{"prompt": every, "before": side, "after": side}]},
    }
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    rows = [
        {"stage": stage, "step": step, "reward": 0.1 * step, every: every} for stage in ("rl", every) for step in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def unguarded(page):
    """The same page without its content security policy, which would stop a script that had come through."""
    source = page.read_text("utf-8")
    begin = source.index("<meta http-equiv")
    bare = page.with_name("unguarded.html")
    bare.write_text(source[:begin] + source[source.index(">", begin) + 1 :], "utf-8")
    assert "Content-Security-Policy" not in bare.read_text("utf-8")
    return bare


def test_scripts_do_run_where_nothing_is_escaped(tmp_path):
    for number, payload in enumerate(PAYLOADS[:4]):
        page = tmp_path / f"{number}.html"
        page.write_text(f'<!doctype html><title>not run</title><p title="{payload}">{payload}</p>')
        assert dom_of(page, tmp_path).title == "run", payload


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
def test_a_browser_shows_what_was_written_and_runs_none_of_it(tmp_path, guarded):
    folder = tmp_path / FOLDER
    write_run(folder)
    page = write_report(folder)
    dom = dom_of(page if guarded else unguarded(page), tmp_path)
    assert dom.title == FOLDER
    assert not {"script", "img", "iframe", "object", "embed", "link", "base", "form"} & set(dom.tags)
    assert dom.tags.count("title") == dom.tags.count("style") == 1
    assert not [name for name in dom.attributes if name.startswith("on") or name in ("src", "href", "action")]
    shown = dom.text
    assert shown.count(FOLDER) == 2  # title and heading
    # script, device, seed; two rewards; the kind of reward model; the prompt and two completions; the timed stage;
    # a plain setting; title, name and value of a nested one; the estimator; name and value of a version
    assert shown.count("".join(PAYLOADS)) == 3 + 2 + 1 + 3 + 1 + 1 + 3 + 1 + 2
    for number, payload in enumerate(PAYLOADS):
        pieces = [text for tag, text in dom.texts if tag == "span" and text == payload]
        assert len(pieces) == 2, number
