"""Whether the reward that is optimised and the one that is meant part in the course of a run.

A learned reward (the proxy) is high where the gold reward is high, until a policy that is optimised for it leaves what
it was learned from: then the gold reward falls while the proxy still rises (Gao 2022).
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from rl_jax.run.run_files import Rows, finite

WINDOWS = 10  # that a run is cut into
SHORTEST = 5  # updates in a window
POINTS = 200  # a longer run is averaged down to so many first
CHANCE = 0.01  # how often noise alone may look like a fall at most
SMALLEST_FALL = 0.1  # share of the whole range of the window's means: less is no harm done, even where it is no chance
SAME_FALL = 0.25  # share of the gold reward's fall by which the proxy has not fallen either
CLEAR_RISE = 0.5  # of the proxy, standard deviations of the reference
NO_RISE = 0.15  # of the gold reward, share of the proxy's rise
ADVICE = "Stop there, raise the KL coefficient, or collect preferences from the present policy."


class Parting(NamedTuple):
    """Where and how they part.

    Attributes:
        step: the last before they part; None where the gold reward never rose.
        gold: what it fell from and to; where it never rose, its first and its highest. Means over windows.
        proxy: what it was then, and at last.
    """

    step: int | None
    gold: tuple[float, float]
    proxy: tuple[float, float]


class Windows(NamedTuple):
    """Means of consecutive windows [m], the standard error of each, and its degrees of freedom."""

    means: np.ndarray
    error: float
    freedom: int


def parting(steps: np.ndarray, proxy: np.ndarray, gold: np.ndarray) -> Parting | None:
    """Where proxy and gold part, if they do.

    They part where the mean gold reward of the last window lies below that of the best window by more than noise would
    have it, and by more than a tenth of its range, while the proxy has fallen by less than a quarter of that; or where
    the proxy has risen clearly and the gold reward never has by more than a small part of that. What noise would have
    is Tukey's range test, which knows that the best of several windows was picked, with an error that knows that the
    noise of neighbouring updates may be alike.

    Args:
        steps: numbers of the updates. int [n].
        proxy: the mean reward of each, less the reference policy's mean and over its standard deviation; NaN is left
            out. [n].
        gold: of the gold reward, the same. [n].

    Returns:
        None where they do not part, or n is below 15.
    """
    known = np.isfinite(proxy) & np.isfinite(gold)
    every = max(-(-int(known.sum()) // POINTS), 1)
    steps, proxy, gold = (_by(every, np.asarray(x)[known]) for x in (steps, proxy, gold))
    steps, proxy, gold = steps[:, -1], proxy.mean(axis=1), gold.mean(axis=1)
    size = max(len(steps) // WINDOWS, SHORTEST)
    if len(steps) < 3 * size:
        return None
    ends = _by(size, steps)[:, -1]
    wanted, paid = window_means(gold, size), window_means(proxy, size)
    best = int(wanted.means.argmax())
    fall, paid_fall = (x.means[best] - x.means[-1] for x in (wanted, paid))
    if _fell(wanted, best) and paid_fall < SAME_FALL * fall:
        return Parting(int(ends[best]), _ends(wanted.means, best), _ends(paid.means, best))
    rise = paid.means[-1] - 2 * paid.error
    if rise > CLEAR_RISE and wanted.means[best] + 2 * wanted.error < NO_RISE * rise:
        return Parting(None, (float(wanted.means[0]), float(wanted.means[best])), _ends(paid.means, 0))
    return None


def window_means(values: np.ndarray, size: int) -> Windows:
    """Means of consecutive windows, with an error for noise that is AR(1).

    Variance and correlation of the noise are those whose residuals from a straight line in each window would have, on
    average, the squares and the products of neighbours that these have.

    Args:
        values: what does not fill a window is left out at the beginning. [n].
        size: of a window, at least 3.
    """
    windows = _by(size, values)
    line = np.stack([np.ones(size), np.arange(size)], axis=1)
    residual = np.eye(size) - line @ np.linalg.pinv(line)
    left = windows @ residual
    squares = float(np.square(left).sum())
    alike = float((left[:, 1:] * left[:, :-1]).sum()) / squares if squares > 0 else 0.0
    apart = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    for correlation in np.arange(0, 0.92, 0.02):
        noise = correlation**apart
        expected = residual @ noise @ residual
        if np.trace(expected, offset=1) / np.trace(expected) >= alike:
            break
    variance = squares / len(windows) / np.trace(expected)
    return Windows(windows.mean(axis=1), float(np.sqrt(variance * noise.mean())), len(windows) * (size - 2))


def describe_parting(found: Parting) -> str:
    """What a report says of it, and what can be done."""
    (first_gold, last_gold), (first_proxy, last_proxy) = found.gold, found.proxy
    verb = "rose" if last_proxy > first_proxy else "went"
    rose = f"the proxy {verb} from {_show(first_proxy)} to {_show(last_proxy)}"
    unit = "standard deviations of the reference"
    if found.step is None:
        return (
            f"The proxy and the gold reward part from the start: {rose} while gold, at {_show(first_gold)}, never rose "
            f"above {_show(last_gold)} ({unit}). {ADVICE.replace('Stop there, raise', 'Raise')}"
        )
    return (
        f"The proxy and the gold reward part after step {found.step:,}: gold fell from {_show(first_gold)} to "
        f"{_show(last_gold)} while {rose} ({unit}). {ADVICE}"
    )


def parting_warning(metrics: Mapping[str, Rows]) -> str:
    """The sentence for a run whose proxy and gold part, "" for others.

    Args:
        metrics: the rows of each stage; those of RL may have reward_gain and gold_gain.
    """
    rows = [row for row in metrics.get("rl", ()) if "reward_gain" in row and "gold_gain" in row]
    columns = [[finite(row[name]) for row in rows] for name in ("reward_gain", "gold_gain")]
    found = parting(np.array([row["step"] for row in rows], int), *(np.array(x, np.float64) for x in columns))
    return describe_parting(found) if found else ""


def _by(size: int, values: np.ndarray) -> np.ndarray:
    """Rows of `size` consecutive values, those that fill no row left out at the beginning. [n] -> [n // size, size]."""
    return values[len(values) % size :].reshape(-1, size)


def _fell(windows: Windows, since: int) -> bool:
    from scipy.stats import studentized_range  # slow to import, and only a run with a gold reward needs it

    fall, span = windows.means[since] - windows.means[-1], np.ptp(windows.means)
    if not fall > SMALLEST_FALL * span:
        return False
    ranges = float(fall) / max(windows.error, 1e-9 * float(span))
    return bool(studentized_range.sf(ranges, len(windows.means), windows.freedom) < CHANCE)


def _ends(means: np.ndarray, since: int) -> tuple[float, float]:
    return float(means[since]), float(means[-1])


def _show(value: float) -> str:
    return f"{value:z.2f}".replace("-", "−")
