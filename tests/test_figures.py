"""Figures of recipes: a PNG file, whole or not at all."""

import numpy as np
import pytest

from rl_jax.run.figures import PALETTE, draw_band, draw_limit, open_figure


def test_figure_is_written_with_its_bands(tmp_path):
    x, band = np.arange(3), np.array([[0.0, 1, 2], [1, 2, 3], [2, 3, 4]])
    with open_figure(tmp_path / "a.png", ["left", "right"]) as (left, right):
        draw_band(left, x, band, "one", PALETTE[0])
        draw_limit(right, 0.5, "most")
    (line,) = left.get_lines()
    np.testing.assert_array_equal(line.get_ydata(), band[1])
    corners = left.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in corners} >= {(0, 0), (2, 2), (0, 2), (2, 4)}
    assert (left.get_title("left"), right.get_title("left")) == ("left", "right")
    assert [text.get_text() for text in right.texts] == ["most"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_figure_that_fails_leaves_the_old_one(tmp_path):
    (tmp_path / "a.png").write_text("old")
    with pytest.raises(ValueError, match="halfway"), open_figure(tmp_path / "a.png", ["one"]):
        raise ValueError("halfway")
    assert (tmp_path / "a.png").read_text() == "old"


def test_colours_differ():
    assert len(set(PALETTE)) == len(PALETTE) >= 8
