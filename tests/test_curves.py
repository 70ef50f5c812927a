"""Curves: what is averaged, what is kept, and what ends up in the page."""

import re

import numpy as np
import pytest

from rl_jax.run import curves

NAN = float("nan")


def rows(count: int, **metrics: float | None) -> list[dict]:
    return [{"step": step, **metrics} for step in range(count)]


@pytest.mark.parametrize(
    "value, expected",
    [(2, 2.0), (-0.5, -0.5), (None, None), ("2", None), (NAN, None), (float("inf"), None), ([1.0], None)],
)
def test_finite(value, expected):
    assert curves.finite(value) == expected


def test_smooth_averages_what_is_known():
    values = np.array([1.0, 2.0, 6.0, NAN, 10.0])
    np.testing.assert_allclose(curves.smooth(values, 3), [1.5, 3.0, 4.0, 8.0, 10.0])
    np.testing.assert_array_equal(curves.smooth(values, 1), values)
    gap = np.array([1.0, NAN, NAN, NAN, 5.0])
    np.testing.assert_array_equal(curves.smooth(gap, 3), [1.0, 1.0, NAN, 5.0, 5.0])


def test_thin_keeps_each_bins_extremes():
    values = np.array([0.0, 9.0, 1.0, 2.0, 5.0, 5.0, -7.0, 5.0])  # bins [0, 9, 1, 2] and [5, 5, -7, 5]
    np.testing.assert_array_equal(curves.thin(values, bins=2), [0, 1, 4, 6])
    np.testing.assert_array_equal(curves.thin(values, bins=4), np.arange(8))
    lost = np.array([NAN, NAN, NAN, 3.0, NAN, 4.0])
    np.testing.assert_array_equal(curves.thin(lost, bins=2), [0, 3, 5])


def test_thin_bounds_a_long_run_and_keeps_its_spike():
    values = np.zeros(50_000)
    values[31_234] = 1e6
    kept = curves.thin(values)
    assert len(kept) <= 600 and 31_234 in kept and (np.diff(kept) > 0).all()


@pytest.mark.parametrize(
    "metrics, figures",
    [
        ({"pretrain": rows(3, loss=1.0, grad_norm=1.0, learning_rate=0.1)}, 3),
        ({"pretrain": rows(3, loss=1.0, held_out_loss=1.1)}, 1),
        ({"rl": rows(1, reward=0.5)}, 1),
        ({"pretrain": rows(2, loss=1.0), "rl": rows(2, reward=0.5, kl=0.1)}, 3),
        ({"rl": rows(3, reward=None)}, 0),
        ({"rl": []}, 0),
        ({"another": rows(3, reward=0.5)}, 0),
        ({}, 0),
    ],
)
def test_one_figure_for_each_panel_that_has_a_number(metrics, figures):
    page = curves.curves(metrics)
    assert page.count("<svg ") == page.count("</svg>") == page.count("<figure>") == figures
    assert bool(page) == bool(figures)


def test_every_panel_has_a_figure():
    for stage, panels in curves.PANELS.items():
        names = {name: 1.0 for panel in panels for name in panel.series}
        assert curves.curves({stage: rows(2, **names)}).count("<svg ") == len(panels)


def test_values_that_are_not_finite_are_counted():
    metrics = {"rl": [*rows(3, reward=0.5), {"step": 3, "reward": None}, {"step": 4, "reward": NAN}, {"step": 5}]}
    assert "2 not finite" in curves.curves(metrics)
    assert "not finite" not in curves.curves({"rl": rows(3, reward=0.5)})


def drawn_lines(count: int, name: str) -> int:
    noise = np.random.default_rng(0).normal(size=count)
    svg = curves.draw({name: (np.arange(count), noise)}, "unit", "x")
    return len(re.findall(r'<path d="[^"]*"[^>]*style="fill: none; stroke: #2a6fb0', svg))


def test_long_noisy_series_are_drawn_twice_and_short_or_exact_ones_once():
    assert drawn_lines(39, "reward") == 1
    assert drawn_lines(40, "reward") == 2
    assert drawn_lines(40, "learning_rate") == 1


def test_figures_are_reproducible_and_share_no_id():
    series = {"reward": (np.arange(5), np.arange(5.0))}
    first, again, other = (curves.draw(series, "unit", prefix) for prefix in ("a", "a", "b"))
    ids = [set(re.findall(r'\bid="([^"]*)"', svg)) for svg in (first, other)]
    assert first == again
    assert ids[0] and not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', first)) <= ids[0]
