"""Figures of what a comparison's methods cost: memory by component and time by stage (the paper's Figure 9)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from recap_cli.compare.metric_plots import SYMBOLS, Comparison, Row, name_of, ratio_texts
from recap_cli.core.task import Metric
from recap_cli.memory.picture import FILE, Picture, picture
from recap_cli.memory.plot_bars import Part, Stack, peaks, stack, stack_page
from recap_cli.memory.plot_parts import legend_below, megabytes, numbers, title
from recap_cli.memory.plot_style import KINDS, STAGES
from recap_cli.memory.tracker import Kind

COMPONENTS: tuple[Kind, ...] = ("weights", "gradients", "optimizer", "activations")
PEAKS = {"peak_bytes": "peak, predicted", "device_peak_bytes": "peak, measured"}


def parts(found: Comparison) -> Picture:
    """Draw memory by component beside time by stage, a bar a method, each at the ratios of its best metric."""
    best = best_rows(found.costed, found.metric)
    with picture(FILE, 2.6 + 0.42 * len(best)) as drawn:
        left, right = drawn.figure.subplots(1, 2, sharey=True)
        ends = stack(left, _components(best, 1e6))
        for key, label in PEAKS.items():
            points = [(row["memory"][key] / 1e6, at) for at, row in enumerate(best) if row["memory"][key] is not None]
            peaks(left, points, label, hollow=key == "device_peak_bytes")
            ends += [size for size, _ in points]
        stack(right, _stages(best))
        left.set_yticks(range(len(best)), [_bar_label(row) for row in best], fontsize=9)
        right.tick_params(axis="y", length=0)
        left.set_xlim(0, max(ends) * 1.06 or 1.0)
        numbers(left.xaxis, "memory of finetuning (MB)")
        numbers(right.xaxis, "time of a run (seconds)")
        for axes, place in ((left, "lower left"), (right, "lower right")):
            legend_below(drawn, axes, place=place, columns=2)
        note = "each method at the ratios that are best on the validation data" if len(best) < len(found.costed) else ""
        title(drawn, "; ".join(filter(None, [f"{found.name}: memory and time", note])))
    return drawn


def memory_bars(rows: Sequence[Row]) -> Picture | None:
    """Draw memory by component for a page, a bar a row, with the predicted peaks; None where nothing is known."""
    known = [row for row in rows if any(row["memory"][f"{kind}_bytes"] for kind in COMPONENTS)]
    peaks = [row["memory"]["peak_bytes"] for row in known]
    label = "peak of a training step, predicted" if any(peak is not None for peak in peaks) else ""
    names = [name_of(row) for row in known]
    return stack_page(Stack(names, _components(known), megabytes, peaks, label), above=True) if known else None


def time_bars(rows: Sequence[Row], text: Callable[[float], str]) -> Picture | None:
    """Draw time by stage for a page, a bar a row, with the sums as `text` says them; None where nothing is known."""
    known = [row for row in rows if any(row["seconds"].values())]
    return stack_page(Stack([name_of(row) for row in known], _stages(known), text), above=True) if known else None


def best_rows(rows: Iterable[Row], metric: Metric) -> list[Row]:
    """For each method the row of its best mean on the validation data: nothing is chosen by held-out data."""
    found: dict[str, tuple[float, Row]] = {}
    for row in rows:
        value = row.get("validation", row["value"])
        if row["method"] not in found or metric.is_better(value, found[row["method"]][0]):
            found[row["method"]] = value, row
    return [row for _, row in found.values()]


def _components(rows: Sequence[Row], unit: float = 1.0) -> list[Part]:
    fills: list[tuple[str, Any]] = [(f"{kind}_bytes", KINDS[kind]) for kind in COMPONENTS]
    fills[-1] = (fills[-1][0], fills[-1][1]._replace(label="activations (predicted)"))
    return [Part(fill, [(row["memory"][key] or 0) / unit for row in rows]) for key, fill in fills]


def _stages(rows: Sequence[Row]) -> list[Part]:
    return [Part(fill, [row["seconds"][stage] or 0.0 for row in rows]) for stage, fill in STAGES.items()]


def _bar_label(row: Row) -> str:
    return "\n".join(filter(None, [FILE.text(row["method"]), ", ".join(ratio_texts(row, SYMBOLS))]))
