"""Pictures of predicted memory for a paper: bars by kind as in the paper's Figure 9 (left), and the peak over a setting.

Rows are what `profile.Prediction.to_json` gives; a row may have `measured_bytes` too, which is drawn as a hollow marker. A
picture needs no display and none of the user's settings: the same rows give the same bytes. The kinds' colours keep apart for
the colour-blind (at least 26 in CIE76 between any two, for the three dichromacies of Machado et al. 2009), and go from dark to
light; the methods' are in `looks`.
"""

import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from recap_cli.errors import StorageError, UsageError
from recap_cli.memory.plot_style import looks_of
from recap_cli.memory.tracker import KINDS, Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
By = Literal["batch_size", "prune_ratio", "mask_ratio"]

SUFFIXES: dict[str, dict[str, None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # without dates
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "font.size": 10,
    "text.parse_math": False,  # a name may hold a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "recap",
    "pdf.fonttype": 42,
}
WIDTH = 7.0  # inches: a paper's two columns
FAR = 2.5  # a budget so many times the largest figure would press all else against the axis

# Label, colour, hatch; dark to light in CIE L* 18, 36, 54, 68, 80, 93.
KIND_LOOKS: dict[Kind, tuple[str, str, str]] = {
    "weights": ("weights", "#1B1F7A", ""),
    "gradients": ("gradients", "#A5173F", ""),
    "optimizer": ("optimizer state", "#2B8F80", "///"),
    "activations": ("activations", "#EB9130", ""),
    "temporary": ("temporary", "#7FD0F5", "\\\\\\"),
    "other": ("other", "#F3EE9A", ""),
}
DASHES = ("-", "--", ":", "-.")  # of one method's lines, where another setting differs as well

RATIOS = ("prune_ratio", "mask_ratio")  # zero for a method that has none
SETTINGS: dict[str, Callable[[Any], str]] = {
    "batch_size": "batch size {}".format,
    "micro_batch_size": "micro-batch size {}".format,
    "optimizer": "{}".format,
    "weights": "{}".format,
    "checkpointing": lambda on: "checkpointing" if on else "no checkpointing",
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
    colour: str
    marker: str
    dash: str
    predicted: list[tuple[float, int]]
    measured: list[tuple[float, int]]


def bars(rows: Sequence[Row], path: Path, *, title: str, budget_bytes: int | None = None) -> None:
    """Draw a stacked bar per row, of each kind's own maximum, with the peak instant as a diamond and as a number.

    The settings that all rows share stand in the title, after `title` (the model's name); those that differ beside the method.

    Raises:
        UsageError: the path ends in none of `SUFFIXES`, or there are no rows.
        StorageError: the file cannot be written.
    """
    _check(rows, path)
    labels = _labels(rows, without=())
    with picture(path, 1.9 + sum(0.2 + 0.17 * (label.count("\n") + 1) for label in labels)) as figure:
        axes = figure.add_subplot()
        ends = _stacks(axes, rows)
        _peaks(axes, rows, ends)
        axes.set_yticks(range(len(rows)), labels)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.45, -0.55)  # the first row on top
        longest = max(len(line) for row in rows for line in _numbers(row).splitlines())
        axes.set_xlim(0, _reach(ends, budget_bytes, 1.05 + 0.022 * longest))  # with room for the numbers beside the bars
        if budget_bytes is not None:
            _budget(axes.axvline, ends, budget_bytes)
        _megabytes(axes.xaxis, "memory (MB = 10^6 bytes)")
        _title(figure, rows, title, "memory of finetuning", without=())
        handles, labels = axes.get_legend_handles_labels()
        note = "bars: each kind's own maximum over a step"
        figure.legend(handles, labels, loc="outside lower center", ncols=4, title=note, fontsize=9, title_fontsize=9)


def curves(rows: Sequence[Row], path: Path, *, by: By, title: str, budget_bytes: int | None = None) -> None:
    """Draw the peak of every method over a setting, a line each; more where the rows of a method differ in another setting.

    A method that a ratio does not apply to (it is zero in all of its rows) is drawn flat over the others' values.

    Raises:
        UsageError: the path ends in none of `SUFFIXES`, or there are no rows.
        StorageError: the file cannot be written.
    """
    _check(rows, path)
    lines = _lines(rows, by)
    with picture(path, 4.2) as figure:
        axes = figure.add_subplot()
        for line in lines:
            _draw(axes, line)
        reached = [count / 1e6 for line in lines for _, count in [*line.predicted, *line.measured]]
        axes.set_ylim(0, _reach(reached, budget_bytes, 1.05))
        if any(line.measured for line in lines):
            axes.plot([], [], "o", color="#404040", markerfacecolor="none", label="measured")
        if budget_bytes is not None:
            _budget(axes.axhline, reached, budget_bytes)
        _values(axes, by, sorted({value for line in lines for value, _ in line.predicted}))
        _megabytes(axes.yaxis, "peak memory (MB = 10^6 bytes)")
        _title(figure, rows, title, "peak memory of finetuning", without=(by,))
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, fontsize=9, handlelength=3.0)


