"""What the page of several comparisons shows above them: a row for each method at its ratios, a column for each comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

from recap_cli.compare import rates
from recap_cli.compare.grid import place
from recap_cli.compare.metric_plots import name_of
from recap_cli.compare.shown import held_out_name
from recap_cli.memory.plot_style import looks_of
from recap_cli.report.inline_svg import glyph
from recap_cli.report.template import metric

Key = tuple[str, float, float]


def titles(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the recipes, each with its number, as several comparisons may have the same recipe."""
    return [f"{number}. {one['recipe']}" for number, one in enumerate(found, 1)]


def summary(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the table, in the order of the methods: name, glyph, and for each comparison a mean and its rate as texts."""
    by_key = [{_key(group): group for group in one["groups"]} for one in found]
    named = {key: group for groups in by_key for key, group in groups.items()}
    ordered = sorted(named, key=lambda key: (place(key[0]), *key[1:]))
    looks = looks_of(key[0] for key in ordered)
    held_out = [held_out_name(one["cells"]) is not None for one in found]
    return [
        {
            "name": name_of(named[key]),
            "glyph": glyph(looks[key[0]]),
            "columns": [_column(groups.get(key), known) for groups, known in zip(by_key, held_out, strict=True)],
        }
        for key in ordered
    ]


def _key(group: Mapping[str, Any]) -> Key:
    return group["method"], _ratio(group["prune_ratio"]), _ratio(group["mask_ratio"])


def _ratio(value: float | None) -> float:
    return -1.0 if value is None else value


def _column(group: Mapping[str, Any] | None, held_out: bool) -> tuple[str, str]:
    """The mean of a group and its rate; the mean is on held-out data if there is one.

    True `held_out`: its comparison has held-out data, so another mean is marked.
    """
    if group is None or group["value"] is None:
        return "", ""
    key, deviation = ("value", "deviation") if group["test"] is None else ("test", "test_deviation")
    spread = "" if group[deviation] is None else f" ± {metric(group[deviation])}"
    marked = " (validation)" if held_out and key == "value" else ""
    return f"{metric(group[key])}{spread}{marked}", "" if group["lr"] is None else rates.text(group["lr"])
