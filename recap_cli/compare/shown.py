"""The metric that is shown first: on held-out data where a comparison has any, else on the validation data."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recap_cli.compare.metric_plots import Comparison, Row
from recap_cli.compare.schema import groups, metric_of
from recap_cli.core.task import Metric


def held_out_name(cells: Iterable[Mapping[str, Any]]) -> str | None:
    """Return what the held-out data of a comparison are called; None if it has none."""
    names = dict.fromkeys(cell["test"]["data"] for cell in cells if cell.get("test"))
    return ", ".join(names) or None


def main_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return rows whose `value`, `deviation` and `n` are of the held-out data, and `validation` the other mean."""
    return [
        {**row, "value": row["test"], "deviation": row["test_deviation"], "n": row["test_n"], "validation": row["value"]}
        for row in rows
    ]


def comparison_of(found: Mapping[str, Any], rows: Sequence[Row] | None = None) -> Comparison:
    """Return what the figures of results show; `rows` are their groups, if they are known already."""
    metric, data = metric_of(found), held_out_name(found["cells"])
    rows = groups(found["cells"], metric) if rows is None else rows
    if data is None:
        return Comparison(rows, metric, found["recipe"])
    return Comparison(main_rows(rows), Metric(f"{metric.name} on {data}", metric.better), found["recipe"])
