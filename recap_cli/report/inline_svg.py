"""A drawn figure as SVG inside a page: the page's colours, dark or light, its letters, and words at the marks.

What matplotlib writes is made small. Its colours become the page's CSS variables, its ids get a prefix of the figure's own.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from xml.etree import ElementTree as Xml

from recap_cli.memory.picture import PAGE, Picture, encoded, picture
from recap_cli.memory.plot_style import SOFT, Look, palette, variable

DIGITS = 1  # after the point, of 360 units' width
GLYPH_POINTS = 12
NUMBER = re.compile(r"-?\d+\.\d+")
COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b")
REFERENCE = re.compile(r"url\(#([^)]+)\)")
UNSAID = {"font-family", "stroke-dashoffset", "stroke-linejoin"}  # the style sheet says them for all figures
USUAL = {"font-size": f"{PAGE.font_size:g}px", "fill": SOFT.lower(), "text-anchor": "start"}  # of a text, in the style sheet


def inline(drawn: Picture, name: str, label: str) -> str:
    """The SVG text of a figure, to stand in a page. `name` sets its ids apart, `label` is what a screen reader says.

    Raises:
        KeyError: a colour of the figure is not in the palette, so that a dark page would not know it.
    """
    drawing = _drawing(drawn, name)
    return _text(drawing, {"viewBox": drawing.get("viewBox", ""), "role": "img", "aria-label": label})


def glyph(look: Look) -> str:
    """The marker of a method in its colour, as a small SVG to stand before its name."""
    with picture(PAGE._replace(width=GLYPH_POINTS / 72), GLYPH_POINTS / 72) as drawn:
        drawn.figure.set_layout_engine("none")
        axes = drawn.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_axis_off()
        axes.set_xlim(-1, 1)
        axes.set_ylim(-1, 1)
        axes.plot([0], [0], look.marker, color=look.colour, markersize=look.size, markeredgewidth=0.0, clip_on=False)
    size = str(GLYPH_POINTS)
    return _text(_drawing(drawn, "glyph"), {"width": size, "height": size, "aria-hidden": "true"})


def _drawing(drawn: Picture, name: str) -> Xml.Element:
    """What matplotlib writes of a figure, made small and a part of the page."""
    content = encoded(drawn, "svg", transparent=True).decode()
    drawing = Xml.fromstring(content[content.index("<svg") :])
    for element in drawing.iter():
        _without_namespace(element)
    for gone in ("metadata", "defs/style/.."):
        for element in drawing.findall(gone):
            drawing.remove(element)
    _describe(drawing, drawn.words)
    for element in drawing.iter():
        _restyle(element)
    _flatten(drawing)
    _expand(drawing)
    _gather(drawing)
    _name(drawing, name)
    return drawing


def _text(drawing: Xml.Element, attributes: Mapping[str, str]) -> str:
    """The text of a drawing with these attributes alone."""
    drawing.attrib.clear()
    drawing.attrib |= attributes
    return Xml.tostring(drawing, encoding="unicode").replace(" />", "/>")


def _without_namespace(element: Xml.Element) -> None:
    """Name an element and its attributes as HTML does, and leave out the line breaks around it."""
    element.tag = element.tag.rpartition("}")[2]
    element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    element.tail = None
    if element.tag != "text":
        element.text = None


def _describe(drawing: Xml.Element, words: Mapping[str, Sequence[str]]) -> None:
    """Put the words into the marks that they belong to: into each, or into their group if there is one for all."""
    for group in drawing.iter("g"):
        texts = words.get(group.get("id", ""), ())
        marks = [*group.iter("use")]
        if len(texts) > 1 and len(texts) != len(marks):
            raise ValueError(f"{group.get('id')}: {len(texts)} words for {len(marks)} marks")
        for mark, text in zip(marks if len(texts) > 1 else [group], texts, strict=False):
            title = Xml.Element("title")
            title.text = text
            mark.insert(0, title)


def _restyle(element: Xml.Element) -> None:
    """Turn the style of an element into short attributes, and its colours into the page's."""
    style = dict(part.split(": ", 1) for part in element.attrib.pop("style", "").split("; ") if part)
    style |= {key: element.attrib.pop(key) for key in ("fill",) if key in element.attrib}
    kept = {key: value for key, value in style.items() if key not in UNSAID}
    if element.tag == "text":
        kept = {key: value for key, value in kept.items() if USUAL.get(key) != value}
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
    for key in ("d", "x", "y", "width", "height"):
        if key in element.attrib:
            element.set(key, _rounded(element.attrib[key]))
    if kept:
        element.set("style", ";".join(f"{key}:{COLOUR.sub(_coloured, value)}" for key, value in kept.items()))


