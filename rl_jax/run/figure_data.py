"""What a figure shows, read off what was drawn, for the JSON file beside it."""

import json
import math
import re
from typing import Any

import numpy as np

MOST_POINTS = 250  # of a line: about as many as a figure shows

Mark = dict[str, Any]


def figure_data(axes: Any) -> dict[str, Any]:
    """What axes show, as JSON has it.

    Its "title"; the labels of its axes, "x" and "y", with their units; "x names" or "y names" of places that have a
    name; and "marks", each with its "label", if it has one, and its "colour":

    - "line", "dots": x and y; low and high too where there is a band about it, or error bars.
    - "band", without a line of its label: x, low and high.
    - "bars": y at each x, or for lying ones x at each y.
    - "level": y, or x, of a line across.
    - "other": what has none of these forms, such as an image; without numbers.

    Numbers have six significant digits, and of more than 250 points of a line 250 are there, evenly.

    Args:
        axes: of matplotlib.
    """
    about: dict[str, Any] = {"title": axes.get_title("left"), "x": axes.get_xlabel(), "y": axes.get_ylabel()}
    about |= {f"{axis.axis_name} names": names for axis in (axes.xaxis, axes.yaxis) if (names := _names(axis))}
    marks, parts = _read_containers(axes)
    rest = [each for each in (*axes.lines, *axes.collections, *axes.patches, *axes.images) if each not in parts]
    return about | {"marks": _with_bands([*marks, *(_read(each, axes) for each in rest)])}


def layout(every: list[dict[str, Any]]) -> str:
    """The data of some axes as JSON, with a line for each mark."""

    def text(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    parts = []
    for about in every:
        *head, (_, marks) = about.items()
        names = ", ".join(f"{text(name)}: {text(value)}" for name, value in head)
        lines = ",\n".join(f"  {text(mark)}" for mark in marks)
        parts.append(f'{{{names}, "marks": [\n{lines}\n]}}')
    return "[" + ",\n".join(parts) + "]\n"


def _names(axis: Any) -> dict[str, str]:
    """Names of an axis's places, by place, where they are not numbers."""
    from matplotlib.ticker import FixedFormatter, FuncFormatter

    places, formatter = axis.get_majorticklocs(), axis.get_major_formatter()
    named = isinstance(formatter, FixedFormatter | FuncFormatter)
    names = [str(name) for name in formatter.format_ticks(places)] if named else []
    if all(re.fullmatch(r"[\d.,]*", name) for name in names):
        return {}
    return dict(zip((f"{place:g}" for place in places), names, strict=True))


def _read_containers(axes: Any) -> tuple[list[Mark], list[Any]]:
    """Error bars and bars as marks, and the artists that these are drawn with."""
    from matplotlib.container import BarContainer, ErrorbarContainer

    marks, parts = list[Mark](), list[Any]()
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer) and container.lines[0] and container.lines[2]:
            line, caps, (*_, bars) = container.lines
            low, high = _ends(bars)[..., int(container.has_yerr)].T
            x, y = line.get_data(orig=False)
            kind = "dots" if line.get_linestyle() == "None" else "line"
            marks.append(_mark(kind, container, line.get_color()) | _numbers(x=x, y=y, low=low, high=high))
            parts += [line, *caps, *container.lines[2]]
        elif isinstance(container, BarContainer) and container.patches:
            boxes = np.array([patch.get_bbox().get_points() for patch in container])  # [n, 2, 2]
            along = int(container.orientation != "horizontal")
            ends, places = boxes[:, 1, along], boxes[:, :, 1 - along].mean(axis=1)
            x, y = (places, ends) if along else (ends, places)
            marks.append(_mark("bars", container, container[0].get_facecolor()) | _numbers(x=x, y=y))
            parts += list(container)
    return marks, parts


def _read(artist: Any, axes: Any) -> Mark:
    from matplotlib.collections import PathCollection, PolyCollection
    from matplotlib.lines import Line2D

    match artist:
        case Line2D():
            x, y = (np.asarray(values, float) for values in artist.get_data(orig=False))
            kind = "dots" if artist.get_linestyle() == "None" else "line"
            match artist.get_transform().contains_branch_seperately(axes.transData):
                case (True, False):
                    return _mark("level", artist, artist.get_color()) | _numbers(x=x[:1])
                case (False, True):
                    return _mark("level", artist, artist.get_color()) | _numbers(y=y[:1])
            return _mark(kind, artist, artist.get_color()) | _numbers(x=x, y=y)
        case PathCollection():
            x, y = np.ma.filled(artist.get_offsets(), np.nan).T
            return _mark("dots", artist, artist.get_facecolor()[0]) | _numbers(x=x, y=y)
        case PolyCollection():  # of fill_between: a corner, the one edge, a corner, the other one backwards, the first
            parts = [np.asarray(path.vertices, float) for path in artist.get_paths()] or [np.zeros((3, 2))]
            low = np.concatenate([part[1 : len(part) // 2] for part in parts])
            high = np.concatenate([part[-2 : len(part) // 2 : -1] for part in parts])
            band = _numbers(x=low[:, 0], low=low[:, 1], high=high[:, 1])
            return _mark("band", artist, artist.get_facecolor()[0]) | band
    return {"mark": "other"}


def _ends(collection: Any) -> np.ndarray:
    """Both ends of each segment. [n, 2, 2]."""
    return np.array([ends if len(ends) == 2 else np.full((2, 2), np.nan) for ends in collection.get_segments()])


def _mark(kind: str, artist: Any, colour: Any) -> Mark:
    from matplotlib.colors import to_hex

    label = str(artist.get_label())
    named = not re.fullmatch(r"_child\d+|_container\d+|_nolegend_|None|", label)
    return {"mark": kind} | ({"label": label.removeprefix("_")} if named else {}) | {"colour": to_hex(colour)}


def _numbers(**columns: Any) -> dict[str, list[Any]]:
    return {name: _rounded(np.ma.filled(np.ma.asarray(values, float), np.nan)) for name, values in columns.items()}


def _rounded(values: np.ndarray) -> list[float | None]:
    if len(values) > MOST_POINTS:
        values = values[np.linspace(0, len(values) - 1, MOST_POINTS).round().astype(int)]
    short = [float(f"{value:.6g}") for value in values]
    return [None if not math.isfinite(x) else int(x) if x.is_integer() else x for x in short]


def _with_bands(marks: list[Mark]) -> list[Mark]:
    """Gives each line the band that has its label and its places."""
    lines, bands = (
        {(mark.get("label"), *mark["x"]): mark for mark in marks if mark["mark"] == kind} for kind in ("line", "band")
    )
    for about in lines.keys() & bands.keys():
        lines[about] |= {edge: bands[about][edge] for edge in ("low", "high")}
    return [mark for mark in marks if mark["mark"] != "band" or (mark.get("label"), *mark["x"]) not in lines]
