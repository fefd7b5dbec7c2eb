"""Where the marks of a picture go: values in, places in a drawing of 360 units' width out; the templates draw them.

360 units are a phone's width, so that letters keep their size there. Methods and kinds are told apart by shape, dash or
hatching as well as by colour: the class `m-NAME` or `k-NAME` is the name of the colour in the style sheet.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from recap_cli.memory.plot_style import looks_of

WIDTH, HEIGHT = 360.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 22.0, 38.0

SHAPES = {  # around (0, 0), by the name that matplotlib has for such a marker
    "o": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "s": "M-3.6,-3.6h7.2v7.2h-7.2z",
    "^": "M0,-4.8L4.5,3.4H-4.5z",
    "v": "M0,4.8L4.5,-3.4H-4.5z",
    "D": "M0,-5L5,0L0,5L-5,0z",
    "P": "M-1.6,-4.6h3.2v3h3v3.2h-3v3h-3.2v-3h-3v-3.2h3z",
    "X": "M-4.4,-2.4L-2.4,-4.4L0,-2L2.4,-4.4L4.4,-2.4L2,0L4.4,2.4L2.4,4.4L0,2L-2.4,4.4L-4.4,2.4L-2,0z",
    "<": "M-4.8,0L3.4,-4.5V4.5z",
    ">": "M4.8,0L-3.4,-4.5V4.5z",
    "p": "M0,-4.8L4.6,-1.5L2.8,3.9H-2.8L-4.6,-1.5z",
    "h": "M0,-4.8L4.2,-2.4V2.4L0,4.8L-4.2,2.4V-2.4z",
}
DASHES = ("none", "6 3", "9 3 2 3", "14 3")  # none of dots: those are for methods without the ratio


class Point(NamedTuple):
    """A mark, with what it says when it is pointed at; `spread` is drawn above and below it."""

    x: float
    y: float
    title: str
    spread: float = 0.0


class Series(NamedTuple):
    """Marks of one name, joined by a line of a dash or not joined (None)."""

    label: str
    css: str
    shape: str
    points: Sequence[Point]
    dash: str | None = "none"
    flat: bool = False  # True: the height of its one point, from edge to edge, with the mark at the end


Label = Callable[[float], str]


def look(method: str, methods: Sequence[str]) -> tuple[str, str]:
    """The class of the colour and the shape of one of these methods, of one that is not known here as well."""
    found = looks_of(methods)[method]
    return found.css, found.marker


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that cover low … high, about `most` of them."""
    if low == high:
        low, high = low - (abs(low) / 20 or 0.5), high + (abs(high) / 20 or 0.5)
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def plane(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_text: Label,
    y_text: Label,
    x_marks: Sequence[float] | None = None,
    zero: bool = False,
    top: float | None = None,
    front: Sequence[tuple[float, float]] = (),
) -> dict[str, Any]:
    """A picture of series over two axes. `x_marks` are the labelled places of the x axis where they are not to be round
    numbers; `zero` makes both axes begin at 0; `front` is a staircase from corner to corner.
    """
    points = [point for one in series for point in one.points]
    xs = [point.x for one in series if not one.flat for point in one.points] or list(x_marks or [0.0, 1.0])
    lows, highs = [p.y - p.spread for p in points], [p.y + p.spread for p in points]
    y_ticks = ticks(0.0 if zero else min(lows), max(highs) if top is None else top)
    x_ticks = list(x_marks) if x_marks else ticks(0.0 if zero else min(xs), max(xs))
    pad = (max(x_ticks) - min(x_ticks)) * (0.04 if x_marks else 0.0) or (0.5 if len(x_ticks) == 1 else 0.0)
    to_x = _scale(min(x_ticks) - pad, max(x_ticks) + pad, LEFT, WIDTH - RIGHT)
    to_y = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    return {
        "title": title,
        "x_label": x_label,
        "y_label": y_label,
        "x_ticks": [(to_x(value), x_text(value)) for value in _thin(x_ticks)],
        "y_ticks": [(to_y(value), y_text(value)) for value in y_ticks],
        "series": [_placed(one, to_x, to_y) for one in series],
        "front": _staircase([(to_x(x), to_y(y)) for x, y in front]),
    }


