"""Curves: what is averaged, what is kept, and what ends up in the page."""

import itertools
import re

import numpy as np
import pytest

from rl_jax.run import curves, run_files

NAN = float("nan")


def rows(count: int, **metrics: float | None) -> list[dict]:
    return [{"step": step, **metrics} for step in range(count)]


@pytest.mark.parametrize(
    "value, expected",
    [(2, 2.0), (-0.5, -0.5), (None, None), ("2", None), (NAN, None), (float("inf"), None), ([1.0], None)],
)
def test_finite(value, expected):
    assert run_files.finite(value) == expected


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
        ({"rl": rows(2, kl=0.1, kl_k1=0.2, ratio_min=0.5, ratio_max=2.0, truncated=0.5, zero_signal_groups=0.5)}, 3),
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


def test_every_panel_has_a_figure_with_a_colour_and_a_label_for_each_metric():
    for stage, panels in curves.PANELS.items():
        names = {name for panel in panels for name in panel.series}
        metrics = {stage: [{"step": step} | dict.fromkeys(names, step + 2.0) for step in range(2)]}
        assert curves.curves(metrics).count("<svg ") == len(panels)
        assert len(names) == sum(len(panel.series) for panel in panels)
        for panel in panels:
            assert len(panel.series) <= len(curves.COLOURS)
            assert len(panel.series) == 1 or all(panel.series.values())


@pytest.mark.parametrize(
    "name, values, expected",
    [
        ("clipped", [0.0, 0.0], 0.0),
        ("clipped", [0.0, 1e-5], None),
        ("clipped", [0.5, 0.5], None),
        ("ratio_max", [1.0 + 2e-6, 1.0009], 1.0),
        ("ratio_max", [1.0, 1.002], None),
        ("ratio_min", [1.0, 0.998], None),
        ("effective_sample_size", [0.9999, 1.0], 1.0),
        ("effective_sample_size", [0.125, 0.125], None),  # one completion of eight counts: no rest
        ("kl_coefficient", [0.05, 0.05], 0.05),
        ("kl_coefficient", [0.05, 0.0501], None),
        ("kl_coefficient", [0.0, 0.0], 0.0),
        ("ratio_max", [1.0, NAN], None),
        ("ratio_max", [], None),
        ("truncated", [0.0, 0.0], None),
        ("rounds", [1.0, 1.0], None),
    ],
)
def test_the_value_that_a_metric_never_left(name, values, expected):
    assert curves.resting_value(name, np.array(values)) == expected


def test_metrics_at_rest_are_named_and_not_drawn():
    on_policy = {
        "reward": 0.5,
        "clipped": 0.0,
        "ratio_min": 1.0 - 1e-6,
        "ratio_max": 1.0 + 1e-6,
        "kl_coefficient": 0.05,
    }
    page = curves.curves({"rl": rows(3, **on_policy)})
    assert page.count("<svg ") == 1
    assert "because they never moved: clipped 0, ratio_max 1, ratio_min 1, kl_coefficient 0.05." in page
    page = curves.curves({"rl": rows(3, **on_policy | {"ratio_max": 1.5, "truncated": 0.5})})
    assert page.count("<svg ") == 3 and "highest" in page and "lowest" not in page and ">clipped<" not in page
    assert "never moved" not in curves.curves({"rl": rows(3, reward=0.5)})
    assert curves.curves({"rl": rows(3, clipped=0.0)}) == ""


def test_rows_without_a_metric_are_absent_from_its_line():
    sparse = [{"step": step, "reward": 0.5} | ({"grad_snr": 2.0 - step} if step % 4 == 0 else {}) for step in range(9)]
    page = curves.curves({"rl": sparse})
    assert page.count("<svg ") == 2 and "not finite" not in page
    steps, values = curves.read_line(sparse, "grad_snr")
    assert steps.tolist() == [0, 4, 8] and values.tolist() == [2.0, -2.0, -6.0]
    sparse[4]["critical_batch_size"] = None  # measured, and no signal was found
    assert "without a signal" not in curves.curves({"rl": sparse})
    sparse[8]["critical_batch_size"] = 3.0
    assert "1 without a signal" in curves.curves({"rl": sparse})


def test_values_that_are_not_finite_are_counted():
    metrics = {"rl": [*rows(3, reward=0.5), {"step": 3, "reward": None}, {"step": 4, "reward": NAN}, {"step": 5}]}
    assert "2 not finite" in curves.curves(metrics)
    assert "not finite" not in curves.curves({"rl": rows(3, reward=0.5)})


