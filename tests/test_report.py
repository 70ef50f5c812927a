"""The report: true to its files, safe to open, and whole for every kind of run."""

import json
import re
from html.parser import HTMLParser

import pytest

from rl_jax.errors import InputError
from rl_jax.run import report, report_sections
from rl_jax.run.run_files import read_run

HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror='alert(2)'>\"{0}&lt;"
VOID = {"meta", "path", "use", "rect"}  # `path`, `use` and `rect` close themselves
SUMMARY = {
    "reward": "sentiment",
    "reward_before": 0.118,
    "reward_before_interval": [0.081, 0.155],
    "reward_after": 0.643,
    "reward_after_interval": [0.612, 0.674],
    "kl": 8.74,
    "kl_interval": [8.31, 9.17],
    "win_rate": 0.871,
    "win_rate_interval": [0.841, 0.897],
    "length_before": 38.1,
    "length_after": 34.4,
    "reference_perplexity_before": 121.9,
    "reference_perplexity_after": 1327.3,
    "distinct_2_before": 0.712,
    "distinct_2_after": 0.588,
    "truncated_before": 0.402,
    "truncated_after": 0.0,
    "held_out_loss": 3.224,
    "held_out_perplexity": 25.13,
    "held_out_bits_per_byte": 1.187,
    "parameters": 5_767_168,
    "seconds": 5400.0,
    "seconds_by_stage": {"pretrain": 1800.0, "rl": 3600.0},
    "seed": 7,
}
CONFIG = {
    "script": "experiments/pipeline.py",
    "config": {"seed": 7, "model": {"width": 256, "rope": {"base": 10000}}, "names": ["sentiment"], "pattern": ""},
    "device": "cpu x 1",
    "estimator": {"name": "ppo", "clip_low": "0.17"},
    "versions": {"jax": "0.10.2"},
}
PAIR = {
    "prompt": "In the beginning",
    "before": {"tokens": [" it", " was"], "log_ratio": [0.0, -0.4], "reward": 0.25, "advantage": None},
    "after": {"tokens": [" all", "\n", ""], "log_ratio": [5.0, -5.0, 0.0], "reward": 0.75, "advantage": -0.5},
}
PRETRAIN = [
    {"stage": "pretrain", "step": step, "loss": 3.0 - step, "grad_norm": 1.0, "learning_rate": 0.1} for step in (0, 1)
]
RL = [{"stage": "rl", "step": step, "reward": 0.1 * step, "kl": 0.5, "tokens_per_second": 1e3} for step in (0, 1, 2)]


