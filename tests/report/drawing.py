"""Reads the figures of a page back: their marks, where they stand, what they say, and what the legend says of them."""

import html
import re
from collections.abc import Iterator, Mapping
from xml.etree import ElementTree as Xml

import numpy as np
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path as Outline

from recap_cli.memory.plot_style import EVERY


def svgs(text: str) -> Iterator[tuple[Xml.Element, str]]:
    """Every SVG of a page, and the text that follows it."""
    for found in re.finditer(r"(<svg.*?</svg>)([^<]*)", text, re.DOTALL):
        yield Xml.fromstring(found[1]), html.unescape(found[2])


def figure_of(text: str, label: str) -> Xml.Element:
    """The one figure of a page that a screen reader calls so."""
    (found,) = [drawing for drawing, _ in svgs(text) if drawing.get("aria-label") == label]
    return found


def marker_of(mark: Mapping[str, str], text: str) -> tuple[str, str]:
    """The filling of a mark, and matplotlib's name of the marker whose outline it has."""
    name = re.findall(r"fill:var\((--\w+)\)", mark.get("style", ""))
    colour = re.findall(rf"{name[0]}: (#\w+);", text)[0].lower() if name else "#000000"  # as the style sheet says for all
    return colour, closest(mark["d"])


def closest(outline: str) -> str:
    """The marker of the table that has this outline, whatever its size."""
    drawn = np.array(re.findall(r"-?[\d.]+", outline), dtype=float).reshape(-1, 2) * (1, -1)
    far: dict[str, float] = {}
    for marker in (look.marker for look in EVERY):
        style = MarkerStyle(marker)
        path = style.get_path().transformed(style.get_transform())
        points = path.vertices if path.codes is None else path.vertices[path.codes != Outline.CLOSEPOLY]
        if len(points) == len(drawn):
            far[marker] = float(np.abs(drawn / np.abs(drawn).max() - points / np.abs(points).max()).max())
    best = min(far, key=lambda marker: far[marker])
    assert far[best] < 0.05, f"no marker has the outline {outline}"
    return best


def with_styles(drawing: Xml.Element) -> Iterator[tuple[Xml.Element, str]]:
    """Every element of a figure in order, with its style and those of the groups around it."""

    def walk(element: Xml.Element, style: str) -> Iterator[tuple[Xml.Element, str]]:
        style = f"{element.get('style', '')};{style}"
        yield element, style
        for child in element:
            yield from walk(child, style)

    yield from walk(drawing, "")


def outlines(drawing: Xml.Element) -> dict[str, str]:
    """The outlines that marks refer to."""
    return {f"#{path.get('id')}": path.attrib["d"] for path in drawing.iter("path") if "id" in path.attrib}


def legend_of(text: str, label: str) -> dict[str, tuple[str, str]]:
    """By its name in a figure's legend, the filling and the marker of what stands before the name."""
    drawing = figure_of(text, label)
    known, found = outlines(drawing), dict[str, tuple[str, str]]()
    before: dict[str, str] | None = None
    for element, style in with_styles(drawing):
        if element.tag in ("use", "path") and element.get("id") is None:
            outline = known[element.attrib["href"]] if element.tag == "use" else element.attrib["d"]
            before = {"d": outline, "style": style} if "z" in outline else None  # else a line, of an axis or a tick
        elif element.tag == "text" and before is not None:
            found[str(element.text)] = marker_of(before, text)
            before = None
    return found


def marks(drawing: Xml.Element) -> dict[str, tuple[float, float]]:
    """By what it says, or its group says, where each mark of a line stands."""
    found = {}
    for element in drawing.iter():
        if (title := element.find("title")) is None:
            continue
        for one in element.iter():
            place = re.match(r"translate\((.*),(.*)\)", one.get("transform", ""))
            x, y = (place[1], place[2]) if place else (one.get("x"), one.get("y"))
            if one.tag in ("use", "path") and x is not None and y is not None:
                assert str(title.text) not in found
                found[str(title.text)] = (float(x), float(y))
    return found


def boxes(drawing: Xml.Element) -> dict[str, tuple[float, float]]:
    """By what it says, from where to where on the x axis each part of a bar goes."""
    found = {}
    for element in drawing.iter("path"):
        if (title := element.find("title")) is not None and "transform" not in element.attrib:
            xs = [float(x) for x, _ in re.findall(r"(-?[\d.]+) (-?[\d.]+)", element.attrib["d"])]
            found[str(title.text)] = (min(xs), max(xs))
    return found


def heights(drawing: Xml.Element) -> dict[str, float]:
    """The labels of the y axis, and where they stand."""
    return {str(one.text): float(one.attrib["y"]) for one in drawing.iter("text") if "text-anchor:end" in one.get("style", "")}


def on_a_line(pairs: list[tuple[float, float]]) -> bool:
    """Whether places are those of their values on some axis, but for the rounding of places."""
    values, places = np.array(pairs).T
    return bool(np.abs(np.polyval(np.polyfit(values, places, 1), values) - places).max() < 0.15) and bool(np.ptp(places) > 20)
