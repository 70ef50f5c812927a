"""The report on a reward model and on a gold reward: what the files say, whatever they lack."""

import json
import re

import numpy as np
import pytest
from test_report import CONFIG, HOSTILE, PAIR, PRETRAIN, RL, SUMMARY, Page, page_of, write, write_metrics

from rl_jax.preferences.diagnostics import pair_diagnostics
from rl_jax.run import reward_sections
from rl_jax.run.report_sections import headline
from rl_jax.run.results import write_results
from rl_jax.run.reward_sections import reward_section

RNG = np.random.default_rng(0)
FIRST = RNG.random((80, 3)) < 0.6
DIAGNOSTICS = pair_diagnostics(
    RNG.normal(size=(80, 2)),
    np.stack([FIRST.mean(axis=1), 1 - FIRST.mean(axis=1)], axis=1),
    RNG.random(80),
    FIRST.astype(float),
)
CURVE = [
    {"pairs": pairs, "layers": layers, "accuracy": 0.6, "low": 0.5, "high": 0.7}
    for layers in (1, 2)
    for pairs in (100, 1000)
]
MODEL = {
    "kind": "pairs",
    "members": 3,
    "train_rows": 8000,
    "held_out_rows": 600,
    "broken_rows": 2,
    "learning_curve": CURVE,
    **DIAGNOSTICS,
    "pair_accuracy": 0.772,
    "pair_accuracy_interval": [0.736, 0.803],
    "log_loss": 0.5481,
    "ece": 0.0427,
    "agreement_with_raters": 0.717,
    "agreement_among_raters": 0.774,
}
GOLD = {
    "gold": "lexicon",
    "gold_before": 0.05,
    "gold_before_interval": [0.01, 0.09],
    "gold_after": 0.31,
    "gold_after_interval": [0.28, 0.34],
    "gold_win_rate": 0.66,
    "gold_win_rate_interval": [0.62, 0.70],
}
GAINS = [
    {"stage": "rl", "step": step, "reward": 0.5, "reward_gain": proxy, "gold_gain": gold, "gold": gold / 10}
    for step, (proxy, gold) in enumerate([*[(0.0, 1.0)] * 5, *[(1.0, 3.0)] * 5, *[(2.0, 2.0)] * 5])
]
PARTED = "The proxy and the gold reward part after step 9: gold fell from 3.00 to 2.00 while the proxy rose from 1.00 "


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "config.json", CONFIG)
    write(tmp_path, "summary.json", SUMMARY | GOLD | {"reward_model": MODEL})
    write(tmp_path, "completions.json", {"pairs": [PAIR]})
    reward = [{"stage": stage, "step": step, "loss": 0.7} for stage in ("reward", "reward_2") for step in (0, 1)]
    write_metrics(tmp_path, PRETRAIN + reward + GAINS)
    return tmp_path


def test_table_says_what_the_summary_says():
    page = Page(reward_section({"reward_model": MODEL}))
    for label, cells in {
        "Pair accuracy": [["77.2%", "73.6% to 80.3%"]],
        "Log-loss": [["0.548"]],
        "Calibration error": [["0.0427"]],
        "Agreement with raters": [["71.7%"]],
        "Raters among": [["77.4%"]],
    }.items():
        assert page.cells(label) == cells
    assert "Pairs, an ensemble of 3, 8,000 learned from, 600 held out, 2 broken and left out." in page.text
    assert not [row for row in page.table if row[0].startswith(("Kendall", "Pearson", "Spearman"))]
    assert page.tags.count("svg") == 3 and "1 layer" in page.text and "2 layers" in page.text


def test_rankings_and_ratings():
    ranked = {
        "kind": "rankings",
        "kendall_tau": 0.5,
        "kendall_tau_interval": [0.4, 0.6],
        "members": 1,
        "broken_rows": 0,
    }
    page = Page(reward_section({"reward_model": ranked}))
    assert page.cells("Kendall") == [["0.500", "0.400 to 0.600"]] and "svg" not in page.tags
    assert "Rankings." in page.text and "ensemble" not in page.text and "diagonal" not in page.text
    page = Page(reward_section({"reward_model": {"kind": "ratings", "pearson": 0.5, "spearman": -0.25}}))
    assert page.cells("Pearson") == [["0.500"]] and page.cells("Spearman") == [["−0.250"]]


@pytest.mark.parametrize("about", [None, {}, [1], "x", {"kind": "pairs", "members": 3}, {"reliability": [{}, 1, None]}])
def test_nothing_where_nothing_was_measured(about):
    assert reward_section({"reward_model": about}) == "" and reward_section({}) == ""


def test_points_that_are_no_numbers_are_left_out():
    rows = [
        {"gap": 2.0, "accuracy": 0.9, "low": 0.8, "high": None},
        {"gap": 1.0, "accuracy": 0.5, "low": float("nan"), "high": 0.7},
        {"gap": 3.0, "accuracy": 0.5, "low": 0.6, "high": 0.4},
        {"gap": None, "accuracy": 0.5},
        {"gap": "3", "accuracy": 0.5},
        "row",
    ]
    points = reward_sections.read_points(rows, "gap", "accuracy")
    np.testing.assert_array_equal(points, [[1.0, 2.0, 3.0], [0.5, 0.9, 0.5], [0.5, 0.8, 0.5], [0.7, 0.9, 0.5]])
    assert len(reward_sections.read_points(None, "gap", "accuracy").up) == 0


