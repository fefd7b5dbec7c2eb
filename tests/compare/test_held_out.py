"""Products are scored on held-out data: checked before anything runs, once for each cell, and anew where they are others."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recap_cli.compare import cell as cells
from recap_cli.compare import held_out, runner
from recap_cli.compare.schema import groups, metric_of
from recap_cli.compare.shown import comparison_of, held_out_name
from recap_cli.errors import DataError
from recap_cli.recipe import recipe as recipes
from recap_cli.rounds.scoring import OtherData
from recap_cli.stages.eval import evaluate
from recap_cli.state.store import State
from tests.compare.test_runner import plan, stored
from tests.pico import LABELS
from tests.tiny import data_folder, tiny


def folder(path: Path, names: tuple[str, ...] = LABELS, count: int = 2) -> Path:
    """A folder of class folders, each with images of the first of the labels."""
    for at, name in enumerate(names):
        (path / name).mkdir(parents=True, exist_ok=True)
        for image in sorted((data_folder() / "validation" / LABELS[at % len(LABELS)]).iterdir())[:count]:
            shutil.copy(image, path / name)
    return path


def with_test(recipe: str, path: Path, split: str | None = None, **given: Any) -> Any:
    made = plan(recipe, **given)
    return replace(made, held_out=held_out.checked(made.base, OtherData(path, split)))


@pytest.fixture
def scored(quick: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has held-out scores made up; lists the cells that were scored."""
    names: list[str] = []

    def tested(path: Path, _: OtherData) -> dict[str, Any]:
        State.open(path)
        names.append(path.name)
        return {"value": 0.25 * len(names), "examples": 6}

    monkeypatch.setattr(cells, "tested", tested)
    return names


def test_the_score_is_that_of_eval_and_the_name_has_no_folders(recipe: str, quick: list[str], tmp_path: Path) -> None:
    folder(tmp_path / "all" / "test")
    results = runner.compare(with_test(recipe, tmp_path / "all", "test", methods=["recap"]), Path("out"))
    (record,) = results["cells"]
    (row,) = evaluate(State.open(Path("out") / record["state"]), which=["best"], other=OtherData(tmp_path / "all" / "test"))
    assert record["test"].pop("digest") == stored(Path("out"))["cells"][0]["test"]["digest"]
    assert record["test"] == {"value": row["accuracy"], "examples": 6, "data": "all, split test"}
    (group,) = groups(results["cells"], metric_of(results))
    assert (group["test"], group["test_n"]) == (row["accuracy"], 1)
    assert str(tmp_path) not in Path("out/results.csv").read_text(encoding="utf-8")
    assert "test.value,test.examples,test.data" in Path("out/results.csv").read_text(encoding="utf-8")


def test_cells_that_were_done_before_are_scored_later_and_once(recipe: str, scored: list[str], tmp_path: Path) -> None:
    data = folder(tmp_path / "test")
    assert runner.compare(plan(recipe), Path("out"))["cells"][0]["test"] is None
    runner.compare(with_test(recipe, data), Path("out"))
    assert scored == ["full-ft-s0", "recap-rp0.4-rf0.6-s0"]
    shutil.move(data, tmp_path / "moved")  # the content counts
    results = runner.compare(with_test(recipe, tmp_path / "moved", seeds=[0, 1], methods=["recap"]), Path("out"))
    assert scored[2:] == ["recap-rp0.4-rf0.6-s1"]
    assert results["notes"] == []
    assert [record["test"]["value"] for record in results["cells"]] == [0.25, 0.5, 0.75]
    results = runner.compare(plan(recipe, seeds=[2], methods=["recap"]), Path("out"))
    assert results["notes"] == ["1 of 4 cells are not scored on held-out data: name these again with --test"]
    row = groups(results["cells"], metric_of(results))[1]
    assert (row["n"], row["test_n"], row["test"]) == (3, 2, 0.625)


def test_other_data_than_before_score_all_cells_anew_and_a_note_says_so(recipe: str, scored: list[str], tmp_path: Path) -> None:
    data = folder(tmp_path / "test")
    runner.compare(with_test(recipe, data), Path("out"))
    folder(data, count=3)
    results = runner.compare(with_test(recipe, data), Path("out"))
    assert results["notes"] == ["the held-out data are others: test before, with other content; all cells are scored anew"]
    results = runner.compare(with_test(recipe, folder(tmp_path / "later")), Path("out"))
    assert results["notes"] == ["the held-out data are others: test before, and later now; all cells are scored anew"]
    assert [record["test"]["value"] for record in results["cells"]] == [1.25, 1.5]
    assert len(scored) == 6


