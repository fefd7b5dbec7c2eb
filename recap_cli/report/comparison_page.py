"""What the page of a comparison shows beside the plain values: its pictures, and which of its cells have no result."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recap_cli.compare import pareto
from recap_cli.report import charts
from recap_cli.report.charts import DASHES, Point, Series, look
from recap_cli.report.template import duration, megabytes, metric
from recap_cli.tasks.task import LESS_IS_BETTER, goodness

STAGES = ("init", "prune", "mask", "finetune", "merge")
VARIED = ("method", "seed", "prune.ratio", "mask.ratio")  # by the grid
STATUSES = ("done", "failed", "impossible", "waiting")
KINDS = {
    "weights_bytes": "weights",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimizer state",
    "activations_bytes": "activations",
}
RATIOS = {"prune_ratio": "r_p", "mask_ratio": "r_f"}
AXES = {
    "prune_ratio": "prune ratio r_p (share of the prunable parameters that go)",
    "mask_ratio": "mask ratio r_f (share of the small model's that are frozen)",
}
Group = Mapping[str, Any]


def view(found: Mapping[str, Any]) -> dict[str, Any]:
    """The names that `comparison.html` uses beside those of `found`."""
    groups: Sequence[Group] = found["groups"]
    cells: Sequence[Mapping[str, Any]] = found["cells"]
    methods = [group["method"] for group in groups]
    cost, words = _cost(groups)
    measured = _measured(groups, cost)
    front = [measured[at] for at in pareto.front([(group[cost], group["value"]) for group in measured], found["metric"])]
    beaten_by_none = {(group[cost], group["value"]) for group in front}
    on_front = {(group["method"], *_ratios(group)) for group in measured if (group[cost], group["value"]) in beaten_by_none}
    rows = [_shown(group, methods, on_front) for group in groups]
    return {
        "groups": rows,
        "counts": {status: sum(cell["status"] == status for cell in cells) for status in STATUSES},
        "troubles": _troubles(cells),
        "best": _best(rows, found["metric"]),
        "better": "less" if found["metric"] in LESS_IS_BETTER else "more",
        "ratio_charts": [chart for ratio in RATIOS if (chart := _over_ratio(groups, ratio, found["metric"]))],
        "front_chart": _front_chart(groups, cost, words, front, found["metric"]) if front else None,
        "memory_chart": _memory_chart(groups),
        "time_chart": _time_chart(groups),
        "stages": STAGES,
        "memory_kinds": KINDS,
        "looks": {method: look(method, methods) for method in methods},
        "shapes": charts.SHAPES,
        "own_settings": _own_settings(cells),
        "recipe_text": text if isinstance(text := found.get("recipe_text"), str) else None,
    }


def _best(rows: Sequence[Group], metric: str) -> Group | None:
    """The row of the best mean, None where none has a result."""
    done = (row for row in rows if row["value"] is not None)
    return max(done, key=lambda row: goodness(metric, row["value"]), default=None)


def _own_settings(cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What was set for the cells of one method alone, by method."""
    found: dict[str, str] = {}
    for cell in cells:
        own = {key: value for key, value in (cell.get("settings") or {}).items() if key not in VARIED}
        if own:
            found[cell["method"]] = ", ".join(f"{key}={value}" for key, value in own.items())
    return found


def name_of(group: Group) -> str:
    """A method with its ratios, as `recap, r_p 50%, r_f 70%`."""
    ratios = [f"{short} {group[key]:.4g}" for key, short in RATIOS.items() if group[key] is not None]
    return ", ".join([group["method"], *ratios])