def stacks(
    rows: Iterable[tuple[str, Mapping[str, float | None], float | None]], text: Label, title: str, *, beside: float = 0.0
) -> dict[str, Any]:
    """Bars on a common scale: for each row its label, its parts by kind, and a whole that is marked beside them (or None).

    Labels stand above the bars, or `beside` them, with so much room.
    """
    kept = [(label, {kind: size for kind, size in parts.items() if size}, whole) for label, parts, whole in rows]
    most = max((max(sum(parts.values()), whole or 0.0) for _, parts, whole in kept), default=0.0) or 1.0
    to_x = _scale(0.0, most, beside, WIDTH - 78.0)
    height, above = (19.0, 1.0) if beside else (36.0, 15.0)
    bars: list[dict[str, Any]] = []
    for at, (label, parts, whole) in enumerate(kept):
        start = 0.0
        pieces: list[dict[str, Any]] = []
        for kind, size in parts.items():
            said = f"{label}: {kind} {text(size)}"
            x = to_x(start)
            start += size
            pieces.append({"kind": kind, "x": x, "width": round(to_x(start) - x, 1), "title": said})
        mark = None if whole is None else to_x(whole)
        place = {"y": at * height + above, "label": label, "label_y": at * height + 11}
        bars.append({**place, "pieces": pieces, "end": max(to_x(start), mark or 0.0), "total": text(start), "mark": mark})
    kinds = list(dict.fromkeys(piece["kind"] for bar in bars for piece in bar["pieces"]))
    return {"title": title, "bars": bars, "height": len(bars) * height, "kinds": kinds}


def heads(layers: Sequence[Sequence[bool]], title: str) -> dict[str, Any]:
    """A square for each unit of each layer, kept or not, and the number kept."""
    most = max(map(len, layers))
    cell = min(18.0, (WIDTH - 84.0) / most)
    rows = [
        {
            "y": at * 19.0,
            "label": str(at + 1),
            "end": 26 + cell * len(units),
            "text": f"{sum(units)} of {len(units)}",
            "cells": [(26 + cell * unit, kept) for unit, kept in enumerate(units)],
        }
        for at, units in enumerate(layers)
    ]
    return {"title": title, "rows": rows, "height": len(rows) * 19.0 + 2, "cell": cell, "size": min(15.0, cell * 0.84)}


def levels(layers: Sequence[Sequence[bool]], title: str) -> dict[str, Any]:
    """A bar for each layer: how many of its units are kept, and of how many."""
    most = max(map(len, layers))
    to_x = _scale(0.0, most, 0.0, WIDTH - 26 - 100)
    rows = [
        {
            "y": at * 19.0,
            "label": str(at + 1),
            "whole": to_x(len(units)),
            "kept": to_x(sum(units)),
            "text": f"{sum(units):,} of {len(units):,}",
        }
        for at, units in enumerate(layers)
    ]
    return {"title": title, "rows": rows, "height": len(rows) * 19.0 + 2}


def shades(rounds: Sequence[Mapping[str, Any]], kind: str, title: str) -> dict[str, Any]:
    """A grid of layers by rounds, each cell as dark as the share that is kept, and the number in it where there is room."""
    kept, of = ([row[key][kind] for row in rounds] for key in ("kept", "of"))
    layers = len(kept[0])
    width = min(44.0, (WIDTH - 28.0) / len(rounds))
    cells = [
        {
            "x": 26 + at * width,
            "y": 18 + layer * 19.0,
            "share": kept[at][layer] / of[at][layer],
            "text": f"{kept[at][layer]}" if width > 7.5 * len(str(of[at][layer])) else "",
            "title": f"round {row['round']}, layer {layer + 1}: {kept[at][layer]} of {of[at][layer]}",
        }
        for at, row in enumerate(rounds)
        for layer in range(layers)
    ]
    columns = [(26 + at * width + width / 2, row["round"]) for at, row in enumerate(rounds)]
    shown = columns[:: max(1, math.ceil(20.0 / width))]
    return {"title": title, "cells": cells, "width": width, "columns": shown, "layers": layers, "height": 20 + layers * 19.0}


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: round(start + (value - low) / span * (end - start), 1)


def _thin(values: Sequence[float], most: int = 10) -> list[float]:
    """Every nth of the values, so that their labels do not meet."""
    return list(values[:: math.ceil(len(values) / most)])


def _placed(one: Series, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> dict[str, Any]:
    placed = [
        {"x": to_x(p.x), "y": to_y(p.y), "low": to_y(p.y - p.spread), "high": to_y(p.y + p.spread), "title": p.title}
        for p in sorted(one.points, key=lambda p: p.x)
    ]
    line = [(p["x"], p["y"]) for p in placed]
    if one.flat:
        placed = [{**placed[0], "x": WIDTH - RIGHT}]
        line = [(LEFT, placed[0]["y"]), (WIDTH - RIGHT, placed[0]["y"])]
    path = "" if one.dash is None or len(line) < 2 else "M" + "L".join(f"{x},{y}" for x, y in line)
    shape = {"d": SHAPES[one.shape], "flat": one.flat, "title": one.points[0].title}
    return {"label": one.label, "css": one.css, "dash": one.dash, "path": path, "points": placed, **shape}


def _staircase(corners: Sequence[tuple[float, float]]) -> str:
    """The border of what the corners beat, to the right edge."""
    if not corners:
        return ""
    steps = [f"M{corners[0][0]},{corners[0][1]}", *(f"H{x}V{y}" for x, y in corners[1:])]
    return "".join([*steps, f"H{WIDTH - RIGHT}"])
