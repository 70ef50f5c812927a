"""Points per doubling where they are known, what is trained and measured, and the recipe in miniature."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.recipes import reward_scaling as recipe
from rl_jax.errors import InputError

PAIRS, WIDTHS = (250, 500, 1000), (8, 16)
SIZES = np.array([100, 400])
# 50 % + 3 points per doubling of the pairs + 1 of the parameters, whose second is two doublings away; four seeds.
GRID = 50 + 3.0 * np.arange(3)[None, :, None] + 2.0 * np.arange(2)[:, None, None]
ACCURACY = GRID + np.array([-1.0, 0.0, 0.0, 1.0])[None, None, :]


def test_points_per_doubling_of_a_line_and_of_a_parabola():
    line = np.array([55.0, 58.0, 61.0, 64.0])[:, None] + np.array([-1.0, 2.0])[None, :]
    slope, bend = recipe.per_doubling((500, 1000, 2000, 4000), line)
    assert slope == pytest.approx((3, 3, 3)) and bend == pytest.approx((0, 0, 0), abs=1e-9)
    falling = np.cumsum([55.0, 4.0, 3.0, 2.0])[:, None].repeat(2, axis=1)  # each doubling brings one point less
    slope, bend = recipe.per_doubling((500, 1000, 2000, 4000), falling)
    assert slope.value == pytest.approx(3) and bend.value == pytest.approx(-1)
    apart = np.stack([line[:, 0], 2 * line[:, 0]], axis=1)  # slopes of 3 and 6, whose interval is Student's of two
    slope, _ = recipe.per_doubling((500, 1000, 2000, 4000), apart)
    assert slope == pytest.approx((4.5, 4.5 - 12.706 * 1.5, 4.5 + 12.706 * 1.5), abs=1e-3)
    assert recipe.per_doubling((100, 400), line[:2])[0].value == pytest.approx(1.5)  # two doublings apart
    assert recipe.per_doubling((100, 400), line[:2])[1] is None


def test_table_has_a_row_for_each_width_and_what_size_brings_below():
    rows = recipe.table_rows(PAIRS, WIDTHS, SIZES, ACCURACY)
    assert [row["width"] for row in rows] == ["8", "16", "all", recipe.DOUBLING, recipe.BEND]
    assert [rows[0]["parameters"], rows[1]["parameters"]] == [100, 400]
    assert [rows[1][f"{n:,} pairs"].value for n in PAIRS] == [52, 55, 58] and rows[1]["all"].value == 55
    assert rows[2]["1,000 pairs"].value == 57 and rows[2]["all"].value == 54
    for row in rows[:3]:
        assert row[recipe.DOUBLING].value == pytest.approx(3) and row[recipe.BEND].value == pytest.approx(0, abs=1e-9)
    names = [*(f"{n:,} pairs" for n in PAIRS), "all"]
    assert [rows[3][name].value for name in names] == pytest.approx([1, 1, 1, 1])
    assert [rows[4][name] for name in names] == [None] * 4
    assert rows[0]["250 pairs"].high - 50 == pytest.approx(3.182 * np.std([-1, 0, 0, 1], ddof=1) / 2, abs=1e-3)


@pytest.fixture
def measured(monkeypatch):
    """Accuracies of proxies that are said to be trained, and what for."""
    calls = []

    def train_proxies(settings, world, width, lines):
        calls.append((settings, world, width, lines))
        shares = [ACCURACY[WIDTHS.index(width), PAIRS.index(line.pairs)] / 100 for line in lines]
        return recipe.over.Proxies([], [], shares)

    monkeypatch.setattr(recipe.over, "make_world", lambda settings: ("world", settings))
    monkeypatch.setattr(recipe.over, "train_proxies", train_proxies)
    return calls


def test_recipe_in_miniature(tmp_path, measured):
    config = recipe.Config(pairs=PAIRS, widths=WIDTHS, noise=0.25, held_out_pairs=48, seed=3, results=tmp_path)
    recipe.main(config)
    for (settings, world, width, lines), expected in zip(measured, WIDTHS, strict=True):
        assert width == expected and world == ("world", settings)
        assert [(line.width, line.pairs, line.combination) for line in lines] == [(width, n, "single") for n in PAIRS]
        assert (settings.pairs, settings.noise, settings.held_out_pairs, settings.seed) == (PAIRS, 0.25, 48, 3)
        assert (settings.seeds, settings.learning) == (config.seeds, config.learning)
    rows = json.loads((tmp_path / "table.json").read_text("utf-8"))
    assert rows[1]["500 pairs"]["value"] == pytest.approx(55) and rows[0][recipe.DOUBLING]["value"] == pytest.approx(3)
    # Two blocks: four matrices of attention and three of the MLP, and the norms; and the last norm.
    width, hidden = 8, 32
    assert rows[0]["parameters"] == 2 * (4 * width**2 + 3 * width * hidden + 2 * width) + width
    written = json.loads((tmp_path / "accuracy.json").read_text("utf-8"))
    np.testing.assert_allclose(written["accuracy"], ACCURACY)
    assert (tmp_path / "reward_scaling.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "settings.json").read_text("utf-8"))["settings"]["seed"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": (500,)}, "at least two, in rising order"),
        ({"pairs": (1000, 500)}, "pairs are"),
        ({"widths": (8, 8)}, "widths are"),
        ({"seeds": 1}, "seeds is 1"),
        ({"pairs": (0, 500)}, "pairs"),
        ({"held_out_pairs": 0}, "held_out_pairs is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        recipe.main(dataclasses.replace(recipe.Config(results=tmp_path / "there"), **changes))
    assert not (tmp_path / "there").exists()