def test_a_cell_whose_state_is_gone_is_noted_and_keeps_no_score_on_other_data(
    recipe: str, scored: list[str], tmp_path: Path
) -> None:
    runner.compare(with_test(recipe, folder(tmp_path / "test")), Path("out"))
    shutil.rmtree("out/cells/full-ft-s0")
    results = runner.compare(with_test(recipe, folder(tmp_path / "later", count=1)), Path("out"))
    assert [record["test"] and record["test"]["data"] for record in results["cells"]] == [None, "later"]
    assert results["notes"][1:] == ["cells/full-ft-s0: its product was not scored on later: its state is gone"]
    assert [record["status"] for record in results["cells"]] == ["done", "done"]


def unlabelled(path: Path) -> Path:
    path.mkdir()
    shutil.copy(next((data_folder() / "validation" / LABELS[0]).iterdir()), path)
    return path


@pytest.mark.parametrize(
    ("make", "split", "problem"),
    [
        (lambda path: path, None, "there is no file or folder"),
        (unlabelled, None, "has no labels to score with"),
        (lambda path: folder(path, (*LABELS, "zebra")), None, "zebra"),
        (folder, "tset", "no split 'tset'"),
        (lambda _: None, "test", "the recipe's data are no data set of the hub"),
        (lambda _: data_folder() / "validation", None, "the recipe trains or chooses by these data"),
        (lambda _: data_folder(), "train", "the recipe trains or chooses by these data"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    make: Callable[[Path], Any], split: str | None, problem: str, recipe: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        held_out.checked(recipes.read(recipe), OtherData(make(tmp_path / "held"), split))
    assert problem in caught.value.message
    assert "--data" not in str(caught.value.hint)
    assert caught.value.hint


def test_texts_without_the_columns_of_the_recipe_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "test.csv"
    for text, problem in (
        ("text,label\nw1,cat\n", "sentence"),
        ("sentence\nw1\n", "no labels"),
        ("sentence,label\nw1,cow\n", "cow"),
    ):
        place.write_text(text)
        with pytest.raises(DataError, match=problem):
            held_out.checked(tiny("bert"), OtherData(place))
    with pytest.raises(DataError, match="trains or chooses by these data"):
        held_out.checked(tiny("bert"), OtherData(data_folder(), "validation"))  # validation.csv
    place.write_bytes((data_folder() / "validation.csv").read_bytes())
    with pytest.raises(DataError, match="a copy of them: the recipe trains or chooses by these data"):
        held_out.checked(tiny("bert"), OtherData(place))
    place.write_text("sentence,label\nw1,cat\n")
    assert held_out.checked(tiny("bert"), OtherData(place)).name == "test.csv"


def test_a_split_of_the_hub_is_refused_if_the_recipe_chooses_by_it() -> None:
    recipe = recipes.changed(
        recipes.read("quickstart"), {"data": {"name": "of/someone", "train_split": "train", "image": "image"}}
    )
    for split in ("train", "validation"):
        with pytest.raises(DataError, match="trains or chooses by these data"):
            held_out.checked(recipe, OtherData(None, split))


def test_figures_show_the_held_out_metric_and_choose_by_the_other(recipe: str, scored: list[str], tmp_path: Path) -> None:
    given = {"methods": ["recap"], "ratios": [0.2, 0.4]}
    results = runner.compare(with_test(recipe, folder(tmp_path / "test"), **given), Path("out"))
    shown = comparison_of(results)
    assert (shown.metric.name, held_out_name(results["cells"])) == ("accuracy on test", "test")
    assert [row["value"] for row in shown.rows] == [0.25, 0.5]
    results["cells"][0]["value"], results["cells"][1]["value"] = 0.9, 0.1  # where the held-out metric says the opposite
    from recap_cli.compare.cost_plots import best_rows

    shown = comparison_of(results)
    assert [row["prune_ratio"] for row in best_rows(shown.rows, shown.metric)] == [0.2]
    for record in results["cells"]:
        record["test"] = None
    assert comparison_of(results).metric.name == "accuracy"