def _troubles(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cells that failed or are impossible; one record for the seeds that met the same error."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for cell in cells:
        if cell["status"] in ("failed", "impossible"):
            found.setdefault((name_of(cell), cell["status"], cell["error"]), []).append(cell["seed"])
    return [{"name": key[0], "status": key[1], "error": key[2], "seeds": seeds} for key, seeds in found.items()]


def _ratios(group: Group) -> tuple[float | None, float | None]:
    return group["prune_ratio"], group["mask_ratio"]


def _shown(group: Group, methods: Sequence[str], on_front: set[tuple[Any, ...]]) -> dict[str, Any]:
    """A group with its name, its look, and in words what is missing of it."""
    css, shape = look(group["method"], methods)
    full, product = group["parameters"]["full"], group["parameters"]["product"]
    missing = {status: number for status, number in group["statuses"].items() if status != "done" and number}
    return {
        **group,
        "name": name_of(group),
        "css": css,
        "shape": charts.SHAPES[shape],
        "front": (group["method"], *_ratios(group)) in on_front,
        "share": product / full if full and product is not None else None,
        "missing": ", ".join(f"{number} {status}" if group["n"] else status for status, number in missing.items()),
    }


def _cost(groups: Sequence[Group]) -> tuple[str, str]:
    """The memory that every group with a result has: the training step's peak if it was predicted, else what was held."""
    done = [group for group in groups if group["value"] is not None]
    if done and all(group["memory"]["peak_bytes"] is not None for group in done):
        return "peak_bytes", "predicted peak of a training step (MB)"
    return "held_bytes", "held while finetuning (MB)"


def _measured(groups: Sequence[Group], cost: str) -> list[dict[str, Any]]:
    """The groups that have a metric and a memory, the memory under the name `cost`."""
    found = [{**group, "peak_bytes": group["memory"]["peak_bytes"]} for group in groups if group["value"] is not None]
    return [group for group in found if group[cost] is not None]


def _over_ratio(groups: Sequence[Group], ratio: str, name: str) -> dict[str, Any] | None:
    """The metric over one ratio: a line for each method at its other ratio; flat for a method that has neither."""
    (other,) = (key for key in RATIOS if key != ratio)
    done, methods = [group for group in groups if group["value"] is not None], [group["method"] for group in groups]
    grid = sorted({group[ratio] for group in done if group[ratio] is not None})
    if len(grid) < 2:  # nothing is over anything
        return None
    lines: dict[tuple[str, float | None], list[Group]] = {}
    for group in done:
        if group[ratio] is None and group[other] is not None:
            continue  # a line for each value of a ratio that is not asked about
        lines.setdefault((group["method"], group[other]), []).append(group)
    series = []
    for (method, at), mine in lines.items():
        flat = mine[0][ratio] is None
        css, shape = look(method, methods)
        varied = [value for named, value in lines if named == method]
        dash = "1.5 3" if flat else DASHES[varied.index(at) % len(DASHES)]
        label = ", ".join([method, *([f"{RATIOS[other]} {at:.4g}"] if at is not None and len(varied) > 1 else [])])
        points = [Point(group[ratio] or 0.0, group["value"], _said(group), group["deviation"] or 0.0) for group in mine]
        series.append(Series(label, css, shape, points, dash, flat))
    return charts.plane(
        series,
        title=f"{name} over {RATIOS[ratio]}",
        x_label=AXES[ratio],
        y_label=name,
        x_text=lambda value: f"{value:.4g}",
        y_text=lambda value: f"{value:.4g}",
        x_marks=grid,
    )


def _front_chart(groups: Sequence[Group], cost: str, words: str, front: Sequence[Group], name: str) -> dict[str, Any]:
    """The metric over memory: a mark for each method at its ratios, and the front of those that no other beats in both."""
    methods = [group["method"] for group in groups]
    by_method: dict[str, list[Point]] = {}
    for group in _measured(groups, cost):
        said = f"{_said(group)}, {megabytes(group[cost])}"
        by_method.setdefault(group["method"], []).append(
            Point(group[cost] / 1e6, group["value"], said, group["deviation"] or 0.0)
        )
    return charts.plane(
        [Series(method, *look(method, methods), points, None) for method, points in by_method.items()],
        title=f"{name} over memory, with the Pareto front",
        x_label=words,
        y_label=name,
        x_text=lambda value: f"{value:,.6g}",
        y_text=lambda value: f"{value:.4g}",
        front=[(group[cost] / 1e6, group["value"]) for group in front],
    )


def _said(group: Group) -> str:
    spread = f" ± {metric(group['deviation'])}" if group["deviation"] is not None else ""
    return f"{name_of(group)}: {metric(group['value'])}{spread}"


def _memory_chart(groups: Sequence[Group]) -> dict[str, Any] | None:
    def rows() -> Iterator[tuple[str, Mapping[str, float | None], float | None]]:
        for group in groups:
            parts = {label: group["memory"][kind] for kind, label in KINDS.items()}
            if any(parts.values()):
                yield name_of(group), parts, group["memory"]["peak_bytes"]

    chart = charts.stacks(rows(), megabytes, "memory by component, of each method at its ratios")
    return chart if chart["bars"] else None


def _time_chart(groups: Sequence[Group]) -> dict[str, Any] | None:
    rows = [(name_of(group), group["seconds"], None) for group in groups if group["seconds_whole"]]
    return charts.stacks(rows, duration, "time by stage, of each method at its ratios") if rows else None
