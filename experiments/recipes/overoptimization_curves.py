"""Gold and proxy reward over d = sqrt(KL): the curve of best of n, Gao's forms, the table's rows, and the figures.

Letters: S seeds, n points of a curve, K members of a proxy, N prompts, G completions of each, B = N * G.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import numpy as np

from rl_jax.best_of_n import best_of_n_kl_bound, best_of_n_weights
from rl_jax.evaluation import Estimate, mean_interval
from rl_jax.rewards.learned import Combination
from rl_jax.run.figures import GREY, PALETTE, band_of, draw_band, open_figure

BEST_OF_N, RL = "best of n", "RL"
GRID = 40  # points at which the seeds of a curve are brought together, to be drawn
DISTANCE = "d = √KL, nats$^{1/2}$"

Form = Callable[[np.ndarray], np.ndarray]
"""Distances d [n] -> what a and b are multiplied by, [n, 2]; or a alone, [n, 1]."""


class Line(NamedTuple):
    """What is optimised, and at what price.

    Attributes:
        width: of the proxy.
        pairs: that it has learned from.
        kl_coefficient: price of a nat in RL.
        combination: what is made of its members; "single" where there is one.
    """

    width: int
    pairs: int
    kl_coefficient: float = 0.0
    combination: str = "single"


class Curve(NamedTuple):
    """What came of optimising the proxies of a line.

    Attributes:
        method: best of n, or RL.
        line: whose proxies.
        accuracy: of these on held-out pairs. [S].
        d: square root of the KL from the reference, nats^(1/2). [S, n].
        gold: [S, n].
        proxy: [S, n].
        examples: completions of the last policy of the first seed.
    """

    method: str
    line: Line
    accuracy: np.ndarray
    d: np.ndarray
    gold: np.ndarray
    proxy: np.ndarray
    examples: tuple[str, ...] = ()


class HeldOut(NamedTuple):
    """Root mean square errors on points that were not fitted, reward units: of Gao's form, and of a line through 0."""

    form: float
    line: float


def best_of_n_form(d: np.ndarray) -> np.ndarray:
    """R_bon(d) = d (a - b d)."""
    return np.stack([d, -(d**2)], axis=1)


def rl_form(d: np.ndarray) -> np.ndarray:
    """R_RL(d) = d (a - b log d), 0 at d = 0."""
    return np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))], axis=1)


def line_form(d: np.ndarray) -> np.ndarray:
    """R(d) = a d."""
    return d[:, None]


FORMS: dict[str, Form] = {BEST_OF_N: best_of_n_form, RL: rl_form}


