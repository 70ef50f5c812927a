"""Figures of recipes: a PNG file and what it shows in JSON, each whole or not at all."""

import json

import numpy as np
import pytest

from rl_jax.run.figures import FEW, MARKERS, PALETTE, draw_band, draw_limit, open_figure


def shown(path):
    """The axes of a figure, from the JSON beside it."""
    return json.loads(path.with_name(path.name + ".json").read_text("utf-8"))


def test_figure_is_written_with_its_bands(tmp_path):
    x, band = np.arange(3), np.array([[0.0, 1, 2], [1, 2, 3], [2, 3, 4]])
    with open_figure(tmp_path / "a.png", ["left", "right"]) as (left, right):
        draw_band(left, x, band, "one", PALETTE[0])
        draw_limit(right, 0.5, "most")
        left.legend()
    (line,) = left.get_lines()
    np.testing.assert_array_equal(line.get_ydata(), band[1])
    corners = left.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in corners} >= {(0, 0), (2, 2), (0, 2), (2, 4)}
    assert (left.get_title("left"), right.get_title("left")) == ("left", "right")
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["one"], "a band is in no legend"
    assert [text.get_text() for text in right.texts] == ["most"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.png.json"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_figure_that_fails_leaves_the_old_one(tmp_path):
    for name in ("a.png", "a.png.json"):
        (tmp_path / name).write_text("old")
    with pytest.raises(ValueError, match="halfway"), open_figure(tmp_path / "a.png", ["one"]):
        raise ValueError("halfway")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.png": "old", "a.png.json": "old"}


def test_data_has_titles_labels_and_every_mark(tmp_path):
    blue, orange = PALETTE[:2]
    with open_figure(tmp_path / "a.png", ["lines", "others"]) as (lines, others):
        draw_band(lines, np.arange(2), np.array([[0, 1], [1, 2], [2, np.pi]]), "one", blue)
        lines.plot([0, 1], [np.nan, 1 / 3], "o", color=orange, label="some")
        draw_limit(lines, 0.5, "most")
        lines.axvline(7, color=blue)
        lines.set(xlabel="updates", ylabel="nats", xticks=[0, 1000], xticklabels=[0, "1,000"])
        lines.set(yticks=[0, 1], yticklabels=["none", "all"])
        others.errorbar([1, 2], [3, 4], [[0.5, 1], [1, 2]], color=blue, label="bars", capsize=2)
        others.errorbar([5, 6], [7, 8], xerr=0.5, fmt="o", color=blue)
        others.bar([1, 2], [4, 5], color=blue, label="standing")
        others.barh([3], [6], color=blue)
        others.scatter([1], [2], color=orange)
        others.fill_between([0, 1], [0, 0], [1, 2], color=blue, label="alone")
        others.imshow(np.zeros((2, 2)))
    left, right = shown(tmp_path / "a.png")
    assert {name: left[name] for name in ("title", "x", "y")} == {"title": "lines", "x": "updates", "y": "nats"}
    assert left["y names"] == {"0": "none", "1": "all"} and "x names" not in left
    assert left["marks"] == [
        {"mark": "line", "label": "one", "colour": blue, "x": [0, 1], "y": [1, 2], "low": [0, 1], "high": [2, 3.14159]},
        {"mark": "dots", "label": "some", "colour": orange, "x": [0, 1], "y": [None, 0.333333]},
        {"mark": "level", "label": "most", "colour": "#5b6573", "y": [0.5]},
        {"mark": "level", "colour": blue, "x": [7]},
    ]
    assert right["marks"] == [
        {"mark": "line", "label": "bars", "colour": blue, "x": [1, 2], "y": [3, 4], "low": [2.5, 3], "high": [4, 6]},
        {"mark": "dots", "colour": blue, "x": [5, 6], "y": [7, 8], "low": [4.5, 5.5], "high": [5.5, 6.5]},
        {"mark": "bars", "label": "standing", "colour": blue, "x": [1, 2], "y": [4, 5]},
        {"mark": "bars", "colour": blue, "x": [6], "y": [3]},
        {"mark": "dots", "colour": orange, "x": [1], "y": [2]},
        {"mark": "band", "label": "alone", "colour": blue, "x": [0, 1], "low": [0, 0], "high": [1, 2]},
        {"mark": "other"},
    ]


def test_long_lines_are_thinned_with_their_bands(tmp_path):
    x = np.arange(4001)
    with open_figure(tmp_path / "a.png", ["one"]) as (axes,):
        draw_band(axes, x, np.stack([x - 1.0, x, x + 1.0]), "one", PALETTE[0])
    (mark,) = shown(tmp_path / "a.png")[0]["marks"]
    assert len(mark["x"]) == 250 and (mark["x"][0], mark["x"][-1]) == (0, 4000)
    assert np.all(np.isin(np.diff(mark["x"]), (16, 17))), "evenly"
    assert mark["low"] == [x - 1 for x in mark["x"]] and mark["high"] == [x + 1 for x in mark["x"]]


def test_lines_of_no_number_are_data_too(tmp_path):
    with open_figure(tmp_path / "a.png", ["one"]) as (axes,):
        draw_band(axes, np.arange(2), np.full((3, 2), np.nan), "none", PALETTE[0])
    line, band = shown(tmp_path / "a.png")[0]["marks"]
    assert line["y"] == [None, None] and band["x"] == []


@pytest.mark.parametrize("count", [FEW, FEW + 1])
def test_many_lines_have_markers_too_and_so_do_their_keys(tmp_path, count):
    with open_figure(tmp_path / "a.png", ["many", "few"]) as (many, few):
        for colour in PALETTE[:count]:
            draw_band(many, np.arange(3), np.ones((3, 3)), colour, colour, dashed=colour == PALETTE[1])
        few.plot([0, 1, 2], [0, 1, 2], color=PALETTE[0])
        few.plot([1], [1], "o", color=PALETTE[1])
        draw_limit(few, 1, "most")
        many.legend()
    markers = [line.get_marker() for line in many.get_lines()]
    assert markers == [line.get_marker() for line in many.get_legend().get_lines()]
    assert markers == ([MARKERS[colour] for colour in PALETTE[:count]] if count > FEW else ["None"] * count)
    line, dot, limit = few.get_lines()
    assert (line.get_marker(), dot.get_marker()) == (markers[0], "o") and limit.get_marker() == "None"
    if count > FEW:
        faces = [line.get_markerfacecolor() for line in many.get_lines()]
        assert faces[:3] == [PALETTE[0], "white", PALETTE[2]], "hollow where dashed"


def test_colours_and_markers_differ():
    assert len(set(PALETTE)) == len(PALETTE) == len(set(MARKERS.values())) >= 8
