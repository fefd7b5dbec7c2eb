"""What the page of a comparison shows beside the plain values: its pictures, and which of its cells have no result."""

from collections.abc import Mapping, Sequence
from typing import Any

from recap_cli.compare import pareto, rates
from recap_cli.compare.cost_plots import COMPONENTS, memory_bars, time_bars
from recap_cli.compare.metric_plots import SYMBOLS, Comparison, memory_of, name_of, over_memory, over_ratio, ratios_of
from recap_cli.compare.rate_axis import keys_in
from recap_cli.compare.shown import comparison_of, held_out_name
from recap_cli.core.task import Metric
from recap_cli.memory.picture import PAGE
from recap_cli.memory.plot_style import KINDS
from recap_cli.report.inline_svg import glyph, inline
from recap_cli.report.template import duration

STAGES = ("init", "prune", "mask", "finetune", "merge")
VARIED = ("method", "seed", "prune.ratio", "mask.ratio")  # by the grid, beside the rates
STATUSES = ("done", "failed", "impossible", "waiting")
Group = Mapping[str, Any]


def view(found: Mapping[str, Any], at: str = "", level: int = 2) -> dict[str, Any]:
    """The names that `comparison_body.html` uses beside those of `found`.

    `at` stands before every id, so that a page may hold several comparisons; `level` is that of their headings.
    """
    groups: Sequence[Group] = found["groups"]
    cells: Sequence[Mapping[str, Any]] = found["cells"]
    comparison = comparison_of(found, groups)
    glyphs = {method: glyph(look) for method, look in comparison.looks.items()}
    front = _front(comparison)
    rows = [
        _shown(group, main, glyphs[group["method"]], is_front=_key(group) in front)
        for group, main in zip(groups, comparison.rows, strict=True)
    ]
    return {
        "groups": rows,
        "counts": {status: sum(cell["status"] == status for cell in cells) for status in STATUSES},
        "troubles": _troubles(cells),
        "best": _best(rows, comparison.metric),
        "better": comparison.metric.better,
        **_figures(comparison, at),
        "at": at,
        "level": level,
        "held_out": held_out_name(cells),
        "examples": list(dict.fromkeys(cell["test"]["examples"] for cell in cells if cell.get("test"))),
        "main_metric": comparison.metric.name,
        "varied": (varied := rates.are_varied(cells)),
        "rate_notes": [note for group in groups if varied and (note := rates.note(group, name_of(group)))],
        "stages": STAGES,
        "memory_kinds": {f"{kind}_bytes": KINDS[kind].label for kind in COMPONENTS},
        "own_settings": _own_settings(cells),
        "recipe_text": text if isinstance(text := found.get("recipe_text"), str) else None,
    }


def _figures(comparison: Comparison, at: str) -> dict[str, Any]:
    """The figures that there are values for, as SVG for the page; those over a ratio with their captions.

    `at` stands before the ids of each.
    """
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
    drawn = {
        name: inline(one, f"{at}{name.partition('_')[0]}", label) if one else None for name, (one, label) in figures.items()
    }
    ratios = [(label, inline(one, f"{at}ratio{number}", label)) for number, (label, one) in enumerate(over)]
    return drawn | {"ratio_figures": ratios}


def _front(comparison: Comparison) -> set[tuple[Any, ...]]:
    """The methods at their ratios that no other beats in both the metric and memory; twins of such a one too."""
    rows = comparison.costed
    points = list(zip(memory_of(rows)[0], (row["value"] for row in rows), strict=True)) if rows else []
    beaten_by_none = {points[at] for at in pareto.front(points, comparison.metric)}
    return {_key(row) for row, point in zip(rows, points, strict=True) if point in beaten_by_none}


def _best(rows: Sequence[Group], metric: Metric) -> Group | None:
    """The row of the best mean, None where none has a result."""
    done = (row for row in rows if row["main"] is not None)
    return max(done, key=lambda row: metric.goodness(row["main"]), default=None)


def _own_settings(cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What was set for the cells of one method alone, by method."""
    found: dict[str, str] = {}
    for cell in cells:
        varied = (*VARIED, *keys_in(cell.get("settings") or {}, cell.get("lr")))
        own = {key: value for key, value in (cell.get("settings") or {}).items() if key not in varied}
        if own:
            found[cell["method"]] = ", ".join(f"{key}={value}" for key, value in own.items())
    return found


def _troubles(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cells that failed or are impossible; one record for the seeds that met the same error."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for cell in cells:
        if cell["status"] in ("failed", "impossible"):
            name = ", ".join([name_of(cell), *([] if cell.get("lr") is None else [f"lr {rates.text(cell['lr'])}"])])
            found.setdefault((name, cell["status"], cell["error"]), []).append(cell["seed"])
    return [{"name": key[0], "status": key[1], "error": key[2], "seeds": seeds} for key, seeds in found.items()]


def _key(group: Group) -> tuple[Any, ...]:
    return group["method"], group["prune_ratio"], group["mask_ratio"]


def _shown(group: Group, main: Group, glyph: str, *, is_front: bool) -> dict[str, Any]:
    """A group with its name, its marker, its mean in the figures, and in words what is missing of it."""
    full, product = group["parameters"]["full"], group["parameters"]["product"]
    missing = {status: number for status, number in group["statuses"].items() if status != "done" and number}
    return {
        **group,
        "name": name_of(group),
        "glyph": glyph,
        "main": main["value"],
        "rate": rates.text(group.get("lr")) if group["n"] else "",
        "front": is_front,
        "share": product / full if full and product is not None else None,
        "missing": ", ".join(f"{number} {status}" if group["n"] else status for status, number in missing.items()),
    }
