"""Pictures of a comparison show what there is, for any methods and any grid, without a display."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from recap_cli.compare import cost_plots, metric_plots
from recap_cli.compare import plots as figures
from recap_cli.compare.schema import Memory, Parameters, Product, Seconds
from recap_cli.core.task import LOSS, Metric
from recap_cli.memory.picture import Picture
from recap_cli.memory.plot_style import EVERY, KINDS, METHODS, NEUTRAL, STAGES, looks_of, palette
from recap_cli.report import pages
from tests.report.drawing import legend_of, marker_of, svgs

ACCURACY = Metric("accuracy")
ALL = ("metric-prune-ratio.png", "metric-mask-ratio.png", "metric-memory.png", "memory-time.png")


def row(method: str, value: float = 0.9, r_p: float | None = None, r_f: float | None = None, **memory: Any) -> dict[str, Any]:
    """A row as `compare.schema.groups` gives it."""
    held = {"weights_bytes": 800_000, "gradients_bytes": 400_000, "optimizer_bytes": 800_000}
    return {
        "method": method,
        "prune_ratio": r_p,
        "mask_ratio": r_f,
        "n": 2,
        "of": 2,
        "value": value,
        "deviation": 0.01,
        "steps": 90.0,
        "seconds": {"init": 1.0, "prune": 2.0, "mask": 1.0, "finetune": 9.0, "merge": 0.1},
        "memory": {**held, "activations_bytes": 600_000, "peak_bytes": 2_500_000, "device_peak_bytes": None, **memory},
        "parameters": {"full": 200_000.0, "product": 130_000.0, "trainable": 60_000.0},
        "product": {"bytes": 500_000.0, "latency_seconds": 0.01, "latency_batch": 32.0},
    }


def grid() -> list[dict[str, Any]]:
    ratios = (0.166, 0.333, 0.5)
    return [
        row("full-ft", 0.95),
        *(row("pre-ft", 0.9 - r / 5, r, peak_bytes=2_000_000) for r in ratios),
        *(row("recap", 0.94 - r / 5, r, f, peak_bytes=1_500_000) for r in ratios for f in (0.5, 0.875)),
    ]


def draw(rows: list[dict[str, Any]], folder: Path) -> list[str]:
    return figures.draw(rows, folder, metric=ACCURACY, title="digits")


def test_a_whole_grid_has_all_pictures_and_the_methods_in_their_colours(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # it would look for a display; importing it would fail
    assert sorted(draw(grid(), tmp_path)) == sorted(ALL)
    for name in ALL[:3]:
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1])
        assert (pixels == int(METHODS["recap"].colour[1:], 16)).any(), name


def test_what_has_no_figures_is_not_drawn(tmp_path: Path) -> None:
    waiting = row("recap", r_p=0.3, r_f=0.5) | {"value": None, "n": 0}
    assert draw([waiting], tmp_path) == []
    assert draw([row("full-ft"), waiting], tmp_path) == ["metric-memory.png", "memory-time.png"]
    unknown = row("recap", r_p=0.3, r_f=0.5, weights_bytes=None)
    assert draw([unknown], tmp_path) == ["metric-prune-ratio.png"]


def test_one_seed_and_one_ratio_are_drawn_as_well(tmp_path: Path) -> None:
    alone = row("recap", r_p=0.3, r_f=0.5) | {"deviation": None, "n": 1}
    assert draw([alone], tmp_path) == ["metric-prune-ratio.png", "metric-memory.png", "memory-time.png"]


def test_methods_with_names_that_no_font_has_are_drawn(tmp_path: Path) -> None:
    rows = [row("$x$ 方法", r_p=0.3, activations_bytes=None, peak_bytes=None), row("full-ft")]
    assert len(draw(rows, tmp_path)) == 3
    assert looks_of(row["method"] for row in rows)["$x$ 方法"] not in METHODS.values()


@pytest.mark.parametrize("by", ["prune_ratio", "mask_ratio"])
def test_a_line_is_a_method_at_one_value_of_its_other_ratio(by: str) -> None:
    found = metric_plots.Comparison(grid(), ACCURACY, "digits")
    lines = {line.label: [one[by] for one in line.rows] for line in metric_plots.lines(found, by)}
    assert lines["full-ft"] == [None]
    if by == "prune_ratio":
        assert lines["pre-ft"] == [0.166, 0.333, 0.5]
        assert lines.keys() == {"full-ft", "pre-ft", "recap, r_f 0.5", "recap, r_f 0.875"}
    else:
        assert lines["recap, r_p 0.333"] == [0.5, 0.875]
        assert lines.keys() == {"full-ft", "recap, r_p 0.166", "recap, r_p 0.333", "recap, r_p 0.5"}


def test_memory_is_compared_by_the_best_figure_that_all_have() -> None:
    rows = [row("full-ft", device_peak_bytes=3_000_000), row("recap", r_p=0.3, device_peak_bytes=2_000_000)]
    assert metric_plots.memory_of(rows) == ([3.0, 2.0], "peak memory of a training step, measured")
    rows[0]["memory"]["device_peak_bytes"] = None
    assert metric_plots.memory_of(rows) == ([2.5, 2.5], "peak memory of a training step, predicted")
    rows[0]["memory"]["peak_bytes"] = None
    assert metric_plots.memory_of(rows) == ([2.0, 2.0], "weights, gradients and optimizer state, held")


def test_the_bars_are_of_each_methods_best_ratios() -> None:
    best = cost_plots.best_rows(grid(), ACCURACY)
    assert [(one["method"], one["prune_ratio"]) for one in best] == [("full-ft", None), ("pre-ft", 0.166), ("recap", 0.166)]


def test_the_bars_are_of_the_lowest_loss_where_the_metric_is_the_loss() -> None:
    best = cost_plots.best_rows(grid(), LOSS)
    assert [(one["method"], one["prune_ratio"]) for one in best][:2] == [("full-ft", None), ("pre-ft", 0.5)]


def test_every_stage_and_every_method_has_a_colour_of_its_own_and_every_method_a_marker() -> None:
    for values in (
        [look.colour for look in EVERY],
        [look.dark for look in EVERY],
        [look.marker for look in EVERY],
        [fill.colour for fill in KINDS.values()],
        [fill.dark for fill in KINDS.values()],
        [fill.colour for fill in STAGES.values()],
        [fill.dark for fill in STAGES.values()],
    ):
        assert len(set(values)) == len(values)


def test_a_colour_has_one_dark_colour_whatever_it_is_used_for() -> None:
    pairs = {*NEUTRAL.items(), *((one.colour, one.dark) for one in (*EVERY, *KINDS.values(), *STAGES.values()))}
    assert {(colour.upper(), dark) for colour, dark in pairs} == set(palette().items())


STRANGERS = ("of a stranger", "another's", "without a result", "a third's")


def many() -> list[dict[str, Any]]:
    """A row of every method of ours and of strangers, one of which has no result."""
    rows = [row(method, 0.9, 0.3) for method in (*METHODS, *STRANGERS)]
    return [one | ({"value": None, "n": 0} if one["method"] == "without a result" else {}) for one in rows]


def drawn_in_a_file(rows: list[dict[str, Any]], path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, str]]:
    """The colour and the marker of each method, taken from what matplotlib has drawn of metric and memory."""
    seen: dict[str, Picture] = {}
    monkeypatch.setattr(figures, "save", lambda drawn, place: seen.update({place.name: drawn}))
    draw(rows, path)
    (axes,) = seen["metric-memory.png"].figure.axes
    handles, names = axes.get_legend_handles_labels()
    points = {name: handle[0] for name, handle in zip(names, handles, strict=True) if name != "Pareto front"}
    return {name: (line.get_color().lower(), line.get_marker()) for name, line in points.items()}


def page_of(rows: list[dict[str, Any]]) -> str:
    """The page of these rows."""
    parts: dict[str, Any] = {"memory": Memory, "parameters": Parameters, "product": Product, "seconds": Seconds}
    cells = [
        {"seed": 0, "state": "", "status": "done", "error": None, "last": None, "product_round": 1, "per_round": [], **one}
        for one in rows
    ]
    groups = [
        {**one, **{name: kind(**one[name]).model_dump() for name, kind in parts.items()}}
        | {"last": None, "statuses": {"done": 1}, "errors": [], "warning": None, "held_bytes": 2_000_000, "seconds_whole": 1.0}
        for one in rows
    ]
    found = {"recipe": "r", "metric": "accuracy", "better": "more", "task": "t", "created": "2026", "command": "", "place": "p"}
    found |= {"grid": {}, "machine": {}, "versions": {}, "total_steps": 1, "cells": cells, "groups": groups}
    return pages.results_page(found)


def drawn_in_tables(text: str) -> dict[str, tuple[str, str]]:
    """The colour and the marker before each method's name in the tables of a page."""
    seen: dict[str, tuple[str, str]] = {}
    for glyph, after in svgs(text):
        if glyph.get("aria-hidden") == "true":
            (mark,) = glyph.iter("path")
            method = after.partition(", r_p")[0].strip()
            assert seen.setdefault(method, marker_of(mark.attrib, text)) == marker_of(mark.attrib, text)
    return seen


def test_a_method_has_the_same_marker_and_colour_in_a_file_in_the_page_and_in_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_file, text = drawn_in_a_file(many(), tmp_path, monkeypatch), page_of(many())
    in_tables, in_page = drawn_in_tables(text), legend_of(text, "accuracy over memory, with the Pareto front")
    assert in_file.keys() == in_page.keys() == {*METHODS, *STRANGERS} - {"without a result"}
    assert in_tables.keys() == {*METHODS, *STRANGERS}
    assert in_file == in_page == {method: look for method, look in in_tables.items() if method != "without a result"}
    assert len(set(in_file.values())) == len(in_file)
