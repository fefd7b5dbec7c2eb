"""What figures are put together from: titles, legends, axes of numbers, and lines with marks."""

import textwrap
from collections.abc import Mapping, Sequence
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple

from recap_cli.memory.picture import Picture
from recap_cli.memory.plot_style import LINE, PAPER, SOFT, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

EDGE: Mapping[str, Any] = {"markeredgecolor": PAPER, "markeredgewidth": 0.8}
LEGEND_LINE_INCHES = 0.235  # of a page's font
LAST = ("peak", "measured", "budget", "Pareto front", "the best")  # in a legend: what is no part and no method
LEGEND_LETTERS = 46  # of a line
LETTER_INCHES = 0.092  # of a page's font, the widest that is likely


class Marks(NamedTuple):
    """Marks with error bars: places, values, deviations (None: no bar), and what each mark says in a page."""

    xs: Sequence[float]
    ys: Sequence[float]
    deviations: Sequence[float | None] = ()
    words: Sequence[str] = ()


def title(drawn: Picture, text: str) -> None:
    """Write the title over the whole figure of a file; a page says it in its own text."""
    if not drawn.medium.page:
        lines = [textwrap.fill(drawn.medium.text(line), 82) for line in text.split("\n") if line]
        drawn.figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10.5)


def y_label(drawn: Picture, axes: "Axes", text: str) -> None:
    """Name the y axis: along it in a file; above it in a page, where a phone leaves no width."""
    text = drawn.medium.text(text)
    if drawn.medium.page:
        axes.set_title(text, loc="left", fontsize=drawn.medium.font_size, color=SOFT, x=0.0, pad=8)
    else:
        axes.set_ylabel(text)


def numbers(axis: "Axis", label: str, most: int = 5) -> None:
    """Label an axis of amounts: at most so many round numbers, with a comma at the thousands."""
    axis.set_label_text(label)
    rounded: Any = axis.get_major_locator()
    rounded.set_params(nbins=most, steps=[1, 2, 2.5, 5, 10])
    axis.set_major_formatter("{x:,.12g}")
    grid(axis)


def megabytes(count_bytes: float) -> str:
    """Bytes as megabytes (10⁶)."""
    return f"{count_bytes / 1e6:,.1f} MB"


def percent(share: float, _: object = None) -> str:
    """A share of one as per cent, with the digits that it has."""
    return f"{100 * share:.4g}%"


def grid(axis: "Axis") -> None:
    """Draw thin lines at the ticks of an axis, below all else."""
    axis.grid(True, color=LINE, linewidth=0.6)


def legend(drawn: Picture, axes: "Axes") -> None:
    """Explain what has a label: beside the axes in a file, below them in a page."""
    if drawn.medium.page:
        legend_below(drawn, axes)
    else:
        axes.legend(loc="upper left", bbox_to_anchor=(1.03, 1.0), borderaxespad=0.0, fontsize=9, handlelength=3.0)


def legend_below(drawn: Picture, axes: "Axes", *, place: str = "lower left", note: str = "", columns: int = 0) -> None:
    """Explain what has a label below the figure, with marks alone after what is filled."""
    handles, names = axes.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda i: names[i].startswith(LAST))
    names = [fitting(name) for name in names]
    columns = columns or columns_of(names, drawn.medium.width)
    look = {"fontsize": drawn.medium.font_size if drawn.medium.page else 9, "title": note or None}
    look |= {"title_fontsize": look["fontsize"], "columnspacing": 1.2, "handlelength": 2.4 if drawn.medium.page else 2.0}
    look |= {"alignment": "left", "borderaxespad": 0.2, "borderpad": 0.2}
    drawn.figure.legend([handles[i] for i in order], [names[i] for i in order], loc=f"outside {place}", ncols=columns, **look)


def fitting(name: str) -> str:
    """A name in lines that a legend has room for."""
    return "\n".join(textwrap.fill(line, LEGEND_LETTERS) for line in name.split("\n"))


def shortened(name: str, most: int) -> str:
    """The name, or its beginning and an ellipsis where it has more than so many letters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def columns_of(names: Sequence[str], width: float) -> int:
    """How many columns a legend of these names has room for, on a page of that many inches."""
    longest = max((len(line) for name in names for line in name.split("\n")), default=1)
    return max(1, min(len(names), int(width // (0.6 + LETTER_INCHES * longest))))


def legend_height(names: Sequence[str], width: float) -> float:
    """Inches that a legend below a page's figure takes."""
    names = [fitting(name) for name in names]
    columns = columns_of(names, width)
    return LEGEND_LINE_INCHES * sum(
        max(name.count("\n") + 1 for name in names[i : i + columns]) for i in range(0, len(names), columns)
    )


def mark(drawn: Picture, axes: "Axes", marks: Marks, look: Look, *, label: str | None, **line: Any) -> None:
    """Draw marks in the look of a method, with error bars, joined by a line if `linestyle` says so."""
    given: dict[str, Any] = {"color": look.colour, "marker": look.marker, "markersize": look.size, "label": label, "zorder": 3}
    given |= {**EDGE, **line}
    if any(deviation is not None for deviation in marks.deviations):
        bars = [nan if deviation is None else deviation for deviation in marks.deviations]
        drawn_line = axes.errorbar(marks.xs, marks.ys, yerr=bars, capsize=3.0, elinewidth=1.1, **given).lines[0]
    else:
        (drawn_line,) = axes.plot(marks.xs, marks.ys, **given)
    if marks.words:
        drawn.describe(drawn_line, marks.words)
