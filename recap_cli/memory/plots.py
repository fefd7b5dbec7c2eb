"""Figures of predicted memory: bars by kind as in the paper's Figure 9 (left), and the peak over a setting.

Rows are what `predict.Prediction.to_json` gives; a row may have `measured_bytes` too, which is drawn as a hollow mark.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from recap_cli.errors import UsageError
from recap_cli.memory.picture import FILE, Picture, picture
from recap_cli.memory.plot_bars import Part, peaks, stack
from recap_cli.memory.plot_parts import EDGE, legend, legend_below, megabytes, numbers, percent, title, y_label
from recap_cli.memory.plot_style import DASHES, INK, KINDS, PAPER, SOFT, Look, looks_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
By = Literal["batch_size", "prune_ratio", "mask_ratio"]

FAR = 2.5  # a budget so many times the largest figure would press all else against the axis
RATIOS = ("prune_ratio", "mask_ratio")  # zero for a method that has none
SETTINGS: dict[str, Callable[[Any], str]] = {
    "batch_size": "batch size {}".format,
    "micro_batch_size": "micro-batch size {}".format,
    "optimizer": "{}".format,
    "weights": "{}".format,
    "checkpointing": lambda on: "no checkpointing" if not on else "checkpointing" if on is True else f"checkpointing of {on}",
    "fused_backward": lambda on: "fused backward" if on else "no fused backward",
    "prune_ratio": "prune ratio {:.1%}".format,
    "mask_ratio": "mask ratio {:.1%}".format,
}
AXES: dict[By, str] = {
    "batch_size": "batch size (examples)",
    "prune_ratio": "prune ratio (% of the prunable parameters that go)",
    "mask_ratio": "mask ratio (% of the small model's prunable parameters that are frozen)",
}


class _Line(NamedTuple):
    """One line of `curves`: its points as (value, bytes), and those that were measured."""

    label: str
    look: Look
    dash: str
    predicted: list[tuple[float, int]]
    measured: list[tuple[float, int]]


def bars(rows: Sequence[Row], *, name: str, budget_bytes: int | None = None) -> Picture:
    """Draw a stacked bar per row, of each kind's own maximum, with the peak instant as a diamond and as a number.

    The settings that all rows share stand in the title, after `name` (the model's); those that differ beside the method.

    Raises:
        UsageError: there are no rows.
    """
    _check(rows)
    labels = _labels(rows, without=())
    with picture(FILE, 1.9 + sum(0.2 + 0.17 * (label.count("\n") + 1) for label in labels)) as drawn:
        axes = drawn.figure.add_subplot()
        parts = [Part(fill, [row.get(f"{kind}_bytes", 0) / 1e6 for row in rows]) for kind, fill in KINDS.items()]
        ends = [
            max(end, row["peak_bytes"] / 1e6, (_measured(row) or 0) / 1e6)
            for end, row in zip(stack(axes, parts), rows, strict=True)
        ]
        _mark_peaks(axes, rows, ends)
        axes.set_yticks(range(len(rows)), labels)
        longest = max(len(line) for row in rows for line in _numbers(row).splitlines())
        axes.set_xlim(0, _reach(ends, budget_bytes, 1.05 + 0.022 * longest))  # with room for the numbers beside the bars
        if budget_bytes is not None:
            _budget(axes.axvline, ends, budget_bytes)
        numbers(axes.xaxis, "memory (MB = 10^6 bytes)", 7)
        title(drawn, _title(rows, name, "memory of finetuning", without=()))
        legend_below(drawn, axes, place="lower center", note="bars: each kind's own maximum over a step", columns=4)
    return drawn


def curves(rows: Sequence[Row], *, by: By, name: str, budget_bytes: int | None = None) -> Picture:
    """Draw the peak of every method over a setting, a line each; more where the rows of a method differ in another setting.

    A method that a ratio does not apply to (it is zero in all of its rows) is drawn flat over the others' values.

    Raises:
        UsageError: there are no rows.
    """
    _check(rows)
    lines = _lines(rows, by)
    with picture(FILE, 4.2) as drawn:
        axes = drawn.figure.add_subplot()
        for line in lines:
            _draw(axes, line)
        reached = [count / 1e6 for line in lines for _, count in [*line.predicted, *line.measured]]
        axes.set_ylim(0, _reach(reached, budget_bytes, 1.05))
        if any(line.measured for line in lines):
            axes.plot([], [], "o", color=SOFT, markerfacecolor="none", label="measured")
        if budget_bytes is not None:
            _budget(axes.axhline, reached, budget_bytes)
        _values(axes, by, sorted({value for line in lines for value, _ in line.predicted}))
        numbers(axes.yaxis, "", 7)
        y_label(drawn, axes, "peak memory (MB = 10^6 bytes)")
        title(drawn, _title(rows, name, "peak memory of finetuning", without=(by,)))
        legend(drawn, axes)
    return drawn


def _check(rows: Sequence[Row]) -> None:
    if not rows:
        raise UsageError("there are no predictions to draw", hint="name at least one method")


def _mark_peaks(axes: "Axes", rows: Sequence[Row], ends: Sequence[float]) -> None:
    """Mark the peak of each row and write it beside the bar; where it was measured too, that below the prediction."""
    shift = [0.0 if _measured(row) is None else 0.17 for row in rows]
    peaks(axes, [(row["peak_bytes"] / 1e6, at - shift[at]) for at, row in enumerate(rows)], "peak instant", hollow=False)
    measured = [(count / 1e6, at + shift[at]) for at, row in enumerate(rows) if (count := _measured(row)) is not None]
    peaks(axes, measured, "measured peak", hollow=True)
    for at, row in enumerate(rows):
        white = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}  # over the line of the budget
        where: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9, "bbox": white, "zorder": 3}
        axes.annotate(_numbers(row), (ends[at], at), (9, 0), **where)


def _numbers(row: Row) -> str:
    """The peak of a row, with the word where it is that of scoring and not of a training step; below it the measured one."""
    scoring: bool = row.get("evaluation_peak_bytes", 0) > row.get("training_peak_bytes", row["peak_bytes"])
    count = _measured(row)
    return megabytes(row["peak_bytes"]) + " (scoring)" * scoring + ("" if count is None else f"\n{megabytes(count)} measured")


def _budget(draw: Callable[..., object], reached: Sequence[float], budget_bytes: int) -> None:
    """Draw the budget with `draw`, dashed, on a white line that sets it off from something dark."""
    label = f"budget {megabytes(budget_bytes)}" + ("\n(beyond the axis)" if _is_far(reached, budget_bytes) else "")
    draw(budget_bytes / 1e6, color=PAPER, linewidth=3.4, zorder=2.4)
    draw(budget_bytes / 1e6, color=INK, linewidth=1.4, linestyle=(0, (5, 3)), label=label, zorder=2.5)


def _lines(rows: Sequence[Row], by: By) -> list[_Line]:
    """The lines of `curves`, in the order of the rows."""
    applying = [row for row in rows if _applies(rows, row, by)]
    grid = sorted({row[by] for row in applying or rows})
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row, label in zip(rows, _labels(rows, without=(by,)), strict=True):
        grouped.setdefault((row["method"], label), []).append(row)
    looks, seen, lines = looks_of(row["method"] for row in rows), dict.fromkeys((row["method"] for row in rows), 0), []
    for (method, label), mine in grouped.items():
        predicted = sorted({(row[by], row["peak_bytes"]) for row in mine})
        measured = sorted({(row[by], count) for row in mine if (count := _measured(row)) is not None})
        if applying and not _applies(rows, mine[0], by):  # what it holds is the same whatever the others' ratio is
            predicted = [(value, max(count for _, count in predicted)) for value in grid]
            measured = [(grid[-1], count) for _, count in measured]
        lines.append(_Line(label, looks[method], DASHES[seen[method] % len(DASHES)], predicted, measured))
        seen[method] += 1
    return lines


def _draw(axes: "Axes", line: _Line) -> None:
    values, counts = zip(*line.predicted, strict=True)
    look: dict[str, Any] = {"color": line.look.colour, "marker": line.look.marker, "markersize": line.look.size, "zorder": 3}
    every = 0.05 if len(line.predicted) > 16 else None  # as a share of the picture, so that marks stay apart
    megabytes = [count / 1e6 for count in counts]
    axes.plot(values, megabytes, line.dash, label=line.label, linewidth=1.8, markevery=every, **{**EDGE, **look})
    if line.measured:
        values, counts = zip(*line.measured, strict=True)
        look |= {"markersize": 10, "markerfacecolor": "none", "markeredgewidth": 1.3}
        axes.plot(values, [count / 1e6 for count in counts], linestyle="none", **look)


def _values(axes: "Axes", by: By, settings: Sequence[float]) -> None:
    """Label the axis of the setting: per cent for a ratio; the batch sizes that there are, by doublings if they span much."""
    axes.set_xlabel(AXES[by])
    if by == "batch_size" and settings[-1] > 8 * settings[0]:
        axes.set_xscale("log", base=2)  # before the ticks, which it would set anew
    if len(settings) == 1 or (by == "batch_size" and len(settings) <= 12):
        axes.set_xticks(settings)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(percent if by in RATIOS else "{x:,g}")


def _title(rows: Sequence[Row], name: str, what: str, *, without: Sequence[str]) -> str:
    """What the picture shows, and in a second line the settings that all rows share."""
    common = [key for key in SETTINGS if key not in without and len(_found(rows, key)) == 1]
    settings = [SETTINGS[key](value) for key in common if (value := _found(rows, key)[0]) is not False]
    how = "predicted and measured" if any(_measured(row) is not None for row in rows) else "predicted"
    return f"{name}: {how} {what}\n{', '.join(settings)}"


def _labels(rows: Sequence[Row], *, without: Sequence[str]) -> list[str]:
    """The method of each row, with the settings in which the rows differ, broken into short lines between settings."""
    differ = [key for key in SETTINGS if key not in without and len(_found(rows, key)) > 1]
    labels = []
    for row in rows:
        settings = [SETTINGS[key](row[key]) for key in differ if key in row and _applies(rows, row, key)]
        text = ", ".join([FILE.text(row["method"]), *(setting.replace(" ", "\xa0") for setting in settings)])
        labels.append(textwrap.fill(text, 30).replace("\xa0", " "))
    return labels


def _found(rows: Sequence[Row], key: str) -> list[Any]:
    """The values of a setting in the rows that it applies to; none for micro-batches that are whole batches."""
    if key == "micro_batch_size" and all(row.get(key) == row.get("batch_size") for row in rows):
        return []
    return list(dict.fromkeys(row[key] for row in rows if key in row and _applies(rows, row, key)))


def _applies(rows: Sequence[Row], row: Row, key: str) -> bool:
    """Whether a setting means anything to the method of a row: a ratio that is always zero does not."""
    return key not in RATIOS or any(other[key] for other in rows if other["method"] == row["method"])


def _measured(row: Row) -> int | None:
    count: int | None = row.get("measured_bytes")
    return count


def _is_far(reached: Sequence[float], budget_bytes: int) -> bool:
    return budget_bytes / 1e6 > FAR * max(reached)


def _reach(reached: Sequence[float], budget_bytes: int | None, room: float) -> float:
    """How far the axis goes in megabytes, with room beyond the figures; up to the budget, if that is not far."""
    most = max(reached) * room
    if budget_bytes is not None and not _is_far(reached, budget_bytes):
        most = max(most, budget_bytes / 1e6 * 1.03)
    return most or 1.0
