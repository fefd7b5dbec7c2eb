"""Figures of a comparison of methods: the metric over a ratio and over memory.

Rows are what `compare.schema.groups` gives, one for a method and its ratios over the seeds. What a figure has no values for
is not drawn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from recap_cli.compare.pareto import front
from recap_cli.core.task import Metric
from recap_cli.memory.picture import Medium, Picture, picture
from recap_cli.memory.plot_parts import (
    EDGE,
    Marks,
    grid,
    legend,
    legend_height,
    mark,
    megabytes,
    numbers,
    percent,
    title,
    y_label,
)
from recap_cli.memory.plot_style import DASHES, SOFT, Look, looks_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

ASIDE = 0.012  # of the axis, between lines
FEW = 8  # points that have room for a label each
ROOM = (0.3, 0.05)  # that such a label takes, as a share of the points' span
HEIGHT, PAGE_HEIGHT = 4.2, 3.2  # inches; a page's without its legend
HELD = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
SYMBOLS = {"prune_ratio": "r_p", "mask_ratio": "r_f"}
AXES = {
    "prune_ratio": "prune ratio r_p (% of the prunable parameters that go)",
    "mask_ratio": "mask ratio r_f (% of the small model's that are frozen)",
}


@dataclass(frozen=True)
class Comparison:
    """All rows of a comparison, those without a result too, with the metric and the name of the recipe."""

    rows: Sequence[Row]
    metric: Metric
    name: str

    @property
    def looks(self) -> dict[str, Look]:
        """The style of each method: that of a third-party method depends on those before it, so all rows count."""
        return looks_of(row["method"] for row in self.rows)

    @property
    def done(self) -> list[Row]:
        """The rows that have a result."""
        return [row for row in self.rows if row["value"] is not None]

    @property
    def costed(self) -> list[Row]:
        """The rows that have a result and whose memory is known."""
        return [row for row in self.done if held(row) is not None]


class Line(NamedTuple):
    """One line of a figure over a ratio: its rows by that ratio. A method without the ratio lies flat."""

    label: str
    look: Look
    dash: str
    by: str
    rows: Sequence[Row]

    @property
    def is_flat(self) -> bool:
        """Whether the line is the level of a method without the ratio."""
        return self.rows[0][self.by] is None


def over_ratio(found: Comparison, by: str, medium: Medium) -> Picture:
    """Draw the metric over r_p or r_f (the paper's Figures 4 and 8): mean and standard deviation, a line a method."""
    drawn_lines, ratios = lines(found, by), ratios_of(found.done, by)
    span = ratios[-1] - ratios[0] or 0.2
    with picture(medium, _height(medium, [line.label for line in drawn_lines])) as drawn:
        axes = drawn.figure.add_subplot()
        sloping = [line for line in drawn_lines if not line.is_flat]
        for line in drawn_lines:
            if line.is_flat:
                _draw_level(drawn, axes, line)
            else:
                at = sloping.index(line) - (len(sloping) - 1) / 2
                _draw_slope(drawn, axes, line, at * ASIDE * span)
        axes.set_xlim(ratios[0] - 0.08 * span, ratios[-1] + 0.08 * span)
        axes.xaxis.set_major_formatter(percent)
        if len(ratios) <= 9:
            axes.set_xticks(ratios)
        _finish(drawn, axes, found, AXES[by])
        title(drawn, f"{found.name}: {found.metric.name}, mean {_seeds(found.done)}")
    return drawn


def over_memory(found: Comparison, medium: Medium) -> Picture:
    """Draw the metric over the memory that finetuning takes, with the front of what nothing else beats (Figure 3)."""
    rows = found.costed
    sizes, words = memory_of(rows)
    points = [(size, row["value"]) for size, row in zip(sizes, rows, strict=True)]
    at_front = front(points, found.metric)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    with picture(medium, _height(medium, [*methods, "Pareto front"])) as drawn:
        axes = drawn.figure.add_subplot()
        for method in methods:
            mine = [i for i, row in enumerate(rows) if row["method"] == method]
            texts = [f"{_message(rows[i])}, {megabytes(sizes[i] * 1e6)}" for i in mine]
            deviations = [rows[i]["deviation"] for i in mine]
            marks = Marks([sizes[i] for i in mine], [rows[i]["value"] for i in mine], deviations, texts)
            mark(drawn, axes, marks, found.looks[method], label=medium.text(method), linestyle="none")
        xs, ys = [points[i][0] for i in at_front], [points[i][1] for i in at_front]
        most = max(sizes) * 1.12 or 1.0
        dashed: dict[str, Any] = {"color": SOFT, "linestyle": (0, (4, 3)), "linewidth": 1.2, "zorder": 1}
        axes.step([*xs, most], [*ys, ys[-1]], where="post", label="Pareto front", **dashed)
        if not medium.page:  # a phone has no room; there the marks say their ratios when they are pointed at
            _name_points(axes, rows, points, at_front)
        axes.set_xlim(0, most)
        numbers(axes.xaxis, "")
        _finish(drawn, axes, found, f"{words} (MB)" if medium.page else f"{words} (MB = 10^6 bytes)")
        title(drawn, f"{found.name}: {found.metric.name} against memory, mean {_seeds(rows)}")
    return drawn


def lines(found: Comparison, by: str) -> list[Line]:
    """The lines over a ratio: one a method, more where its other ratio has several values.

    A method without the ratio lies flat, and is left out where it has several values of the other one.
    """
    (other,) = SYMBOLS.keys() - {by}
    grouped: dict[tuple[str, Any], list[Row]] = {}
    for row in found.done:
        grouped.setdefault((row["method"], row[other]), []).append(row)
    several, made = _several(found.done), list[Line]()
    drawn = dict.fromkeys((method for method, _ in grouped), 0)
    for (method, _), mine in grouped.items():
        if mine[0][by] is None and several[method]:
            continue
        label = _named(mine[0], [key for key in several[method] if key == other])
        dash = DASHES[drawn[method] % len(DASHES)]
        made.append(Line(label, found.looks[method], dash, by, sorted(mine, key=lambda row: row[by] or 0.0)))
        drawn[method] += 1
    return made


def memory_of(rows: Sequence[Row]) -> tuple[list[float], str]:
    """Megabytes of each row to compare them by, the best that all of them have: a measured peak, a predicted one, or what is
    held; and what that is.
    """
    for key, how in (("device_peak_bytes", "measured"), ("peak_bytes", "predicted")):
        known = [row["memory"][key] for row in rows]
        if None not in known:
            return [count / 1e6 for count in known], f"peak memory of a training step, {how}"
    return [(held(row) or 0) / 1e6 for row in rows], "weights, gradients and optimizer state, held"


def held(row: Row) -> int | None:
    """Bytes of weights, gradients and optimizer state together, None where they are not known."""
    found = [row["memory"][key] for key in HELD]
    return None if None in found else sum(found)


def name_of(row: Row) -> str:
    """A method with its ratios, as `recap, r_p 0.5, r_f 0.7`."""
    return ", ".join([row["method"], *ratio_texts(row, SYMBOLS)])


def ratios_of(rows: Iterable[Row], key: str) -> list[float]:
    """The values of a ratio that the rows have, the least first."""
    return sorted({row[key] for row in rows if row[key] is not None})


def ratio_texts(row: Row, keys: Iterable[str]) -> list[str]:
    """Those ratios of a row that it has, as `r_p 0.5`."""
    return [f"{SYMBOLS[key]} {row[key]:.4g}" for key in keys if row[key] is not None]


def _draw_slope(drawn: Picture, axes: "Axes", line: Line, aside: float) -> None:
    """Draw one line, moved to the side by `aside`, so that error bars do not hide each other."""
    xs, ys = [row[line.by] + aside for row in line.rows], [row["value"] for row in line.rows]
    marks = Marks(xs, ys, [row["deviation"] for row in line.rows], [_message(row) for row in line.rows])
    mark(drawn, axes, marks, line.look, label=drawn.medium.text(line.label), linestyle=line.dash)


def _draw_level(drawn: Picture, axes: "Axes", line: Line) -> None:
    """Draw a method without the ratio from edge to edge, with its mark at the end and its deviation as a band."""
    row, colour = line.rows[0], line.look.colour
    look: dict[str, Any] = {"color": colour, "linestyle": (0, (6, 2, 1, 2)), "linewidth": 1.4, "zorder": 2}
    look |= {"marker": line.look.marker, "markersize": line.look.size, "markevery": [1], "clip_on": False, **EDGE}
    drawn.describe(axes.axhline(row["value"], label=drawn.medium.text(line.label), **look), [_message(row)])
    if row["deviation"]:
        edges = row["value"] - row["deviation"], row["value"] + row["deviation"]
        axes.axhspan(*edges, color=colour, alpha=0.1, linewidth=0, zorder=1)


def _name_points(axes: "Axes", rows: Sequence[Row], points: Sequence[tuple[float, float]], at_front: Sequence[int]) -> None:
    """Write the ratios beside the points, of many beside those at the front only; one that would hide another is left out."""
    several, named = _several(rows), list[tuple[float, float]]()
    wide, high = (max(values) - min(values) or 1.0 for values in zip(*points, strict=True))
    for i in at_front if len(rows) > FEW else range(len(rows)):
        x, y = points[i]
        free = all(abs(x - other_x) > ROOM[0] * wide or abs(y - other_y) > ROOM[1] * high for other_x, other_y in named)
        if free and (texts := ratio_texts(rows[i], several[rows[i]["method"]])):
            axes.annotate(", ".join(texts), points[i], (6, -6), textcoords="offset points", va="top", fontsize=7.5, color=SOFT)
            named.append(points[i])


def _finish(drawn: Picture, axes: "Axes", found: Comparison, x_label: str) -> None:
    """Name the axes and explain the lines."""
    name = found.metric.name
    axes.set_xlabel(x_label)
    y_label(drawn, axes, f"{name} (less is better)" if found.metric.better == "less" else name)
    grid(axes.yaxis)
    legend(drawn, axes)


def _height(medium: Medium, names: Sequence[str]) -> float:
    """Inches of a figure over two axes, with the legend of these names below it in a page."""
    return PAGE_HEIGHT + legend_height(names, medium.width) if medium.page else HEIGHT


def _message(row: Row) -> str:
    spread = f" ± {row['deviation']:.4f}" if row["deviation"] is not None else ""
    return f"{name_of(row)}: {row['value']:.4f}{spread}"


def _several(rows: Sequence[Row]) -> dict[str, list[str]]:
    """By method the ratios that it has several values of."""
    methods = dict.fromkeys(row["method"] for row in rows)
    return {
        method: [key for key in SYMBOLS if len(ratios_of([row for row in rows if row["method"] == method], key)) > 1]
        for method in methods
    }


def _named(row: Row, keys: Iterable[str]) -> str:
    return ", ".join([row["method"], *ratio_texts(row, keys)])


def _seeds(rows: Iterable[Row]) -> str:
    """How many seeds the means are over, in words."""
    counts = sorted({row["n"] for row in rows})
    return f"of {'-'.join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))} seeds; bars: s.d."
