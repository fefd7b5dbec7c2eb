"""One page of several comparisons, and what a comparison's page says of rates and of held-out data."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from recap_cli.cli import main
from recap_cli.errors import RecapError, StateError, StorageError, UsageError
from recap_cli.report.report import report_joined
from tests.report.drawing import figure_of
from tests.report.test_pages import cell, page_of, read, sample


def tuned() -> dict[str, Any]:
    """Results of two methods at two rates each, scored on held-out data that would choose the other rate."""
    found = sample()
    values = {"full-ft": {1e-4: (0.8, 0.9), 3e-4: (0.85, 0.7)}, "recap": {1e-4: (0.7, 0.6), 3e-4: (0.6, 0.99)}}
    found["cells"] = [
        {**cell(method, seed, ratio, ratio), "lr": lr, "rate": lr, "value": value + seed / 100}
        | {"test": {"value": test + seed / 100, "examples": 1234, "data": "test.csv", "digest": "0"}}
        for method, rates in values.items()
        for ratio in [0.5 if method == "recap" else None]
        for lr, (value, test) in rates.items()
        for seed in (0, 1)
    ]
    return found | {"recipe": "texts", "grid": {"lrs": [1e-4, 3e-4]}}


def said(text: str) -> str:
    return " ".join(" ".join(read(text).text).split())


def table(text: str, label: str) -> list[list[str]]:
    """The rows of the first table of a region, a text for each cell."""
    region = text[text.index(f'aria-label="{label}"') :]
    rows = re.findall(r"<tr.*?</tr>", region[: region.index("</table>")], re.DOTALL)
    cells = [re.findall(r"<t[dh]\b[^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]
    return [[" ".join(re.sub(r"<[^>]+>", " ", one).split()) for one in row] for row in cells]


def check_ids(text: str) -> None:
    """Every id of a page is there once, and every reference has one."""
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, dict[str, Any]], Path]:
    """Writes results into a folder of a name; returns it."""

    def write(name: str, found: dict[str, Any]) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(found), encoding="utf-8")
        return tmp_path / name

    return write


def test_the_page_shows_the_held_out_metric_first_and_the_rate_that_the_validation_data_chose() -> None:
    text = page_of(tuned())
    head, full, recap = table(text, "table of results")
    assert head[:6] == ["method", "r_p", "r_f", "lr", "accuracy, held out", "accuracy, validation"]
    assert full[3:6] == ["0.0003", "0.7050 ± 0.0071", "0.8550 ± 0.0071"]
    assert recap[3:6] == ["0.0001", "0.6050 ± 0.0071", "0.7050 ± 0.0071"]
    words = said(text)
    assert "on test.csv, 1234 examples; nothing was chosen by them" in words
    assert "full-ft: its best rate 0.0003 is the highest of 2 that were tried" in words
    assert "recap, r_p 0.5, r_f 0.5: its best rate 0.0001 is the lowest of 2" in words
    figure = figure_of(text, "accuracy on test.csv over memory, with the Pareto front")
    titles = [str(title.text) for title in figure.iter("title")]
    assert any(title.startswith("full-ft: 0.7050 ± 0.0071") for title in titles)
    assert '<tr class="best"><th scope="row" class="left">' in text
    cells = table(text, "table of cells")
    assert cells[0][3:8] == ["lr", "seed", "status", "accuracy, held out", "accuracy, validation"]
    assert cells[1][3:8] == ["0.0001", "0", "done", "0.9000", "0.8000"]


def test_a_page_without_rates_and_held_out_data_says_nothing_of_them() -> None:
    text = page_of(sample())
    assert table(text, "table of results")[0][:5] == ["method", "r_p", "r_f", "accuracy", "last round"]
    assert "held-out" not in text
    assert "Held out" not in text
    assert "one rate" not in text


def test_a_row_without_a_result_is_as_wide_as_one_with_rates_and_held_out_data() -> None:
    found = tuned()
    found["cells"] += [{**cell("pre-ft", 0, 0.5), "status": "failed", "value": None, "error": "no", "lr": 0.1, "test": None}]
    text = page_of(found)
    head, *rows = table(text, "table of results")
    (spanned,) = re.findall(r'colspan="(\d+)"', text)
    assert [len(row) for row in rows] == [len(head), len(head), len(head) - int(spanned) + 1]
    assert "pre-ft, r_p 0.5, lr 0.1 , seed 0: failed" in said(text)


def test_several_comparisons_have_a_table_over_all_and_a_section_each(written: Any, tmp_path: Path) -> None:
    other = sample() | {"recipe": "images", "metric": "f1", "cells": [cell("full-ft", 0), cell("pre-ft", 0, 0.25)]}
    folders = [written("a", tuned()), written("b", other)]
    place = report_joined([folders[0], folders[1] / "results.json"], tmp_path / "all.html")
    text = place.read_text(encoding="utf-8")
    value, pruned = (f"{one['value']:.4f}" for one in other["cells"])
    assert table(text, "table of all comparisons") == [
        ["method", "1. texts accuracy, held out", "2. images f1, validation"],
        ["full-ft", "0.7050 ± 0.0071 lr 0.0003", value],
        ["pre-ft, r_p 0.25", "–", pruned],
        ["recap, r_p 0.5, r_f 0.5", "0.6050 ± 0.0071 lr 0.0001", "–"],
    ]
    words = said(text)
    assert words.index("Summary") < words.index("test.csv, 1234 examples") < words.index("f1, more is better")
    check_ids(text)
    assert len(re.findall('aria-label="accuracy on test.csv over memory', text)) == 1
    assert len(re.findall('aria-label="f1 over memory', text)) == 1
    levels = [int(level) for level in re.findall(r"<h(\d)", text)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert text.count("<html") == text.count("<main>") == 1


def test_a_value_that_a_held_out_column_lacks_is_marked_as_one_on_the_validation_data(written: Any, tmp_path: Path) -> None:
    found = tuned()
    for one in found["cells"]:
        one["test"] = one["test"] if one["method"] == "full-ft" else None
    folders = [written("a", found), written("b", tuned())]
    rows = table(report_joined(folders, tmp_path / "all.html").read_text(encoding="utf-8"), "table of all comparisons")
    assert rows[2][1:] == ["0.7050 ± 0.0071 (validation) lr 0.0001", "0.6050 ± 0.0071 lr 0.0001"]


def test_what_cannot_be_joined_is_refused(written: Any, tmp_path: Path) -> None:
    a, b = written("a", tuned()), written("b", sample())
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "state.yaml").write_text("schema: 1")
    out = tmp_path / "all.html"

    def refused(kind: type[RecapError], sources: list[Path], place: Path | None) -> str:
        with pytest.raises(kind) as caught:
            report_joined(sources, place)
        assert caught.value.hint
        assert not out.exists()
        return caught.value.message

    assert "belongs to no folder of theirs" in refused(UsageError, [a, b], None)
    assert "state: is a state, and several are joined only if all are comparisons" in refused(
        UsageError, [a, tmp_path / "state"], out
    )
    assert "results.json: is named twice" in refused(UsageError, [a, b, a / "results.json"], out)
    assert "there is no such file or folder" in refused(StateError, [a, tmp_path / "no"], out)
    assert "there is no folder" in refused(StorageError, [a, b], tmp_path / "no" / "all.html")


def test_the_command_takes_several(written: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = written("a", sample()), written("b", sample())  # with figures of every kind
    out = tmp_path / "all.html"
    assert main(["report", str(a), str(b), "--out", str(out)]) == 0
    check_ids(out.read_text(encoding="utf-8"))
    assert capsys.readouterr().out == f"{out}\n"
    assert main(["report", str(a), str(b)]) == UsageError.exit_code
    assert "hint: say where it goes: --out report.html" in capsys.readouterr().err
