"""The figures of the recipe `overoptimization`: gold and proxy over d, and the fitted a and b."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.recipes.overoptimization_curves import FORMS, Curve, Line, coefficients, fit, over_seeds
from rl_jax.run.figures import GREY, PALETTE, draw_band, open_figure

GRID = 40  # points at which the seeds of a curve are brought together
DISTANCE = "d = √KL, nats$^{1/2}$"


def draw_curves(path: Path, curves: dict[str, list[Curve]], name: Callable[[Line], str]) -> None:
    """A panel for each method: gold solid with a band of 95 % over seeds, proxy dashed, Gao's form dotted.

    Args:
        path: of the PNG file.
        curves: by method, all with the same lines.
        name: of a line.
    """
    with open_figure(path, [f"{method[0].upper()}{method[1:]}" for method in curves], 5.0, 4.0) as every:
        for axes, (method, of_method) in zip(every, curves.items(), strict=True):
            lines = []
            for curve, colour in zip(of_method, PALETTE, strict=False):
                d, gold, proxy = common_grid(curve)
                band = np.array([(low, value, high) for value, low, high in map(over_seeds, gold.T)]).T
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
        every[0].legend(handles, labels, frameon=False, fontsize=8)


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

    Args:
        path: of the PNG file.
        sweeps: by the name of the axis, what is varied to the curve, for each method.
    """
    titles = [f"{letter} over {axis}" for axis in sweeps for letter in ("a", "b")]
    with open_figure(path, titles, 3.4, 3.2) as every:
        for number, (axis, methods) in enumerate(sweeps.items()):
            for by_value, colour in zip(methods, PALETTE, strict=False):
                x = list(by_value)
                found = [coefficients(curve) for curve in by_value.values()]
                for axes, column in zip(every[2 * number : 2 * number + 2], (0, 1), strict=True):
                    values = np.array([over_seeds(each[:, column]) for each in found]).T
                    bars = np.abs(values[1:] - values[0])
                    label = next(iter(by_value.values())).method
                    axes.errorbar(x, values[0], bars, color=colour, marker="o", markersize=4, capsize=2, label=label)
                    axes.set(xscale="log", xlabel=axis)
                    axes.set_xticks(x, [f"{value:,g}" for value in x])
                    axes.minorticks_off()
                    axes.axhline(0, color=GREY, linewidth=0.7)
        every[0].legend(frameon=False, fontsize=8)