def check_path(path: Path) -> None:
    """Raise `UsageError` for an ending that is none of `SUFFIXES`, `StorageError` for a folder that cannot be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{path}: a picture's name ends in {', '.join(SUFFIXES)}", hint=f"name it {path.stem or 'memory'}.svg, say"
        )
    if not path.parent.is_dir():
        raise StorageError(f"{path} cannot be written: there is no folder {path.parent}", hint="make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _unwritable(path, f"nothing may be written to {path.parent}")


def _check(rows: Sequence[Row], path: Path) -> None:
    check_path(path)
    if not rows:
        raise UsageError(f"{path}: there are no predictions to draw", hint="name at least one method")


def _unwritable(path: Path, why: str) -> StorageError:
    return StorageError(f"{path} cannot be written: {why}", hint="make room, or name a file in a folder you may write to")


@contextmanager
def picture(path: Path, height: float) -> Iterator["Figure"]:
    """Lend an empty figure, `height` inches high, and write it to `path` at the end."""
    os.environ["MPLBACKEND"] = "agg"  # whatever the user has: a name that matplotlib does not know would be an error
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        drawn, suffix = BytesIO(), path.suffix.lower()
        figure.savefig(drawn, format=suffix[1:], bbox_inches="tight", pad_inches=0.05, metadata=SUFFIXES[suffix])
    try:
        path.write_bytes(drawn.getvalue())
    except OSError as error:  # a full disk, a folder of that name: the message names the file
        raise _unwritable(path, error.strerror or str(error)) from error


def _stacks(axes: "Axes", rows: Sequence[Row]) -> list[float]:
    """Draw the bars; where each row ends in megabytes, its peak and what was measured included."""
    ends = [0.0] * len(rows)
    for kind in KINDS:
        label, colour, hatch = KIND_LOOKS[kind]
        sizes = [row.get(f"{kind}_bytes", 0) / 1e6 for row in rows]
        look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.6, "height": 0.66}
        axes.barh(range(len(rows)), sizes, left=ends, label=label, **look)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    axes.barh(range(len(rows)), ends, height=0.66, fill=False, edgecolor="#404040", linewidth=0.5)  # light kinds on white paper
    return [max(end, row["peak_bytes"] / 1e6, (_measured(row) or 0) / 1e6) for end, row in zip(ends, rows, strict=True)]


def _peaks(axes: "Axes", rows: Sequence[Row], ends: Sequence[float]) -> None:
    """Mark the peak of each row and write it beside the bar; where it was measured too, that below the prediction."""
    shift = [0.0 if _measured(row) is None else 0.17 for row in rows]
    sizes, places = [row["peak_bytes"] / 1e6 for row in rows], [at - shift[at] for at in range(len(rows))]
    look: dict[str, Any] = {"marker": "D", "linestyle": "none", "zorder": 4}
    axes.plot(sizes, places, color="black", markersize=7.5, markeredgecolor="white", label="peak instant", **look)
    measured = [(count / 1e6, at + shift[at]) for at, row in enumerate(rows) if (count := _measured(row)) is not None]
    if measured:
        look |= {"markersize": 6, "color": "white", "markeredgecolor": "black"}
        axes.plot(*zip(*measured, strict=True), label="measured peak", **look)
    for at, row in enumerate(rows):
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # over the line of the budget
        where: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9, "bbox": white, "zorder": 3}
        axes.annotate(_numbers(row), (ends[at], at), (9, 0), **where)


def _numbers(row: Row) -> str:
    """The peak of a row, with the word where it is that of scoring and not of a training step; below it the measured one."""
    scoring: bool = row.get("evaluation_peak_bytes", 0) > row.get("training_peak_bytes", row["peak_bytes"])
    count = _measured(row)
    return _text(row["peak_bytes"]) + " (scoring)" * scoring + ("" if count is None else f"\n{_text(count)} measured")


def _budget(draw: Callable[..., object], reached: Sequence[float], budget_bytes: int) -> None:
    """Draw the budget with `draw`, dashed, and edged with white where it crosses something dark."""
    from matplotlib.patheffects import withStroke

    label = f"budget {_text(budget_bytes)}" + ("\n(beyond the axis)" if _is_far(reached, budget_bytes) else "")
    look: dict[str, Any] = {"color": "#202020", "linestyle": (0, (5, 3)), "linewidth": 1.4, "zorder": 2.5}
    draw(budget_bytes / 1e6, label=label, path_effects=[withStroke(linewidth=3.0, foreground="white")], **look)


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
        look = looks[method]
        lines.append(_Line(label, look.colour, look.marker, DASHES[seen[method] % len(DASHES)], predicted, measured))
        seen[method] += 1
    return lines


def _draw(axes: "Axes", line: _Line) -> None:
    values, counts = zip(*line.predicted, strict=True)
    look: dict[str, Any] = {"color": line.colour, "marker": line.marker, "zorder": 3}
    edge: dict[str, Any] = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.8}
    edge["markevery"] = 0.05 if len(line.predicted) > 16 else None  # as a share of the picture, so that they stay apart
    axes.plot(values, [count / 1e6 for count in counts], line.dash, label=line.label, linewidth=1.8, **edge, **look)
    if line.measured:
        values, counts = zip(*line.measured, strict=True)
        look |= {"markersize": 10, "markerfacecolor": "none", "markeredgewidth": 1.3}
        axes.plot(values, [count / 1e6 for count in counts], linestyle="none", **look)


def _values(axes: "Axes", by: By, grid: Sequence[float]) -> None:
    """Label the axis of the setting: per cent for a ratio; the batch sizes that there are, by doublings if they span much."""
    from matplotlib.ticker import NullLocator, PercentFormatter, StrMethodFormatter

    axes.set_xlabel(AXES[by])
    if by == "batch_size" and grid[-1] > 8 * grid[0]:
        axes.set_xscale("log", base=2)  # before the ticks, which it would set anew
    if len(grid) == 1 or (by == "batch_size" and len(grid) <= 12):
        axes.set_xticks(grid)
    if by in RATIOS:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        return
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _megabytes(axis: Any, label: str) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axis.set_label_text(label)
    axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.grid(True, color="#D9D9D9", linewidth=0.6)


def _title(figure: "Figure", rows: Sequence[Row], title: str, what: str, *, without: Sequence[str]) -> None:
    """Say what the picture shows, and the settings that all rows share."""
    shared = [key for key in SETTINGS if key not in without and len(_found(rows, key)) == 1]
    settings = [SETTINGS[key](value) for key in shared if (value := _found(rows, key)[0]) is not False]
    said = "predicted and measured" if any(_measured(row) is not None for row in rows) else "predicted"
    text = [f"{latin(title)}: {said} {what}", ", ".join(settings)]
    figure.suptitle("\n".join(textwrap.fill(line, 82) for line in text if line), x=0.01, ha="left", fontsize=10.5)


def _labels(rows: Sequence[Row], *, without: Sequence[str]) -> list[str]:
    """The method of each row, with the settings in which the rows differ, broken into short lines between settings."""
    differ = [key for key in SETTINGS if key not in without and len(_found(rows, key)) > 1]
    labels = []
    for row in rows:
        settings = [SETTINGS[key](row[key]) for key in differ if key in row and _applies(rows, row, key)]
        text = ", ".join([latin(row["method"]), *(setting.replace(" ", "\xa0") for setting in settings)])
        labels.append(textwrap.fill(text, 30).replace("\xa0", " "))
    return labels


def latin(text: str) -> str:
    """The text in one line, with question marks for letters that the font may lack."""
    return " ".join(text.encode("latin-1", "replace").decode("latin-1").split())


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


def _text(count_bytes: int) -> str:
    return f"{count_bytes / 1e6:,.1f} MB"


def _is_far(reached: Sequence[float], budget_bytes: int) -> bool:
    return budget_bytes / 1e6 > FAR * max(reached)


def _reach(reached: Sequence[float], budget_bytes: int | None, room: float) -> float:
    """How far the axis goes in megabytes, with room beyond the figures; up to the budget, if that is not far."""
    most = max(reached) * room
    if budget_bytes is not None and not _is_far(reached, budget_bytes):
        most = max(most, budget_bytes / 1e6 * 1.03)
    return most or 1.0
