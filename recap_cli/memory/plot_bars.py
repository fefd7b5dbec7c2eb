"""Stacked bars: the parts of a whole, a row each, with the peaks that they come to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from recap_cli.memory.picture import PAGE, Picture, picture
from recap_cli.memory.plot_parts import legend_below, legend_height, shortened
from recap_cli.memory.plot_style import INK, PAPER, SOFT, Fill

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR = 0.66  # of the distance between two bars
PEAK: Mapping[str, Any] = {"marker": "D", "linestyle": "none", "zorder": 4, "clip_on": False}
THICK = 13.0  # points, of a bar in a page
PITCH, PITCH_BELOW_LABEL = 19.0, 36.0  # points from bar to bar in a page, with labels beside the bars or above them
LONGEST = 58  # letters of a label that a page's width has room for
TOTAL = 0.24  # of a page's width, for the number at the end of a bar


class Part(NamedTuple):
    """A part of every bar of a stack."""

    fill: Fill
    sizes: Sequence[float]  # one for each bar


class Stack(NamedTuple):
    """The bars of a page: a label for each, their parts, and how an amount is said."""

    labels: Sequence[str]
    parts: Sequence[Part]
    text: Callable[[float], str]
    peaks: Sequence[float | None] = ()  # marked beside the parts; None: not known
    peak_label: str = ""


def stack(axes: "Axes", parts: Iterable[Part], *, bar: float = BAR) -> list[float]:
    """Draw stacked bars, the first row on top; returns where they end."""
    ends: list[float] = []
    for part in parts:
        ends = ends or [0.0] * len(part.sizes)
        look: dict[str, Any] = {"color": part.fill.colour, "hatch": part.fill.hatch, "edgecolor": PAPER, "linewidth": 0.6}
        axes.barh(range(len(ends)), part.sizes, left=ends, label=part.fill.label, height=bar, **look)
        ends = [end + size for end, size in zip(ends, part.sizes, strict=True)]
    axes.barh(range(len(ends)), ends, height=bar, fill=False, edgecolor=SOFT, linewidth=0.5)  # light kinds on white paper
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(ends) - 0.45, -0.55)
    return ends


def peaks(axes: "Axes", points: Sequence[tuple[float, float]], label: str, *, hollow: bool) -> None:
    """Mark the peaks at (amount, row) with diamonds: hollow ones were measured."""
    look: dict[str, Any] = {"color": PAPER, "markeredgecolor": INK} if hollow else {"color": INK, "markeredgecolor": PAPER}
    if points:
        axes.plot(*zip(*points, strict=True), label=label, markersize=6.5, **PEAK, **look)


def stack_page(stacked: Stack, *, above: bool) -> Picture:
    """The bars as a page has them: without an axis, each with its total; labels stand `above` the bars or beside them."""
    parts = [part for part in stacked.parts if any(part.sizes)]
    labels = [shortened(PAGE.text(label), LONGEST) for label in stacked.labels]
    legend = [part.fill.label for part in parts] + [stacked.peak_label] * bool(stacked.peak_label)
    pitch = PITCH_BELOW_LABEL if above else PITCH
    height = (len(labels) * pitch + 8) / 72 + legend_height(legend, PAGE.width)
    with picture(PAGE, height) as drawn:
        axes = drawn.figure.add_subplot()
        ends = stack(axes, parts, bar=THICK / pitch)
        _describe_parts(drawn, axes, stacked, parts)
        known = [(peak, float(at)) for at, peak in enumerate(stacked.peaks) if peak is not None]
        peaks(axes, known, stacked.peak_label, hollow=False)
        reached = [max(end, *(peak for peak, row in known if row == at), 0.0) for at, end in enumerate(ends)]
        axes.set_xlim(0, max(reached) / (1 - TOTAL) or 1.0)
        where: dict[str, Any] = {"textcoords": "offset points", "color": SOFT}
        for at, (end, size) in enumerate(zip(reached, ends, strict=True)):
            axes.annotate(stacked.text(size), (end, at), (8, 0), va="center", **where)
        if above:
            axes.set_ylim(len(ends) - 0.7, -0.75)
            for at, label in enumerate(labels):
                axes.annotate(label, (0, at), (0, THICK / 2 + 3), va="bottom", in_layout=False, **{**where, "color": INK})
        axes.set_yticks([] if above else range(len(ends)), [] if above else labels, color=INK)
        axes.xaxis.set_visible(False)
        axes.spines[:].set_visible(False)
        legend_below(drawn, axes)
    return drawn


def _describe_parts(drawn: Picture, axes: "Axes", stacked: Stack, parts: Sequence[Part]) -> None:
    """Give every part of every bar the words that name it and its amount."""
    for part, bars in zip(parts, axes.containers, strict=False):  # the last are the outlines
        for bar, size, label in zip(bars, part.sizes, stacked.labels, strict=True):
            if size:
                drawn.describe(bar, [f"{label}: {part.fill.label} {stacked.text(size)}"])
