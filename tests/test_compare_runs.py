"""Runs side by side: what is one entry, what is shown of it, and that the page is as safe as a report."""

import re

import numpy as np
import pytest

from experiments import comparison, comparison_page
from experiments.compare_runs import Config, main
from experiments.comparison import read_entries
from experiments.comparison_page import render
from rl_jax.errors import InputError
from rl_jax.run.curves import smooth
from tests.test_report import HOSTILE, PRETRAIN, RL, Page, write, write_metrics

SETTINGS = {"run": "a", "seed": 0, "reinforce": {"steps": 3, "estimator": "rloo"}, "machine": {"mesh": ""}}
SUMMARY = {"reward": "sentiment", "reward_before": 0.1, "reward_after": 0.6, "kl": 4.0, "win_rate": 0.75}


def make(folder, rows=RL, summary=SUMMARY, script="experiments/pipeline.py", device="cpu x 1", **settings):
    """A run; None as its summary is a run that is not finished."""
    folder.mkdir(parents=True)
    config = {"script": script, "config": SETTINGS | {"run": str(folder)} | settings, "device": device}
    write(folder, "config.json", config | {"versions": {"jax": "0.10.2"}})
    if summary is not None:
        write(folder, "summary.json", summary)
    write_metrics(folder, rows)
    return folder


def estimator(name):
    return {"steps": 3, "estimator": name}


@pytest.fixture
def folders(tmp_path):
    """Two seeds of RLOO, and a run of GRPO with its interval."""
    return [
        make(tmp_path / "rloo_seed0", seed=0),
        make(tmp_path / "rloo_seed1", seed=1, summary=SUMMARY | {"reward_after": 0.8, "kl": 5.0}),
        make(
            tmp_path / "grpo",
            summary=SUMMARY | {"reward_after": 0.55, "reward_after_interval": [0.5, 0.65], "kl": 40.0},
            reinforce=estimator("grpo"),
        ),
    ]


def names(folders, *args):
    return [entry.name for entry in read_entries(folders, *args)]


def test_the_tables_are_side_by_side(folders):
    page = Page(render(read_entries(folders)))
    assert page.table[0] == ["Measure|", "rloo|", "grpo|"]
    assert page.cells("Reward") == [
        ["0.100\u00a0→\u00a0", "0.700", "0.600 to 0.800"],
        ["0.100\u00a0→\u00a0", "0.550", "0.500 to 0.650"],
    ]
    assert page.cells("Exact KL") == [["4.5", "4.0 to 5.0"], ["40.0"]]  # to the same decimals
    assert page.cells("Win rate") == [["75.0%"], ["75.0%"]]
    assert page.cells("reinforce.estimator") == [["rloo"], ["grpo"]]
    differing = page.table[page.table.index(["Setting|", "rloo|", "grpo|"]) + 1 :]
    assert [row[0] for row in differing] == ["seed|", "reinforce.estimator|"]
    assert page.cells("seed") == [["0, 1"], ["0"]]
    head = page.text[: page.text.index("Before and after")]
    assert "Comparison of 3 runs · experiments/pipeline.py" in head and "rloo 2 runs; seed 0, 1grpo" in head