def _coloured(found: re.Match[str]) -> str:
    """A colour of the palette as the variable that the page keeps it in."""
    if found[0].upper() not in palette():
        raise KeyError(f"{found[0]} is not in plot_style.palette()")
    return f"var({variable(found[0])})"


def _rounded(text: str) -> str:
    """Coordinates with few digits and no spaces that say nothing."""
    short = NUMBER.sub(lambda number: f"{round(float(number[0]), DIGITS) + 0.0:g}", text)
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", short).strip()


def _flatten(element: Xml.Element) -> None:
    """Take out what is not seen, and groups that say nothing."""
    for child in element:
        _flatten(child)
    element[:] = [left for child in element for left in _left(child)]


def _left(child: Xml.Element) -> list[Xml.Element]:
    """What is left of an element whose own are flattened: nothing, itself, or what a group holds."""
    inner = list(child)
    unseen = child.tag == "path" and child.get("style") == "fill:none" and "id" not in child.attrib
    if unseen or (child.tag in ("g", "defs") and all(one.tag == "title" for one in inner)):
        return []
    if child.tag != "g" or not child.attrib.keys() <= {"id"}:
        return [child]
    if inner[0].tag != "title":
        return inner
    if len(inner) > 2:
        return [child]
    inner[1].insert(0, inner[0])  # the words of one mark
    return [inner[1]]


def _gather(element: Xml.Element) -> None:
    """Put marks that follow each other in the same style into one group that has it."""
    gathered: list[Xml.Element] = []
    for manner, run in groupby(element, key=lambda child: (child.get("style"), child.get("clip-path"), child.tag)):
        children = list(run)
        style, clip, tag = manner
        inherited = tag != "text" and not (style or "").startswith("opacity")  # the style sheet's own for text wins
        if len(children) > 1 and (style or clip) and inherited:
            group = Xml.Element("g")
            for key, value in (("style", style), ("clip-path", clip)):
                if value is not None:
                    group.set(key, value)
                    for child in children:
                        del child.attrib[key]
            group[:] = children
            children = [group]
        gathered += children
    element[:] = gathered
    for child in element:
        if child.tag == "g":
            _gather(child)


def _expand(drawing: Xml.Element) -> None:
    """Put a mark that is drawn only once into its place, so that it needs no id."""
    times = Counter(_references(drawing))
    once = {path.get("id"): path for path in drawing.iter("path") if times[path.get("id", "")] == 1}
    for use in drawing.iter("use"):
        if (path := once.get(use.attrib["href"][1:])) is not None:
            use.tag = "path"
            use.attrib |= {"d": path.attrib["d"], "transform": f"translate({use.attrib.pop('x')},{use.attrib.pop('y')})"}
            if "style" in path.attrib:
                use.set("style", ";".join(filter(None, [use.get("style"), path.attrib["style"]])))
            del use.attrib["href"]
    for parent in drawing.iter():
        for defs in parent.findall("defs"):
            if all(child.get("id") in once for child in defs):
                parent.remove(defs)


def _name(drawing: Xml.Element, name: str) -> None:
    """Keep the ids that something refers to, short and with the name of the figure before them."""
    used = {target: f"{name}-{at}" for at, target in enumerate(dict.fromkeys(_references(drawing)))}
    for element in drawing.iter():
        if (own := element.attrib.pop("id", None)) in used:
            element.set("id", used[own])
        for key, value in element.attrib.items():
            if key == "href":
                element.set(key, f"#{used[value[1:]]}")
            elif "url(#" in value:
                element.set(key, REFERENCE.sub(lambda found: f"url(#{used[found[1]]})", value))


def _references(drawing: Xml.Element) -> Iterator[str]:
    for element in drawing.iter():
        for key, value in element.attrib.items():
            yield from [value[1:]] if key == "href" else REFERENCE.findall(value)