def fit(form: Form, d: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Least squares: a and b, or a alone. [n], [n]."""
    chex.assert_rank([d, rewards], 1)
    chex.assert_equal_shape([d, rewards])
    return np.linalg.lstsq(form(d), rewards, rcond=None)[0]


def held_out(form: Form, d: np.ndarray, rewards: np.ndarray, fitted: np.ndarray) -> HeldOut:
    """Errors of the form, and of a line, at the points [n] that are not `fitted`."""
    chex.assert_equal_shape([d, rewards, fitted])

    def error(form: Form) -> float:
        predicted = form(d[~fitted]) @ fit(form, d[fitted], rewards[fitted])
        return float(np.sqrt(np.mean((predicted - rewards[~fitted]) ** 2)))

    return HeldOut(error(form), error(line_form))


def beyond(form: Form, d: np.ndarray, rewards: np.ndarray, share: float) -> HeldOut:
    """`held_out` where d up to a share of the largest one has been fitted. [S, n] each."""
    d, rewards = d.ravel(), rewards.ravel()
    return held_out(form, d, rewards, d <= share * d.max())


def other_seeds(form: Form, d: np.ndarray, rewards: np.ndarray) -> HeldOut:
    """`held_out` where all seeds but one have been fitted, over each in turn. [S, n] each."""
    seeds = np.broadcast_to(np.arange(len(d))[:, None], d.shape)
    errors = [held_out(form, d.ravel(), rewards.ravel(), (seeds != seed).ravel()) for seed in range(len(d))]
    return HeldOut(*np.sqrt(np.mean(np.square(errors), axis=0)).tolist())


def best_of_n_curve(
    line: Line, accuracy: np.ndarray, rewards: np.ndarray, gold: np.ndarray, combine: Combination, samples: int
) -> Curve:
    """The best of 1, 2, 4, ... of G completions by a proxy; d is from log n - (n - 1) / n.

    Args:
        line: whose proxies.
        accuracy: of these. [S].
        rewards: of the pool, by each member. [S, K, B].
        gold: of the pool. [B].
        combine: the members' rewards to one.
        samples: G.
    """
    combined = [np.asarray(combine(each), np.float64).reshape(-1, samples) for each in rewards]
    numbers = 2 ** np.arange(samples.bit_length())
    gold = gold.reshape(-1, samples)
    found = np.zeros((2, len(rewards), len(numbers)))
    for seed, proxy in enumerate(combined):
        for place, n in enumerate(numbers):
            weights = best_of_n_weights(proxy, int(n))
            found[:, seed, place] = [np.mean(np.sum(weights * values, axis=1)) for values in (gold, proxy)]
    d = np.broadcast_to(np.sqrt(best_of_n_kl_bound(numbers)), found.shape[1:])
    return Curve(BEST_OF_N, line, accuracy, d, gold=found[0], proxy=found[1])


def lead(curve: Curve, other: Curve) -> Estimate:
    """By how much gold is above another curve's at the same d, the mean over the points beyond 0 that both reach.

    The interval is over the seeds, each compared with itself.
    """
    leads = []
    for d, gold, other_d, other_gold in zip(curve.d, curve.gold, other.d, other.gold, strict=True):
        order, both = np.argsort(other_d), (d > 0) & (d <= other_d.max())
        expected = np.interp(d[both], np.append(0.0, other_d[order]), np.append(0.0, other_gold[order]))
        leads.append(np.mean(gold[both] - expected))
    return mean_interval(np.array(leads))


def coefficients(curve: Curve) -> np.ndarray:
    """a and b of each seed, of the curve's own form. [S, 2]."""
    return np.array([fit(FORMS[curve.method], d, gold) for d, gold in zip(curve.d, curve.gold, strict=True)])


def table_row(sweep: str, curve: Curve, usual: Curve, share: float) -> dict[str, Any]:
    """What the table says of a curve in a sweep; intervals are 95 % over seeds.

    `usual` is the curve of the same method whose proxy is of the defaults, `share` that of the range of d for `beyond`.
    """
    form = FORMS[curve.method]
    a, b = coefficients(curve).T
    highest = int(np.argmax(curve.gold.mean(axis=0)))
    far, left_out = beyond(form, curve.d, curve.gold, share), other_seeds(form, curve.d, curve.gold)
    return {
        "by": curve.method,
        "varied": sweep,
        "width": curve.line.width,
        "pairs": curve.line.pairs,
        "KL coefficient": curve.line.kl_coefficient,
        "members": curve.line.combination,
        "accuracy, %": mean_interval(100 * curve.accuracy),
        "a": mean_interval(a),
        "b": mean_interval(b),
        "highest gold": mean_interval(curve.gold[:, highest]),
        "at d": float(curve.d[:, highest].mean()),
        "last gold": mean_interval(curve.gold[:, -1]),
        "fall": mean_interval(curve.gold[:, highest] - curve.gold[:, -1]),
        "last proxy": mean_interval(curve.proxy[:, -1]),
        "last d": float(curve.d[:, -1].mean()),
        "gold at the same d, less the usual": None if curve is usual else lead(curve, usual),
        "error beyond, form": far.form,
        "error beyond, line": far.line,
        "error on other seeds, form": left_out.form,
        "error on other seeds, line": left_out.line,
    }


def draw_curves(path: Path, curves: dict[str, list[Curve]], name: Callable[[Line], str]) -> None:
    """A panel for each method: gold solid with a band of 95 % over seeds, proxy dashed, Gao's form dotted.

    All methods have curves of the same lines, which `name` gives their names.
    """
    with open_figure(path, [f"{method[0].upper()}{method[1:]}" for method in curves], 5.0, 4.0) as every:
        for axes, (method, of_method) in zip(every, curves.items(), strict=True):
            lines = []
            for curve, colour in zip(of_method, PALETTE, strict=False):
                d, gold, proxy = common_grid(curve)
                band = band_of(map(mean_interval, gold.T))
                draw_band(axes, d, band, name(curve.line), colour)
                proxy_label, fit_label = (f"_{kind}, {name(curve.line)}" for kind in ("proxy", "fit to gold"))
                axes.plot(d, proxy.mean(axis=0), color=colour, linewidth=1.1, linestyle=(0, (4, 2)), label=proxy_label)
                form = FORMS[method]
                fitted = form(d) @ fit(form, curve.d.ravel(), curve.gold.ravel())
                axes.plot(d, fitted, color=colour, linewidth=1.1, linestyle=(0, (1, 1.5)), label=fit_label)
                lines += [band[1], proxy.mean(axis=0), fitted]
            axes.axhline(0, color=GREY, linewidth=0.7)
            low, high = np.nanmin(lines), np.nanmax(lines)  # a band of few seeds may be far wider
            room = 0.15 * (high - low)
            axes.set(xlabel=DISTANCE, xlim=(0, None), ylim=(low - room, high + room))
        every[0].set_ylabel("reward, standard deviations on the reference policy")
        handles, labels = every[0].get_legend_handles_labels()
        for label, style in (("gold", "-"), ("proxy", (0, (4, 2))), ("fit to gold", (0, (1, 1.5)))):
            handles += every[0].plot([], [], color="black", linewidth=1.2, linestyle=style)
            labels.append(label)
        every[0].legend(handles, labels)


def common_grid(curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d from 0 to the last one that every seed reaches, [m], and gold and proxy of each seed there, [S, m].

    Gold begins at 0 with d; the proxy is NaN before its first point, for that of an ensemble may begin elsewhere.
    """
    grid = np.linspace(0, curve.d.max(axis=1).min(), GRID)
    gold, proxy = [], []
    for d, of_gold, of_proxy in zip(curve.d, curve.gold, curve.proxy, strict=True):
        order = np.argsort(d, kind="stable")
        gold.append(np.interp(grid, np.append(0, d[order]), np.append(0, of_gold[order])))
        proxy.append(np.interp(grid, d[order], of_proxy[order], left=np.nan))
    return grid, np.array(gold), np.array(proxy)


def draw_coefficients(path: Path, sweeps: dict[str, tuple[dict[float, Curve], ...]]) -> None:
    """a and b over what is varied, a colour for each method; bars are 95 % over seeds.

    Sweeps are by the name of the axis; of each method, the curve of every value.
    """
    titles = [f"{letter} over {axis}" for axis in sweeps for letter in ("a", "b")]
    with open_figure(path, titles, 3.4, 3.2) as every:
        for number, (axis, methods) in enumerate(sweeps.items()):
            for by_value, colour in zip(methods, PALETTE, strict=False):
                x = list(by_value)
                found = [coefficients(curve) for curve in by_value.values()]
                for axes, column in zip(every[2 * number : 2 * number + 2], (0, 1), strict=True):
                    low, middle, high = band_of(mean_interval(each[:, column]) for each in found)
                    bars, label = (middle - low, high - middle), next(iter(by_value.values())).method
                    axes.errorbar(x, middle, bars, color=colour, marker="o", markersize=4, capsize=2, label=label)
                    axes.set(xscale="log", xlabel=axis)
                    axes.set_xticks(x, [f"{value:,g}" for value in x])
                    axes.minorticks_off()
                    axes.axhline(0, color=GREY, linewidth=0.7)
        every[0].legend()
