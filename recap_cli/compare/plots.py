"""The figures of a comparison as files: those that there are values for."""

from collections.abc import Callable, Sequence
from pathlib import Path

from recap_cli.compare.cost_plots import parts
from recap_cli.compare.metric_plots import Comparison, Row, over_memory, over_ratio, ratios_of
from recap_cli.core.task import Metric
from recap_cli.memory.picture import FILE, Picture, save


def draw(rows: Sequence[Row], folder: Path, *, metric: Metric, title: str) -> list[str]:
    """Write every figure that the rows have values for, as PNG into `folder`; returns the files' names.

    Raises:
        StorageError: One cannot be written. matplotlib may raise anything else.
    """
    found = Comparison(rows, metric, title)
    figures: dict[str, Callable[[], Picture]] = {}
    if ratios_of(found.done, "prune_ratio"):
        figures["metric-prune-ratio.png"] = lambda: over_ratio(found, "prune_ratio", FILE)
    if len(ratios_of(found.done, "mask_ratio")) > 1:
        figures["metric-mask-ratio.png"] = lambda: over_ratio(found, "mask_ratio", FILE)
    if found.costed:
        figures["metric-memory.png"] = lambda: over_memory(found, FILE)
        figures["memory-time.png"] = lambda: parts(found)
    for name, figure in figures.items():
        save(figure(), folder / name)
    return list(figures)
