"""Pictures of a comparison of methods: the metric over ratios and over memory, and memory and time by their parts.

Rows are what `compare.schema.groups` gives, one for a method and its ratios over the seeds. What a picture has no figures
for is not drawn.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from recap_cli.compare.pareto import front
from recap_cli.memory.plot_style import Look, looks_of
from recap_cli.memory.plots import DASHES, KIND_LOOKS, latin, picture
from recap_cli.memory.tracker import Kind
from recap_cli.tasks.task import LESS_IS_BETTER, is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
Looks = Mapping[str, Look]  # by method

ASIDE = 0.012  # of the axis, between lines
FEW = 8  # points that have room for a label each
STAGE_COLOURS = {"init": "#D9D3C0", "prune": "#E69F00", "mask": "#5FB7E5", "finetune": "#0A62A8", "merge": "#000000"}
COMPONENTS: tuple[Kind, ...] = ("weights", "gradients", "optimizer", "activations")
SYMBOLS = {"prune_ratio": "r_p", "mask_ratio": "r_f"}
AXES = {
    "prune_ratio": "prune ratio r_p (% of the prunable parameters that go)",
    "mask_ratio": "mask ratio r_f (% of the small model's prunable parameters that are frozen)",
}


class Line(NamedTuple):
    """One line of a picture over a ratio: (ratio, mean, deviation or None) by ratio; one without a ratio lies flat."""

    label: str
    look: Look
    dash: str
    points: list[tuple[float | None, float, float | None]]


def draw(rows: Sequence[Row], folder: Path, *, metric: str, title: str) -> list[str]:
    """Write every picture that the rows have figures for, as PNG into `folder`; returns the files' names.

    Raises `StorageError` if one cannot be written, and whatever matplotlib raises.
    """
    looks = looks_of(row["method"] for row in rows)  # of all of them, as in the page: a stranger's hangs on those before it
    done = [row for row in rows if row["value"] is not None]
    pictures: dict[str, Callable[[Path], None]] = {}
    if _ratios(done, "prune_ratio"):
        pictures["metric-prune-ratio.png"] = lambda path: over_ratio(
            done, path, looks, by="prune_ratio", metric=metric, title=title
        )
    if len(_ratios(done, "mask_ratio")) > 1:
        pictures["metric-mask-ratio.png"] = lambda path: over_ratio(
            done, path, looks, by="mask_ratio", metric=metric, title=title
        )
    if remembered := [row for row in done if _held(row) is not None]:
        pictures["metric-memory.png"] = lambda path: over_memory(remembered, path, looks, metric=metric, title=title)
        pictures["memory-time.png"] = lambda path: parts(remembered, path, metric=metric, title=title)
    for name, write in pictures.items():
        write(folder / name)
    return list(pictures)


def over_ratio(rows: Sequence[Row], path: Path, looks: Looks, *, by: str, metric: str, title: str) -> None:
    """Draw the metric over r_p or r_f (the paper's Figures 4 and 8): mean and standard deviation, a line a method."""
    from matplotlib.ticker import PercentFormatter

    ratios = _ratios(rows, by)
    with picture(path, 4.2) as figure:
        axes = figure.add_subplot()
        span = ratios[-1] - ratios[0] or 0.2
        drawn = lines(rows, by, looks)
        sloping = [line for line in drawn if line.points[0][0] is not None]
        for line in drawn:
            at = sloping.index(line) - (len(sloping) - 1) / 2 if line in sloping else 0.0
            _draw_line(axes, line, at * ASIDE * span)
        axes.set_xlim(ratios[0] - 0.08 * span, ratios[-1] + 0.08 * span)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        if len(ratios) <= 9:
            axes.set_xticks(ratios, [f"{100 * ratio:.4g}%" for ratio in ratios])
        axes.set_xlabel(AXES[by])
        _finish(axes, metric, f"{latin(title)}: {metric}, mean {_seeds(rows)}")


def over_memory(rows: Sequence[Row], path: Path, looks: Looks, *, metric: str, title: str) -> None:
    """Draw the metric over the memory that finetuning takes, with the front of what nothing else beats (Figure 3)."""
    sizes, words = memory_of(rows)
    points = [(size, row["value"]) for size, row in zip(sizes, rows, strict=True)]
    several = _several(rows)
    with picture(path, 4.2) as figure:
        axes = figure.add_subplot()
        at = front(points, metric)
        xs, ys = [points[i][0] for i in at], [points[i][1] for i in at]
        axes.step(xs, ys, where="post", color="#808080", linestyle=(0, (4, 3)), linewidth=1.2, label="Pareto front", zorder=1)
        seen: set[str] = set()
        for row, (x, y) in zip(rows, points, strict=True):
            label = None if row["method"] in seen else latin(row["method"])
            seen.add(row["method"])
            _point(axes, x, y, row["deviation"], label, looks[row["method"]])
        for i in at if len(rows) > FEW else range(len(rows)):  # all labels of a large grid would hide each other
            if text := _ratio_text(rows[i], several[rows[i]["method"]]):
                axes.annotate(text, points[i], (6, 5), textcoords="offset points", fontsize=7.5, color="#404040")
        axes.set_xlim(0, max(x for x, _ in points) * 1.12 or 1.0)
        _thousands(axes, f"{words} (MB = 10^6 bytes)")
        _finish(axes, metric, f"{latin(title)}: {metric} against memory, mean {_seeds(rows)}")


def parts(rows: Sequence[Row], path: Path, *, metric: str, title: str) -> None:
    """Draw memory by component and time by stage, a bar a method (Figure 9), each at the ratios of its best metric."""
    best = best_rows(rows, metric)
    labels = [_bar_label(row) for row in best]
    with picture(path, 2.6 + 0.42 * len(best)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        memory = [
            (name, KIND_LOOKS[kind][1], [_part(row, f"{kind}_bytes", 1e6) for row in best]) for kind, name in _components()
        ]
        ends = _stack(left, memory)
        _peaks(left, best)
        _stack(
            right, [(stage, STAGE_COLOURS[stage], [row["seconds"][stage] or 0.0 for row in best]) for stage in STAGE_COLOURS]
        )
        left.set_yticks(range(len(best)), labels, fontsize=9)
        for axes in (left, right):
            axes.tick_params(axis="y", length=0)
        left.set_ylim(len(best) - 0.45, -0.55)
        left.set_xlim(0, max([*ends, *(_peak(row) for row in best)]) * 1.06 or 1.0)
        _thousands(left, "memory of finetuning (MB)")
        _thousands(right, "time of a run (seconds)")
        for axes, where in ((left, "outside lower left"), (right, "outside lower right")):
            handles, names = axes.get_legend_handles_labels()
            order = sorted(range(len(names)), key=lambda i: names[i].startswith("peak"))
            figure.legend([handles[i] for i in order], [names[i] for i in order], loc=where, ncols=2, fontsize=8.5)
        note = f"each method at the ratios of its best {metric}" if len(best) < len(rows) else ""
        figure.suptitle("; ".join(filter(None, [f"{latin(title)}: memory and time", note])), x=0.01, ha="left", fontsize=10.5)


def lines(rows: Sequence[Row], by: str, looks: Looks) -> list[Line]:
    """The lines over a ratio: one a method, more where its other ratio has several values.

    A method without the ratio lies flat, and is left out where it has several values of the other one.
    """
    (other,) = SYMBOLS.keys() - {by}
    grouped: dict[tuple[str, Any], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["method"], row[other]), []).append(row)
    several, found = _several(rows), list[Line]()
    drawn = dict.fromkeys((method for method, _ in grouped), 0)
    for (method, _), mine in grouped.items():
        if mine[0][by] is None and several[method]:
            continue
        text = _ratio_text(mine[0], [key for key in several[method] if key == other])
        label = ", ".join(filter(None, [latin(method), text]))
        points = sorted(((row[by], row["value"], row["deviation"]) for row in mine), key=lambda point: point[0] or 0.0)
        found.append(Line(label, looks[method], DASHES[drawn[method] % len(DASHES)], points))
        drawn[method] += 1
    return found


def memory_of(rows: Sequence[Row]) -> tuple[list[float], str]:
    """Megabytes of each row to compare them by, the best that all of them have: a measured peak, a predicted one, or what is
    held; and what that is.
    """
    for key, how in (("device_peak_bytes", "measured"), ("peak_bytes", "predicted")):
        known = [row["memory"][key] for row in rows]
        if None not in known:
            return [count / 1e6 for count in known], f"peak memory of a training step, {how}"
    return [(_held(row) or 0) / 1e6 for row in rows], "weights, gradients and optimizer state, held"


def best_rows(rows: Iterable[Row], metric: str) -> list[Row]:
    """For each method the row of its best mean."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["method"] not in found or is_better(metric, row["value"], found[row["method"]]["value"]):
            found[row["method"]] = row
    return list(found.values())


def _draw_line(axes: "Axes", line: Line, aside: float) -> None:
    """Draw one line, moved to the side by `aside`, so that error bars do not hide each other."""
    colour, marker = line.look.colour, line.look.marker
    flat = [(mean, deviation) for ratio, mean, deviation in line.points if ratio is None]
    for mean, deviation in flat:
        axes.axhline(mean, color=colour, linestyle=(0, (6, 2, 1, 2)), linewidth=1.4, label=line.label, zorder=2)
        if deviation:
            axes.axhspan(mean - deviation, mean + deviation, color=colour, alpha=0.1, linewidth=0, zorder=1)
    if not flat:
        xs, means, deviations = zip(*line.points, strict=True)
        bars: dict[str, Any] = {"yerr": [_known(deviation) for deviation in deviations], "capsize": 3.0, "elinewidth": 1.1}
        edge: dict[str, Any] = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.8}
        axes.errorbar(
            [x + aside for x in xs],
            means,
            fmt=line.dash,
            color=colour,
            marker=marker,
            label=line.label,
            zorder=3,
            **bars,
            **edge,
        )


def _point(axes: "Axes", x: float, y: float, deviation: float | None, label: str | None, look: Look) -> None:
    edge: dict[str, Any] = {"markersize": 8, "markeredgecolor": "white", "markeredgewidth": 0.8, "linestyle": "none"}
    axes.errorbar(
        x, y, yerr=_known(deviation), color=look.colour, marker=look.marker, label=label, capsize=3.0, elinewidth=1.1, **edge
    )


def _known(deviation: float | None) -> float:
    """The same, with what draws no error bar in the place of None."""
    return nan if deviation is None else deviation


def _stack(axes: "Axes", kinds: Iterable[tuple[str, str, Sequence[float]]]) -> list[float]:
    """Draw stacked bars, a row each; returns where they end."""
    ends: list[float] = []
    for name, colour, sizes in kinds:
        ends = ends or [0.0] * len(sizes)
        axes.barh(range(len(sizes)), sizes, left=ends, label=name, color=colour, edgecolor="white", linewidth=0.5, height=0.66)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    axes.barh(range(len(ends)), ends, height=0.66, fill=False, edgecolor="#404040", linewidth=0.5)
    return ends


def _peaks(axes: "Axes", rows: Sequence[Row]) -> None:
    """Mark the predicted peak of a training step and, hollow, the one that the device's allocator has measured."""
    for key, words, inside in (("peak_bytes", "peak, predicted", "#202020"), ("device_peak_bytes", "peak, measured", "white")):
        found = [(row["memory"][key] / 1e6, at) for at, row in enumerate(rows) if row["memory"][key] is not None]
        if found:
            edge = "white" if inside != "white" else "#202020"
            look: dict[str, Any] = {"marker": "D", "color": inside, "markeredgecolor": edge, "markersize": 6.5}
            axes.plot(*zip(*found, strict=True), linestyle="none", label=words, zorder=4, **look)


def _components() -> list[tuple[Kind, str]]:
    return [(kind, KIND_LOOKS[kind][0] + (" (predicted)" if kind == "activations" else "")) for kind in COMPONENTS]


def _part(row: Row, key: str, unit: float) -> float:
    return (row["memory"][key] or 0) / unit


def _peak(row: Row) -> float:
    return max(row["memory"][key] or 0 for key in ("peak_bytes", "device_peak_bytes")) / 1e6


def _held(row: Row) -> int | None:
    """Bytes of weights, gradients and optimizer state together, None where they are not known."""
    found = [row["memory"][f"{kind}_bytes"] for kind in COMPONENTS[:3]]
    return None if None in found else sum(found)


def _ratios(rows: Iterable[Row], key: str) -> list[float]:
    return sorted({row[key] for row in rows if row[key] is not None})


def _ratio_keys(row: Row) -> list[str]:
    return [key for key in SYMBOLS if row[key] is not None]


def _several(rows: Sequence[Row]) -> dict[str, list[str]]:
    """By method the ratios that it has several values of."""
    methods = dict.fromkeys(row["method"] for row in rows)
    return {
        method: [key for key in SYMBOLS if len(_ratios([row for row in rows if row["method"] == method], key)) > 1]
        for method in methods
    }


def _ratio_text(row: Row, keys: Iterable[str]) -> str:
    return ", ".join(f"{SYMBOLS[key]} {row[key]:.4g}" for key in keys if row[key] is not None)


def _bar_label(row: Row) -> str:
    return "\n".join(filter(None, [latin(row["method"]), _ratio_text(row, _ratio_keys(row))]))


def _seeds(rows: Iterable[Row]) -> str:
    """How many seeds the means are over, in words."""
    counts = sorted({row["n"] for row in rows})
    return f"of {'-'.join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))} seeds; bars: s.d."


def _thousands(axes: "Axes", label: str) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.xaxis.grid(True, color="#D9D9D9", linewidth=0.6)


def _finish(axes: "Axes", metric: str, title: str) -> None:
    axes.set_ylabel(f"{metric} (less is better)" if metric in LESS_IS_BETTER else metric)
    axes.yaxis.grid(True, color="#D9D9D9", linewidth=0.6)
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, fontsize=9, handlelength=3.0)
