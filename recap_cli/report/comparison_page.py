"""What the page of a comparison shows beside the plain values: its pictures, and which of its cells have no result."""

from collections.abc import Mapping, Sequence
from typing import Any

from recap_cli.compare import pareto
from recap_cli.compare.cost_plots import COMPONENTS, memory_bars, time_bars
from recap_cli.compare.metric_plots import SYMBOLS, Comparison, memory_of, name_of, over_memory, over_ratio, ratios_of
from recap_cli.compare.schema import metric_of
from recap_cli.core.task import Metric
from recap_cli.memory.picture import PAGE
from recap_cli.memory.plot_style import KINDS
from recap_cli.report.inline_svg import glyph, inline
from recap_cli.report.template import duration

STAGES = ("init", "prune", "mask", "finetune", "merge")
VARIED = ("method", "seed", "prune.ratio", "mask.ratio")  # by the grid
STATUSES = ("done", "failed", "impossible", "waiting")
Group = Mapping[str, Any]


def view(found: Mapping[str, Any]) -> dict[str, Any]:
    """The names that `comparison.html` uses beside those of `found`."""
    groups: Sequence[Group] = found["groups"]
    cells: Sequence[Mapping[str, Any]] = found["cells"]
    comparison = Comparison(groups, metric_of(found), found["recipe"])
    glyphs = {method: glyph(look) for method, look in comparison.looks.items()}
    front = _front(comparison)
    rows = [_shown(group, glyphs[group["method"]], is_front=_key(group) in front) for group in groups]
    return {
        "groups": rows,
        "counts": {status: sum(cell["status"] == status for cell in cells) for status in STATUSES},
        "troubles": _troubles(cells),
        "best": _best(rows, comparison.metric),
        "better": comparison.metric.better,
        **_figures(comparison),
        "stages": STAGES,
        "memory_kinds": {f"{kind}_bytes": KINDS[kind].label for kind in COMPONENTS},
        "own_settings": _own_settings(cells),
        "recipe_text": text if isinstance(text := found.get("recipe_text"), str) else None,
    }


def _figures(comparison: Comparison) -> dict[str, Any]:
    """The figures that there are values for, as SVG for the page; those over a ratio with their captions."""
    over = [
        (f"{comparison.metric.name} over {symbol}", over_ratio(comparison, by, PAGE))
        for by, symbol in SYMBOLS.items()
        if len(ratios_of(comparison.done, by)) > 1  # else nothing is over anything
    ]
    figures = {
        "front_figure": (over_memory(comparison, PAGE), f"{comparison.metric.name} over memory, with the Pareto front")
        if comparison.costed
        else (None, ""),
        "memory_figure": (memory_bars(comparison.rows), "memory by component, of each method at its ratios"),
        "time_figure": (time_bars(comparison.rows, duration), "time by stage, of each method at its ratios"),
    }
    drawn = {name: inline(one, name.partition("_")[0], label) if one else None for name, (one, label) in figures.items()}
    return drawn | {"ratio_figures": [(label, inline(one, f"ratio{at}", label)) for at, (label, one) in enumerate(over)]}


def _front(comparison: Comparison) -> set[tuple[Any, ...]]:
    """The methods at their ratios that no other beats in both the metric and memory; twins of such a one too."""
    rows = comparison.costed
    points = list(zip(memory_of(rows)[0], (row["value"] for row in rows), strict=True)) if rows else []
    beaten_by_none = {points[at] for at in pareto.front(points, comparison.metric)}
    return {_key(row) for row, point in zip(rows, points, strict=True) if point in beaten_by_none}


def _best(rows: Sequence[Group], metric: Metric) -> Group | None:
    """The row of the best mean, None where none has a result."""
    done = (row for row in rows if row["value"] is not None)
    return max(done, key=lambda row: metric.goodness(row["value"]), default=None)


def _own_settings(cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What was set for the cells of one method alone, by method."""
    found: dict[str, str] = {}
    for cell in cells:
        own = {key: value for key, value in (cell.get("settings") or {}).items() if key not in VARIED}
        if own:
            found[cell["method"]] = ", ".join(f"{key}={value}" for key, value in own.items())
    return found


def _troubles(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cells that failed or are impossible; one record for the seeds that met the same error."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for cell in cells:
        if cell["status"] in ("failed", "impossible"):
            found.setdefault((name_of(cell), cell["status"], cell["error"]), []).append(cell["seed"])
    return [{"name": key[0], "status": key[1], "error": key[2], "seeds": seeds} for key, seeds in found.items()]


def _key(group: Group) -> tuple[Any, ...]:
    return group["method"], group["prune_ratio"], group["mask_ratio"]


def _shown(group: Group, glyph: str, *, is_front: bool) -> dict[str, Any]:
    """A group with its name, its marker, and in words what is missing of it."""
    full, product = group["parameters"]["full"], group["parameters"]["product"]
    missing = {status: number for status, number in group["statuses"].items() if status != "done" and number}
    return {
        **group,
        "name": name_of(group),
        "glyph": glyph,
        "front": is_front,
        "share": product / full if full and product is not None else None,
        "missing": ", ".join(f"{number} {status}" if group["n"] else status for status, number in missing.items()),
    }