def drawn(svg: str, colour: str) -> list[list[tuple[float, float]]]:
    """The corners of every line of a colour, in points of the page, upwards."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none;[^"]* stroke: {colour}', svg)
    return [[(float(x), -float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)] for path in paths]


def test_what_is_drawn_are_the_points_and_their_bars():
    rows = [{"gap": x, "accuracy": y, "low": y - 0.1, "high": y + 0.2} for x, y in ((0, 0.5), (1, 0.6), (3, 0.8))]
    svg = reward_section({"reward_model": {"accuracy_by_gap": rows}})
    lines = drawn(svg, "#2a6fb0")
    (line,) = [np.array(line) for line in lines if len(line) == 3]
    bars = [np.array(line) for line in lines if len(line) == 2]
    steps = np.diff(line, axis=0)
    np.testing.assert_allclose(steps[1] / steps[0], [2, 2], rtol=1e-4)  # twice as far, twice as high
    up = steps[0, 1]  # 0.1
    assert len(bars) == 3
    for bar, point in zip(bars, line, strict=True):
        np.testing.assert_allclose(sorted(bar[:, 1] - point[1]), [-up, 2 * up], rtol=1e-4)


def test_reliability_has_its_diagonal():
    rows = [{"confidence": x, "observed": x, "low": x, "high": x, "pairs": 1} for x in (0.6, 0.7, 0.9)]
    svg = reward_section({"reward_model": {"reliability": rows}})
    (line,) = [np.array(line) for line in drawn(svg, "#2a6fb0") if len(line) == 3]
    (diagonal,) = [np.array(found) for found in drawn(svg, "#5b6573")]
    slope = np.diff(diagonal, axis=0)[0]
    for point in line - diagonal[0]:
        np.testing.assert_allclose(point[1] / point[0], slope[1] / slope[0], rtol=1e-3)
    assert "On the dashed diagonal" in svg


def test_learning_curve_is_logarithmic_and_labels_its_counts():
    svg = reward_section({"reward_model": {"learning_curve": [row for row in CURVE if row["layers"] == 1]}})
    assert re.findall(r"<text[^>]*>([^<]*)</text>", svg)[:2] == ["100", "1,000"]
    close = [{"pairs": pairs, "layers": 1, "accuracy": 0.6} for pairs in (100, 101, 1000, 10000)]
    svg = reward_section({"reward_model": {"learning_curve": close}})
    assert re.findall(r"<text[^>]*>([^<]*)</text>", svg)[:3] == ["100", "1,000", "10,000"]
    (line,) = [np.array(line) for line in drawn(svg, "#2a6fb0") if len(line) == 4]
    np.testing.assert_allclose(line[3, 0] - line[2, 0], line[2, 0] - line[0, 0], rtol=1e-3)
    assert reward_section({"reward_model": {"learning_curve": [{"pairs": 0, "layers": 1, "accuracy": 0.5}]}}) == ""


def test_page_has_the_section_the_warning_and_the_gold_reward(folder):
    page = page_of(folder)
    assert page.cells("Gold reward") == [["0.050", "0.010 to 0.090"], ["0.310", "0.280 to 0.340"], ["+0.260"]]
    assert page.cells("Gold win rate") == [["–"], ["66.0%", "62.0% to 70.0%"], [""]]
    head = page.text[: page.text.index("Before and after")]
    assert f"Warning. {PARTED}" in head and "Reward model77.2%of held-out pairs" in head
    assert "The gold reward (lexicon) rose from 0.050 to 0.310; by it they win 66.0% of the pairs." in head
    assert "Reward model, round 2" in page.text and "Proxy and gold" in page.text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    css = page.source[page.source.index("<style>") : page.source.index("</style>")]
    used = {name for attribute, value in page.attributes if attribute == "class" for name in value.split()}
    assert {"warning", "judged"} <= used
    assert not [name for name in used if not re.search(rf"\.{name}\b", css)]


def test_no_warning_where_they_do_not_part(folder):
    write_metrics(folder, RL + PRETRAIN)
    assert "Warning" not in page_of(folder).text


def test_the_terminal_is_warned_too(folder, capsys):
    write_results(folder, SUMMARY | GOLD)
    told = capsys.readouterr().out
    assert f"Warning. {PARTED}" in told and "The gold reward (lexicon) rose" in told
    write_metrics(folder, RL)
    write_results(folder, SUMMARY)
    assert "Warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "gold, expected",
    [
        (
            {"gold_after": 0.0, "gold_after_interval": [-0.01, 0.005]},
            "The gold reward (lexicon) fell from 0.0500 to 0.0000;",
        ),
        (
            {"gold_after_interval": [0.05, 0.5]},
            "The gold reward (lexicon) moved from 0.050 to 0.310, with 95% intervals that overlap;",
        ),
        ({"gold_after_interval": None, "gold_win_rate": None}, "The gold reward (lexicon) moved from 0.050 to 0.310."),
    ],
)
def test_headline_claims_no_more_of_gold_than_the_intervals(gold, expected):
    assert f" of pairs with the pretrained. {expected}" in headline(SUMMARY | GOLD | gold, {})


def test_a_reward_model_alone():
    summary = {"reward_model": {"pair_accuracy": 0.772, "pair_accuracy_interval": [0.736, 0.803]}}
    told = "The reward model prefers what was preferred in 77.2% of held-out pairs (73.6% to 80.3%)."
    assert headline(summary, {"reward": [{"step": 3}]}) == told
    assert headline({}, {"reward_2": [{"step": 3}]}) == "Unfinished: the metrics reach step 3 of reward model, round 2."


def test_hostile_text_stays_text(folder):
    write(folder, "summary.json", json.loads(json.dumps(SUMMARY | GOLD | {"gold": HOSTILE})) | {"reward_model": MODEL})
    page = page_of(folder)
    assert HOSTILE in page.text
    write(folder, "summary.json", {"reward_model": MODEL | {"kind": HOSTILE, "members": HOSTILE}})
    page = page_of(folder)
    assert HOSTILE.lower() in page.text.lower() and not {"script", "img"} & set(page.tags)