def ticks(values: list[float], log: bool = True) -> list[str]:
    """Labels of the vertical axis."""
    svg = curves.draw({"ratio_max": (np.arange(len(values)), np.array(values))}, "unit", "x", log)
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", svg[svg.index('id="x-ytick_1"') :])[:-1]
    assert len(labels) == len(re.findall(r'id="x-ytick_\d+"', svg))
    return labels


def test_a_logarithmic_axis_where_values_span_a_factor_of_ten():
    assert ticks([0.01, 100.0]) == ["0.01", "0.1", "1", "10", "100"]
    assert {"0.5", "1", "2", "5", "10"} <= set(ticks([0.5, 11.0]))
    assert "0" in ticks([0.01, 100.0], log=False)
    assert ticks([1.0, 5.0]) == ticks([1.0, 5.0], log=False)
    for values in ([0.0, 0.0], [0.0, 1.0, 5.0]):
        assert ticks(values) == ticks(values, log=False)
    ratios = {"ratio_min": 0.001, "ratio_max": 100.0}
    assert ">0.01<" in curves.curves({"rl": rows(2, **ratios)})


def test_a_ratio_that_underflowed_is_drawn_down_to_the_foot_of_the_axis():
    svg = curves.draw({"ratio_min": (np.arange(3), np.array([1.0, 0.0, 100.0]))}, "unit", "x", log=True)
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: #2a6fb0', svg)
    heights = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)]  # downwards
    assert heights[1] == max(heights) > heights[0] > heights[-1]


# How people see who lack one kind of cone (Machado 2009, severity 1): linear RGB -> linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protan": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "deutan": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "tritan": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour: str, blindness: np.ndarray) -> np.ndarray:
    """CIE L*, a*, b* of "#rrggbb" as it is seen."""
    channels = np.array([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    white = XYZ.sum(axis=1)
    x, y, z = np.cbrt(XYZ @ np.clip(blindness @ linear, 0, 1) / white)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_are_told_apart(blindness):
    for first, second in itertools.combinations(curves.COLOURS, 2):
        difference = lab(first, BLINDNESS[blindness]) - lab(second, BLINDNESS[blindness])
        assert np.linalg.norm(difference) > 35  # 2.3 is the least that is seen side by side
        assert blindness != "none" or abs(difference[0]) > 12  # in print without colour


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


@pytest.mark.parametrize(
    "stage, title",
    [
        ("pretrain", "Pretraining"),
        ("finetune", "Supervised fine-tuning"),
        ("reward", "Reward model"),
        ("reward_2", "Reward model, round 2"),
        ("rl_13", "Reinforcement learning, round 13"),
        ("reward_0", "Reward_0"),
        ("reward_x", "Reward_x"),
        ("other_2", "Other_2"),
        ("other", "Other"),
    ],
)
def test_titles_of_stages_and_rounds(stage, title):
    assert curves.stage_title(stage) == title


def test_stages_stand_in_the_order_of_the_work():
    stages = ("rl", "reward_10", "reward_2", "another", "reward", "finetune", "pretrain")
    page = curves.curves({stage: rows(2, loss=1.0, reward=0.5) for stage in stages})
    assert re.findall(r"<h3>([^<]*)</h3>", page) == [
        "Pretraining",
        "Supervised fine-tuning",
        "Reward model",
        "Reward model, round 2",
        "Reward model, round 10",
        "Reinforcement learning",
    ]
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_proxy_and_gold_stand_beside_the_reward():
    page = curves.curves({"rl": rows(2, reward=0.5, gold=0.4, gold_gain=1.0, reward_gain=2.0, kl=0.1)})
    assert re.findall(r"<strong>([^<]*)</strong>", page) == ["Reward", "Proxy and gold", "Gold reward", "KL"]
    assert ">proxy</span>" in page and ">gold</span>" in page
    assert page.count('class="key"') == 3  # and that of the exact KL: a line alone needs none


def test_the_spread_of_one_member_is_not_drawn():
    assert "spread 0." in curves.curves({"reward": rows(2, loss=1.0, spread=0.0)})
    assert curves.curves({"reward": rows(2, loss=1.0, spread=0.1)}).count("<svg ") == 2