class Page(HTMLParser):
    """Tags, attributes, text, and table cells of a page; the stack proves that tags close in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.table: list[list[str]] = []
        self.text = ""
        self.stack: list[str] = []
        self.feed(source)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "style":
            return
        self.text += data
        if {"td", "th"} & set(self.stack):
            self.table[-1][-1] += data + "|"

    def cells(self, label: str) -> list[list[str]]:
        """The texts of each cell after the first in the row whose first cell begins with the label."""
        return next([cell.rstrip("|").split("|") for cell in row[1:]] for row in self.table if row[0].startswith(label))


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value))


def write_metrics(folder, rows, tail=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def page_of(folder) -> Page:
    return Page(report.write_report(folder).read_text("utf-8"))


def write_pipeline(folder):
    """A finished run of both stages."""
    folder.mkdir()
    write(folder, "config.json", CONFIG)
    write(folder, "summary.json", SUMMARY)
    write(folder, "completions.json", {"pairs": [PAIR]})
    write_metrics(folder, PRETRAIN + RL)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_pipeline(tmp_path / "first run")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return page_of(write_pipeline(tmp_path_factory.mktemp("runs") / "first run"))


def test_writes_one_file_and_says_where(folder):
    before = set(folder.iterdir())
    path = report.write_report(str(folder))
    assert path == folder / "report.html"
    assert set(folder.iterdir()) - before == {path}
    first = path.read_bytes()
    assert report.write_report(folder).read_bytes() == first


@pytest.mark.parametrize(
    "label, cells",
    [
        ("Reward", [["0.118", "0.081 to 0.155"], ["0.643", "0.612 to 0.674"], ["+0.525"]]),
        ("Exact KL", [["–"], ["8.74", "8.31 to 9.17"], [""]]),
        ("Win rate", [["–"], ["87.1%", "84.1% to 89.7%"], [""]]),
        ("Completion length", [["38.1"], ["34.4"], ["−3.7"]]),
        ("Truncated", [["40.2%"], ["0.0%"], ["−40.2"]]),
        ("Reference perplexity", [["122"], ["1,327"], ["+1,205"]]),
        ("Distinct-2", [["0.712"], ["0.588"], ["−0.124"]]),
        ("Held-out loss", [["3.22"], ["–"], [""]]),
        ("Held-out perplexity", [["25.1"], ["–"], [""]]),
        ("Held-out bits", [["1.19"], ["–"], [""]]),
        ("Pretraining", [["30.0 min"], [""], [""]]),
        ("Reinforcement", [["1.00 h"], [""], ["1,000 tokens/s"]]),
        ("rope.base", [["10000"]]),
        ("names", [['["sentiment"]']]),
        ("pattern", [['""']]),
        ("clip_low", [["0.17"]]),
        ("jax", [["0.10.2"]]),
    ],
)
def test_tables_say_what_the_files_say(page, label, cells):
    assert page.cells(label) == cells


def test_first_screen_tells_the_result(page):
    text = page.text
    head = text[: text.index("Before and after")]
    assert "experiments/pipeline.py · cpu x 1 · seed 7" in head
    assert (
        "Tuning raised the mean reward (sentiment) from 0.118 to 0.643 at an exact KL of 8.74 nats a completion; "
        "its completions win 87.1% of pairs with the pretrained." in head
    )
    assert "Parameters5.77million" in head and "Time1.50h" in head


@pytest.mark.parametrize(
    "after, interval, expected",
    [
        (0.05, [0.02, 0.07], "Tuning lowered the mean reward (sentiment) from 0.118 to 0.050."),
        (
            0.15,
            [0.14, 0.16],
            "Tuning moved the mean reward (sentiment) from 0.118 to 0.150, with 95% intervals that overlap.",
        ),
        (0.643, None, "Tuning moved the mean reward (sentiment) from 0.118 to 0.643."),
    ],
)
def test_headline_claims_no_more_than_the_intervals(after, interval, expected):
    names = ("reward", "reward_before", "reward_before_interval")
    summary = {name: SUMMARY[name] for name in names} | {"reward_after": after, "reward_after_interval": interval}
    assert report_sections.headline(summary, {}) == expected
    beside = report_sections.headline(summary | {"win_rate": 0.5}, {})
    assert beside == f"{expected[:-1]}; its completions win 50.0% of pairs with the pretrained."


def test_page_runs_and_fetches_nothing(page):
    allowed = "html head meta title style body main header p h1 h2 h3 h4 dl div dt dd small section table thead tbody"
    allowed += " tr th td strong sub span figure figcaption article svg g defs path use text rect clippath"
    assert set(page.tags) <= set(allowed.split())
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "action", "data")]
    assert all(value.startswith("#") for name, value in page.attributes if name.endswith("href"))
    assert not re.search(r"https?:|//|@import|javascript:|url\((?!#)", page.source)
    policies = re.findall(r'http-equiv="Content-Security-Policy"\s+content="([^"]*)"', page.source)
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"]
    assert page.source.index("Content-Security-Policy") < page.source.index("<style>")


def test_ids_are_unique_and_references_lead_to_one(page):
    ids = [value for name, value in page.attributes if name == "id"]
    uses = [value[1:] for name, value in page.attributes if name.endswith("href")]
    uses += re.findall(r"url\(#([^)]*)\)", page.source)
    assert ids and uses
    assert len(ids) == len(set(ids))
    assert set(uses) <= set(ids)


def test_hostile_text_stays_text(tmp_path):
    folder = tmp_path / HOSTILE.replace("/", "")
    folder.mkdir()
    completion = {"tokens": [HOSTILE], "log_ratio": [0.5], "reward": 0.5, "advantage": 0.5}
    write(folder, "config.json", {"script": HOSTILE, "device": HOSTILE, "config": {HOSTILE: {HOSTILE: HOSTILE}}})
    spent = {"seconds_by_stage": {HOSTILE: 1.0}, "seed": HOSTILE, "reward": HOSTILE}
    write(folder, "summary.json", SUMMARY | spent)
    write(folder, "completions.json", {"pairs": [{"prompt": HOSTILE, "before": completion, "after": completion}]})
    write_metrics(folder, [*RL, {"stage": HOSTILE, "step": 1, "reward": 1.0, HOSTILE: 2.0}])
    page = page_of(folder)
    assert not {"script", "img"} & set(page.tags)
    assert page.tags.count("title") == page.tags.count("style") == 1
    assert page.text.count(folder.name) == 2  # title and heading
    # script, device, seed; reward; prompt and two completions; the timed stage; a group, a name and a setting
    assert page.text.count(HOSTILE) == 11
    (folder / "summary.json").unlink()
    assert f"step 1 of {HOSTILE}." in page_of(folder).text


def test_numbers_that_are_none_or_not_finite(folder):
    bad = float("nan")
    summary = {"win_rate": bad, "kl": None, "kl_interval": [None, bad], "seconds": float("inf"), "parameters": None}
    write(folder, "summary.json", SUMMARY | summary)
    side = {"tokens": [" a", " b"], "log_ratio": [None, bad], "reward": None, "advantage": bad}
    write(folder, "completions.json", {"pairs": [PAIR | {"before": side, "after": side}]})
    write_metrics(folder, [*RL, {"stage": "rl", "step": 3, "reward": None, "kl": bad, "tokens_per_second": None}])
    page = page_of(folder)
    assert "from 0.118 to 0.643." in page.text
    assert "reward –" in page.text and "advantage" not in page.text
    assert page.text.count("1 not finite") == 2
    assert not [row for row in page.table if row[0].startswith(("Exact KL", "Win rate"))]
    assert not re.search(r"\b(nan|inf|None|null)\b", re.sub(r"<style>.*?</style>", "", page.source, flags=re.DOTALL))
    assert [value for name, value in page.attributes if name == "title"] == ["– nats"] * 4


def test_later_row_of_a_step_wins(folder):
    rows = [{"stage": "rl", "step": step, "reward": reward} for step, reward in ((1, 0.1), (3, 0.3), (2, 0.2))]
    again = [{"stage": "rl", "step": step, "reward": reward} for step, reward in ((2, 2.0), (4, 4.0), (3, 3.0))]
    write_metrics(folder, rows + again + PRETRAIN)
    metrics = read_run(folder).metrics
    assert [(row["step"], row["reward"]) for row in metrics["rl"]] == [(1, 0.1), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert metrics["pretrain"] == PRETRAIN


def test_half_written_lines_are_left_out_and_said(folder):
    assert read_run(folder).unreadable == 0
    write_metrics(folder, RL, tail='{"stage": "rl", "st\n\n[1, 2]\n{"stage": "rl", "step": 3, "rew')
    run = read_run(folder)
    assert run.metrics == {"rl": RL} and run.unreadable == 3
    assert "Lines of metrics.jsonl left out because they are no whole row: 3." in page_of(folder).text


def test_pretraining_alone(folder):
    held_out = ("held_out_loss", "held_out_perplexity", "held_out_bits_per_byte", "parameters", "seconds")
    write(folder, "summary.json", {name: SUMMARY[name] for name in held_out})
    (folder / "completions.json").unlink()
    write_metrics(folder, PRETRAIN)
    page = page_of(folder)
    expected = "The pretrained model has a held-out loss of 3.22 nats a token (perplexity 25.1, 1.19 bits a byte)."
    assert expected in page.text
    assert "Unfinished" not in page.text and "Before and after" not in page.text and "Completions" not in page.text
    assert page.tags.count("svg") == 3


def test_headlines_of_a_given_model_and_of_fine_tuning():
    held_out = {"held_out_loss": 3.22, "held_out_perplexity": 25.1, "held_out_bits_per_byte": 1.19}
    summary = held_out | {f"{name}_before": value + 1 for name, value in held_out.items()}
    line = report_sections.headline(summary, {"pretrain": []})
    assert line.endswith("3.22 nats a token (perplexity 25.1, 1.19 bits a byte; 2.19 before this run).")
    summary = {"finetune": {"held_out_loss_before": 6.5, "held_out_loss": 5.25}}
    expected = "Fine-tuning moved the held-out loss of completions from 6.50 to 5.25 nats a token."
    assert report_sections.headline(summary, {"finetune": [{"step": 3}]}) == expected


def test_reinforcement_learning_alone(folder):
    write(folder, "summary.json", {name: value for name, value in SUMMARY.items() if not name.startswith("held_out")})
    write_metrics(folder, RL)
    page = page_of(folder)
    assert "Tuning raised" in page.text and "Held-out" not in page.text and "Pretraining" in page.text
    assert page.tags.count("svg") == 2


def test_interrupted_run(folder):
    (folder / "completions.json").unlink()
    (folder / "summary.json").unlink()
    page = page_of(folder)
    assert "Unfinished: the metrics reach step 2 of reinforcement learning." in page.text
    assert page.tags.count("svg") == 5 and "dl" not in page.tags

    write_metrics(folder, PRETRAIN)
    assert "Unfinished: the metrics reach step 1 of pretraining." in page_of(folder).text

    (folder / "metrics.jsonl").unlink()
    page = page_of(folder)
    assert "Unfinished: the metrics reach no step." in page.text and "svg" not in page.tags

    write_metrics(folder, PRETRAIN + RL)
    write(folder, "summary.json", {"held_out_loss": 3.224})  # pretraining finished, tuning did not
    text = page_of(folder).text
    assert "held-out loss of 3.22" in text and "reach step 2 of reinforcement learning" in text


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("config.json", None, "has no config.json"),
        ("config.json", "{", "config.json is not valid JSON"),
        ("summary.json", "[]", "summary.json should hold a JSON object, not a list"),
        ("summary.json", b"\xff\xfe{", "summary.json is not valid JSON"),
        ("completions.json", '{"pairs": [{"prompt": "x"}]}', "completions.json: pair 0"),
        (
            "completions.json",
            json.dumps({"pairs": [PAIR, PAIR | {"after": PAIR["after"] | {"log_ratio": [1.0]}}]}),
            "completions.json: pair 1",
        ),
    ],
)
def test_bad_files_are_named_and_the_old_report_stays(folder, name, text, message):
    path = report.write_report(folder)
    before = path.read_bytes()
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        report.write_report(folder)
    assert path.read_bytes() == before


def test_completions_show_every_token_and_its_log_ratio(page):
    assert "In the beginning" in page.text and " it was" in page.text
    assert " all↵\n·" in page.text  # a newline is seen, and so is the token inside a character
    titles = [value for name, value in page.attributes if name == "title"]
    assert titles == [f"{ratio} nats" for ratio in ("+0.000", "−0.400", "+5.000", "−5.000", "+0.000")]
    assert "reward 0.250" in page.text and "reward 0.750" in page.text and page.text.count("advantage −0.500") == 1


@pytest.mark.parametrize(
    "before, after, cells",
    [
        (-1234.5, 2.0, [["−1,234"], ["2"], ["+1,236"]]),
        (0.00123, 0.00045, [["0.00123"], ["0.00045"], ["−0.00078"]]),
        (1.0, 3.5e8, [["1"], ["3.50e+08"], ["+3.50e+08"]]),
        (0.5, 0.49999, [["0.500"], ["0.500"], ["+0.000"]]),
        (0, 0, [["0"], ["0"], ["+0"]]),
    ],
)
def test_numbers_keep_three_digits(before, after, cells):
    page = Page(report_sections.before_after({"reward_before": before, "reward_after": after}))
    assert page.cells("Reward") == cells


def test_pairs_beyond_the_fold_are_all_there(folder):
    pairs = [PAIR | {"prompt": f"prompt {number}."} for number in range(report_sections.OPEN_PAIRS + 2)]
    write(folder, "completions.json", {"pairs": pairs})
    page = page_of(folder)
    assert all(pair["prompt"] in page.text for pair in pairs)
    assert page.tags.count("details") == 1 and "2 more" in page.text


@pytest.mark.parametrize(
    "log_ratio, expected",
    [(0.0, ""), (0.16, ""), (0.18, "up1"), (-1.0, "down3"), (2.0, "up6"), (-9.0, "down6"), (None, "")],
)
def test_shade(log_ratio, expected):
    assert report_sections.shade(log_ratio, limit=2.0) == expected


def test_every_class_of_the_page_has_a_style(folder):
    write_metrics(folder, RL, tail="{")
    page = page_of(folder)
    css = page.source[page.source.index("<style>") : page.source.index("</style>")]
    used = {name for attribute, value in page.attributes if attribute == "class" for name in value.split()}
    assert used >= set(report_sections.SHADES) - {""}  # the legend shows them all
    assert not [name for name in used if not re.search(rf"\.{name}\b", css)]


def test_text_that_utf_8_cannot_hold(folder):
    write(folder, "completions.json", {"pairs": [PAIR | {"prompt": "half \ud83d 中文 \u202e 🙂"}]})
    assert "half ? 中文 \u202e 🙂" in page_of(folder).text