def test_the_terminal_says_what_the_page_says(folders, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    main(Config(tuple(folders), out))
    said = capsys.readouterr().out
    assert re.findall(r"\| rloo +\| +2 \| (.*?) +\| (.*?) +\|", said) == [
        ("0.100 → 0.700 (0.600 to 0.800)", "4.5 (4.0 to 5.0)")
    ]
    assert re.findall(r"\| run +\| runs \| reward +\| exact KL +\| win rate +\|", said)
    assert f"The comparison is {out}." in said
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert "runs" not in comparison.short_table(read_entries(folders, ()))[0]


@pytest.mark.parametrize(
    "other, together",
    [
        ({"seed": 7}, True),
        ({"seed": 7, "machine": {"mesh": "data=2"}, "resume": True, "track": "wandb"}, True),
        ({"seed": 7, "device": "gpu x 8"}, True),
        ({}, False),
        ({"device": "gpu x 8"}, False),
        ({"reinforce": estimator("ppo")}, False),
        ({"seed": 7, "seeds": 1}, False),
        ({"script": "experiments/reinforce.py"}, False),
    ],
)
def test_runs_that_differ_in_the_seed_alone_are_one(tmp_path, other, together):
    folders = [make(tmp_path / "a_0"), make(tmp_path / "a_1", **other)]
    assert names(folders) == (["a"] if together else ["a_0", "a_1"])


@pytest.mark.parametrize(
    "pooled, expected",
    [
        ((), ["rloo_seed0", "rloo_seed1", "grpo"]),
        (("seed", "reinforce.estimator"), ["rloo_seed0 and 2 more"]),
        (("seed", "reinforce"), ["rloo_seed0 and 2 more"]),
        (("reinforce",), ["rloo_seed0 and 1 more", "rloo_seed1"]),
    ],
)
def test_what_is_pooled_can_be_said(folders, pooled, expected):
    assert names(folders, pooled) == expected


def test_names_tell_entries_apart(tmp_path):
    same = [make(tmp_path / "a" / "rl"), make(tmp_path / "b" / "rl", reinforce=estimator("ppo"))]
    assert names(same) == ["a/rl", "b/rl"]
    runs = [make(tmp_path / f"run-{n}", seed=n, reinforce=estimator("ppo" if n > 1 else "rloo")) for n in range(4)]
    assert names(runs) == ["run-0 and 1 more", "run-2 and 1 more"]
    assert names(runs[:3]) == ["run", "run-2"]
    assert names([*runs[:2], make(tmp_path / "run", reinforce=estimator("grpo"))]) == ["run-0 and 1 more", "run"]


def test_where_runs_ran_is_shown_where_it_differs(tmp_path):
    folders = [make(tmp_path / "a"), make(tmp_path / "b", device="gpu x 8", extra=1, reinforce=estimator("ppo"))]
    assert comparison.differences(read_entries(folders)) == {
        "reinforce.estimator": ["rloo", "ppo"],
        "device": ["cpu x 1", "gpu x 8"],
        "extra": ["–", "1"],
    }


def test_what_all_have_stands_before_what_only_some_have(tmp_path):
    folders = [make(tmp_path / "a", aside=1), make(tmp_path / "b", device="gpu x 8")]
    assert list(comparison.differences(read_entries(folders)).items()) == [
        ("device", ["cpu x 1", "gpu x 8"]),
        ("aside", ["1", "–"]),
    ]


def test_what_is_pooled_of_summaries():
    first = {"kl": 1.0, "kl_interval": [0.5, 1.5], "reward": "a", "same": "x", "part": {"n": 1}, "odd": 1.0}
    second = {"kl": 3.0, "kl_interval": [0.5, 1.5], "reward": "b", "same": "x", "part": {"n": 3}, "odd": None}
    assert comparison.pooled_summary([first, second]) == {
        "kl": 2.0,
        "kl_interval": [1.0, 3.0],
        "same": "x",
        "part": {"n": 2.0, "n_interval": [1, 3]},
    }
    assert comparison.pooled_summary([first]) is first


def test_a_band_is_over_the_steps_that_all_runs_have():
    lines = [
        (np.array([0, 1, 2, 3]), np.array([0.0, 1.0, np.nan, 3.0])),
        (np.array([1, 2, 3, 4]), np.array([5.0, 6.0, 7.0, 8.0])),
    ]
    steps, values = comparison_page.band("reward", lines)
    np.testing.assert_array_equal(steps, [1, 3])
    np.testing.assert_array_equal(values, [[1.0, 3.0], [3.0, 5.0], [5.0, 7.0]])
    long = (np.arange(60), np.random.default_rng(0).normal(size=60))
    np.testing.assert_array_equal(comparison_page.band("reward", [long])[1][1], smooth(long[1], 3))
    np.testing.assert_array_equal(comparison_page.band("learning_rate", [long])[1][1], long[1])


def test_a_figure_has_a_line_for_each_entry_and_a_band_for_pooled_ones(folders):
    source = render(read_entries(folders))
    reward = source[source.index("<strong>Reward</strong>") : source.index("<strong>Reward over KL</strong>")]
    assert len(re.findall(r"fill: none; stroke: #2a6fb0", reward)) == 1
    assert len(re.findall(r"fill: none; stroke: #d9822b", reward)) == 1
    assert len(re.findall(r"fill: #2a6fb0; fill-opacity: 0\.15", reward)) == 1


def titles(folders, *args):
    return re.findall(r"<figcaption><strong>([^<]*)</strong>", render(read_entries(folders, *args)))


def test_metrics_that_two_entries_have_are_drawn(tmp_path):
    rows = [[{"stage": "rl", "step": step, "reward": 0.1 * step, "clipped": 0.0} for step in range(3)] for _ in "abc"]
    for row in rows[0]:
        row |= {"entropy": 1.0, "length": 5.0, "clipped": 0.1 * row["step"]}
    for row in rows[1]:
        row |= {"length": 6.0, "kl": None}
    a, b, c = (make(tmp_path / name, each, reinforce=estimator(name)) for name, each in zip("abc", rows, strict=True))
    assert titles([a, b, c]) == ["Reward", "Completion length", "Lost signal, clipped"]
    assert titles([b, c]) == ["Reward"]  # what never moved in either is not drawn
    assert titles([a, b], ("seed", "reinforce")) == ["Reward", "Entropy", "Completion length", "Lost signal, clipped"]
    both = [make(tmp_path / f"{name}_both", PRETRAIN + RL, reinforce=estimator(name)) for name in ("reinforce", "rloo")]
    assert titles(both) == [
        *("Loss, training", "Gradient norm", "Learning rate", "Reward", "Reward over KL", "KL, exact"),
    ]


def test_runs_that_are_not_finished_have_lines_and_no_numbers(tmp_path):
    folders = [make(tmp_path / "a"), make(tmp_path / "b", RL[:2], summary=None, reinforce=estimator("ppo"))]
    page = Page(render(read_entries(folders)))
    assert page.cells("Reward")[1] == ["–"] and "highest mean reward" not in page.text
    folders = [make(tmp_path / f"{n}", summary=None, reinforce=estimator(n)) for n in "cd"]
    page = Page(render(read_entries(folders)))
    assert "Before and after" not in page.text and page.tags.count("svg") == 3


@pytest.mark.parametrize(
    "other, expected",
    [
        (
            {"reward_after": 0.7, "kl": 3.0},
            "b has the highest mean reward after tuning, 0.700 at an exact KL of 3.00 nats a completion; next is a "
            "with 0.600.",
        ),
        (
            {"reward_after": 0.55, "reward_after_interval": [0.5, 0.6], "kl": 3.0},
            "a has the highest mean reward after tuning, 0.600 at an exact KL of 4.00 nats a completion; next is b "
            "with 0.550, and their ranges overlap.",
        ),
        (
            {"reward_after": 0.4, "reward_after_interval": [0.3, 0.5]},
            "a has the highest mean reward after tuning, 0.600 at an exact KL of 4.00 nats a completion; next is b "
            "with 0.400.",
        ),
        ({"reward_after": 0.7, "reward": "keyword"}, ""),
        ({"reward_after": None}, ""),
    ],
)
def test_headline_says_which_is_highest_and_no_more(tmp_path, other, expected):
    first = SUMMARY | {"reward_after_interval": [0.58, 0.62]}
    folders = [
        make(tmp_path / "a", summary=first),
        make(tmp_path / "b", summary=SUMMARY | other, reinforce=estimator("ppo")),
    ]
    assert comparison_page.headline(read_entries(folders)) == expected


def test_what_cannot_be_compared_is_refused(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    other = make(tmp_path / "other", PRETRAIN, reinforce=estimator("none"))
    many = [make(tmp_path / f"many{n}", steps=n) for n in range(comparison_page.MOST + 1)]
    for given, pooled, message in (
        ([folders[0], tmp_path / "empty"], (), "empty is not the folder of a run"),
        ([folders[0], tmp_path / "missing"], (), "missing is not the folder of a run"),
        ([*folders, tmp_path / "empty" / ".." / "grpo"], (), "grpo is given twice"),
        (folders[:1], (), "at least two runs"),
        ((), (), "at least two runs"),
        (folders, ("seed", "sed"), "No run has a setting sed to pool"),
        ([folders[0], other], (), "share no metrics"),
        (many, (), "These are 17 different runs, and 16 can be told apart"),
    ):
        with pytest.raises(InputError, match=message):
            main(Config(tuple(given), tmp_path / "page.html", tuple(pooled)))
    assert not (tmp_path / "page.html").exists()


def test_entries_have_a_look_of_their_own_and_every_class_a_style(tmp_path):
    folders = [make(tmp_path / f"{n}", steps=n) for n in range(9)]
    page = Page(render(read_entries(folders)))
    keys = re.findall(r'<p class="entries">(.*?)</p>', page.source)[0]
    looks = re.findall(r'class="key (\w+)" style="--colour:(#\w+)"', keys)
    assert len(set(looks)) == 9 and [look for look, _ in looks].count("dashed") == 1
    assert page.text.strip().startswith("0, 1, 2, 3 and 5 more")
    css = page.source[page.source.index("<style>") : page.source.index("</style>")]
    used = {name for attribute, value in page.attributes if attribute == "class" for name in value.split()}
    assert not [name for name in used - {"solid"} if not re.search(rf"\.{name}\b", css)]


def test_the_page_is_safe_and_whole(tmp_path):
    hostile = HOSTILE.replace("/", "")
    folders = [
        make(tmp_path / hostile / "1", script=HOSTILE, device=HOSTILE, **{HOSTILE: HOSTILE}),
        make(tmp_path / f"{hostile}2", PRETRAIN + RL, **{HOSTILE: 0}),
        make(tmp_path / f"{hostile}3", PRETRAIN + RL, **{HOSTILE: 0}, seed=HOSTILE),
    ]
    page = Page(render(read_entries(folders)))
    allowed = "html head meta title style body main header p h1 h2 h3 div small section table thead tbody"
    allowed += " tr th td strong span figure figcaption svg g defs path use text rect clippath"
    assert set(page.tags) <= set(allowed.split())
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "action", "data")]
    assert not re.search(r"https?:|@import|javascript:|url\((?!#)", page.source.replace(HOSTILE, ""))
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.source
    assert page.text.count(HOSTILE) == 2 + 3 + 2  # script and legend; seed, script, device; a setting and its value
    assert page.text.count(hostile) > 4
    ids = [value for name, value in page.attributes if name == "id"]
    uses = [value[1:] for name, value in page.attributes if name.endswith("href")]
    assert ids and len(ids) == len(set(ids)) and set(uses) <= set(ids)
