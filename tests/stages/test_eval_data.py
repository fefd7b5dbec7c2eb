"""`recap eval --data` and `--predictions`: other data scored as the recipe's own, and what the models say of each example."""

import csv
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from recap_cli.cli import main
from recap_cli.data import prediction_files
from recap_cli.errors import CorruptStateError, DataError, RecapError, StorageError, UsageError
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.scoring import OtherData, PredictionFile
from recap_cli.stages.eval import evaluate
from recap_cli.stages.init import init
from recap_cli.stages.run import run
from recap_cli.state.store import State
from tests.pico import LABELS
from tests.tiny import VALIDATION, data_folder, tiny

FIGURES = ("loss", "accuracy", "f1", "matthews")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> State:
    torch.set_num_threads(1)
    return run(tiny("bert", rounds=1), tmp_path_factory.mktemp("states") / "texts")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> State:
    torch.set_num_threads(1)
    return run(tiny("vit", rounds=1), tmp_path_factory.mktemp("states") / "images")


def validation_rows() -> list[dict[str, str]]:
    with (data_folder() / "validation.csv").open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        path.write_text("".join(mark.join(row) + "\n" for row in [list(rows[0]), *(list(map(str, r.values())) for r in rows)]))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return rows
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(encoding="utf-8") as lines:
        found = [{key: value or None for key, value in row.items()} for row in csv.DictReader(lines)]
    kinds: dict[str, Callable[[str], Any]] = {"index": int, "probability": float, "loss": float}
    return [{key: kinds.get(key, str)(value) if value else None for key, value in row.items()} for row in found]


def figures(rows: list[dict[str, Any]]) -> list[list[float]]:
    return [[row[name] for name in FIGURES] for row in rows]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_the_same_examples_in_a_file_of_any_kind_score_the_same(texts: State, tmp_path: Path, suffix: str) -> None:
    other = write_rows(tmp_path / f"other{suffix}", validation_rows())
    which = ["full", "small", "best"]
    found = evaluate(texts, other=OtherData(data=other), which=which)
    assert figures(found) == figures(evaluate(texts, which=which))
    assert {(row["data"], row["examples"]) for row in found} == {(str(other), VALIDATION)}


@pytest.mark.parametrize("asked", ["data", "predictions"])
def test_a_tokenizer_that_was_altered_scores_nothing(texts: State, tmp_path: Path, asked: str) -> None:
    shutil.copytree(texts.path, tmp_path / "state")
    file = tmp_path / "state" / str(texts.manifest.full) / "tokenizer.json"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"w1"', b'"W1"'))  # as many bytes, and another meaning
    assert file.read_bytes() != whole
    other = OtherData(write_rows(tmp_path / "other.csv", validation_rows())) if asked == "data" else None
    written = PredictionFile(tmp_path / "written.csv") if asked == "predictions" else None
    with pytest.raises(CorruptStateError, match=r"tokenizer.json: its sha256 begins with"):
        evaluate(State.open(tmp_path / "state"), other=other, which=["best"], predictions=written)


def test_labels_count_by_their_names_also_where_the_file_lacks_the_first(texts: State, tmp_path: Path) -> None:
    some = [row for row in validation_rows() if row["label"] != sorted(LABELS)[0]]
    written = tmp_path / "written.csv"
    (row,) = evaluate(
        texts,
        other=OtherData(data=write_rows(tmp_path / "some.csv", some)),
        which=["best"],
        predictions=PredictionFile(written),
    )
    seen = read_rows(written)
    assert [one["label"] for one in seen] == [one["label"] for one in some]
    assert row["accuracy"] == pytest.approx(sum(one["label"] == one["predicted"] for one in seen) / len(some))


def test_names_that_a_file_brings_in_another_order_are_still_names(texts: State, tmp_path: Path) -> None:
    import datasets

    rows, names = validation_rows(), sorted(LABELS, reverse=True)
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    made = datasets.Dataset.from_dict(
        {"sentence": [row["sentence"] for row in rows], "label": [names.index(row["label"]) for row in rows]}, features
    )
    other = tmp_path / "other.parquet"
    made.to_parquet(str(other))
    assert figures(evaluate(texts, other=OtherData(data=other), which=["best"])) == figures(evaluate(texts, which=["best"]))


@pytest.mark.parametrize("label", ["elsewhere", "0"])
def test_a_label_that_the_model_does_not_know_is_refused_by_name(texts: State, tmp_path: Path, label: str) -> None:
    rows = [*validation_rows(), {"sentence": "w1 w2", "label": label}]
    other = write_rows(tmp_path / "other.csv", rows)
    with pytest.raises(DataError, match=rf"holds '{label}' in row {VALIDATION + 1}, but the labels are {LABELS[0]}"):
        evaluate(texts, other=OtherData(data=other), which=["best"])


def test_a_folder_of_class_folders_and_one_with_splits(images: State) -> None:
    own = figures(evaluate(images, which=["best"]))
    assert figures(evaluate(images, other=OtherData(data=data_folder() / "validation"), which=["best"])) == own
    assert figures(evaluate(images, other=OtherData(data=data_folder(), split="validation"), which=["best"])) != []
    with pytest.raises(DataError, match="has no split 'test'") as caught:
        evaluate(images, other=OtherData(data=data_folder() / "validation", split="test"), which=["best"])
    assert LABELS[0] in str(caught.value.hint)


def test_a_split_may_be_a_file_of_a_folder(texts: State, tmp_path: Path) -> None:
    write_rows(tmp_path / "test.jsonl", validation_rows())
    write_rows(tmp_path / "train.csv", validation_rows()[:4])
    found = evaluate(texts, other=OtherData(data=tmp_path, split="test"), which=["best"])
    assert figures(found) == figures(evaluate(texts, which=["best"]))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_predictions_have_a_row_for_each_model_and_example(texts: State, tmp_path: Path, suffix: str) -> None:
    written, which = tmp_path / f"written{suffix}", ["full", "best"]
    found = evaluate(texts, which=which, predictions=PredictionFile(written))
    seen = read_rows(written)
    assert [(one["model"], one["index"]) for one in seen] == [(name, i) for name in which for i in range(VALIDATION)]
    assert [one["label"] for one in seen] == [row["label"] for row in validation_rows()] * 2
    for row in found:
        mine = [one for one in seen if one["model"] == row["model"]]
        assert row["accuracy"] == pytest.approx(sum(one["label"] == one["predicted"] for one in mine) / VALIDATION)
        assert row["loss"] == pytest.approx(sum(one["loss"] for one in mine) / VALIDATION, rel=1e-5)
        assert all(1 / len(LABELS) <= one["probability"] <= 1 for one in mine)
        right = [one for one in mine if one["label"] == one["predicted"]]
        assert right
        for one in right:
            assert torch.tensor(one["probability"]).log() == pytest.approx(-one["loss"], abs=1e-5)
    assert found[0]["loss"] != found[1]["loss"]


def test_predictions_of_images_name_their_files(images: State, tmp_path: Path) -> None:
    written = tmp_path / "written.jsonl"
    evaluate(images, other=OtherData(data=data_folder() / "validation"), which=["best"], predictions=PredictionFile(written))
    assert all(Path(one["file"]).parent.name == one["label"] for one in read_rows(written))
    evaluate(images, which=["best"], predictions=PredictionFile(tmp_path / "own.jsonl"))
    assert read_rows(tmp_path / "own.jsonl") == read_rows(written)


def test_data_without_labels_give_predictions_and_no_metrics(texts: State, tmp_path: Path) -> None:
    rows = validation_rows()
    bare = write_rows(tmp_path / "bare.csv", [{"sentence": row["sentence"]} for row in rows])
    hidden = write_rows(tmp_path / "hidden.jsonl", [{**row, "label": -1} for row in rows])
    with pytest.raises(DataError, match="no labels to score with") as caught:
        evaluate(texts, other=OtherData(data=bare), which=["best"])
    assert "--predictions" in str(caught.value.hint)
    evaluate(texts, which=["best"], predictions=PredictionFile(tmp_path / "own.csv"))
    own = [one["predicted"] for one in read_rows(tmp_path / "own.csv")]
    for number, other in enumerate((bare, hidden)):
        notes: list[str] = []
        written = tmp_path / f"written{number}.csv"
        (found,) = evaluate(
            texts, other=OtherData(data=other), which=["best"], predictions=PredictionFile(written), say=notes.append
        )
        assert not set(FIGURES) & set(found)
        assert found["examples"] == VALIDATION
        assert "has no labels" in notes[0]
        assert [one["predicted"] for one in read_rows(written)] == own
        assert {(one["label"], one["loss"]) for one in read_rows(written)} == {(None, None)}


def test_images_in_a_folder_without_classes_are_data_without_labels(images: State, tmp_path: Path) -> None:
    for at, file in enumerate(sorted((data_folder() / "validation").rglob("*.png"))):
        (tmp_path / f"{at:02}.png").write_bytes(file.read_bytes())
    written = tmp_path / "written.csv"
    evaluate(images, other=OtherData(data=tmp_path), which=["best"], predictions=PredictionFile(written))
    evaluate(images, which=["best"], predictions=PredictionFile(tmp_path / "own.csv"))
    assert [one["predicted"] for one in read_rows(written)] == [one["predicted"] for one in read_rows(tmp_path / "own.csv")]
    assert read_rows(written)[3]["file"] == str(tmp_path / "03.png")


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"other": OtherData(Path("nowhere.csv"))}, DataError, "there is no file or folder nowhere.csv"),
        ({"other": OtherData(split="test")}, DataError, "no data set of the hub"),
        ({"other": OtherData(Path("there.csv"), "test")}, DataError, "is a file, which has no splits"),
        ({"other": OtherData(Path("other.csv"))}, DataError, "has no column 'sentence'"),
        ({"predictions": PredictionFile(Path("written.xlsx"))}, UsageError, "one of the suffixes .csv, .jsonl, .parquet"),
        ({"predictions": PredictionFile(Path("there.csv"))}, UsageError, "exists already"),
        ({"predictions": PredictionFile(Path("no/written.csv"))}, StorageError, "there is no folder no"),
        ({"predictions": PredictionFile(Path("folder.csv"))}, UsageError, "is a folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(
    texts: State,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    kind: type[RecapError],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    before = write_rows(tmp_path / "there.csv", validation_rows()).read_bytes()
    write_rows(tmp_path / "other.csv", [{"text": "w1", "label": LABELS[0]}])

    def load(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Context, "model", load)
    with pytest.raises(kind) as caught:
        evaluate(texts, which=["best"], **given)
    assert said in caught.value.message
    assert "--set" not in str(caught.value.hint)
    assert (tmp_path / "there.csv").read_bytes() == before


def test_predictions_that_cannot_be_written_leave_what_was_there(
    texts: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "written.csv"
    written.write_text("mine")
    plainly = os.replace

    def refuse(source: Any, to: Any) -> None:
        if Path(to) == written:
            raise OSError(errno.ENOSPC, "no space", str(to))
        plainly(source, to)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError):
        evaluate(texts, which=["best"], predictions=PredictionFile(written, force=True))
    assert written.read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["written.csv"]
    monkeypatch.undo()
    evaluate(texts, which=["best"], predictions=PredictionFile(written, force=True))
    assert len(read_rows(written)) == VALIDATION


def test_the_command_shows_a_table_and_json(
    texts: State, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    other = write_rows(tmp_path / "other.csv", validation_rows())
    written = tmp_path / "written.csv"
    given = ["eval", str(texts.path), "--data", str(other)]
    assert main([*given, "--predictions", str(written)]) == 0
    shown = capsys.readouterr()
    assert f"other.csv, {VALIDATION} examples" in shown.out
    assert f"wrote {written}" in shown.err
    assert main([*given, "--predictions", str(written)]) == UsageError.exit_code
    assert "--force" in capsys.readouterr().err
    assert main([*given, "--json", "--which", "best"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["model"], row["data"], row["examples"]) == ("best", str(other), VALIDATION)
    assert main([*given, "--force"]) == UsageError.exit_code


def test_numbers_are_no_places_among_names_that_the_training_data_have_written_out(texts: State, tmp_path: Path) -> None:
    rows = [{**row, "label": LABELS.index(row["label"])} for row in validation_rows()]
    with pytest.raises(DataError, match=rf"in row 1, but the labels are {LABELS[0]}"):
        evaluate(texts, other=OtherData(data=write_rows(tmp_path / "other.jsonl", rows)), which=["best"])


def test_a_file_of_the_users_own_beside_the_predictions_stays(texts: State, tmp_path: Path) -> None:
    (tmp_path / "written.csv.tmp").write_text("mine")
    evaluate(texts, which=["best"], predictions=PredictionFile(tmp_path / "written.csv"))
    assert (tmp_path / "written.csv.tmp").read_text() == "mine"
    assert {file.name for file in tmp_path.iterdir()} == {"written.csv", "written.csv.tmp"}


def test_predictions_go_through_a_link(texts: State, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "written.csv").write_text("old")
    (tmp_path / "written.csv").symlink_to("there/written.csv")
    evaluate(texts, which=["best"], predictions=PredictionFile(tmp_path / "written.csv", force=True))
    assert (tmp_path / "written.csv").is_symlink()
    assert len(read_rows(tmp_path / "there" / "written.csv")) == VALIDATION


def test_what_is_no_file_is_not_written_over(texts: State, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "written.csv")
    with pytest.raises(UsageError, match="is no ordinary file"):
        evaluate(texts, which=["best"], predictions=PredictionFile(tmp_path / "written.csv", force=True))
    (tmp_path / "link.csv").symlink_to("nowhere/written.csv")
    with pytest.raises(StorageError, match="there is no folder"):
        evaluate(texts, which=["best"], predictions=PredictionFile(tmp_path / "link.csv", force=True))


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    written = tmp_path / "written.jsonl"
    prediction_files.write(written, {"index": [0, 1, 2], "loss": [float("nan"), float("inf"), 0.5]})
    assert [json.loads(line, parse_constant=pytest.fail)["loss"] for line in written.read_text().splitlines()] == [
        None,
        None,
        0.5,
    ]


@pytest.mark.parametrize("junk", ["@eaDir", ".cache", "__MACOSX"])
def test_folders_that_systems_leave_beside_images_do_not_count(images: State, tmp_path: Path, junk: str) -> None:
    for at, file in enumerate(sorted((data_folder() / "validation").rglob("*.png"))):
        (tmp_path / f"{at:02}.png").write_bytes(file.read_bytes())
    (tmp_path / junk).mkdir()
    (row,) = evaluate(
        images, other=OtherData(data=tmp_path), which=["best"], predictions=PredictionFile(tmp_path / "written.csv")
    )
    assert row["examples"] == VALIDATION


def test_the_name_of_an_image_that_is_no_utf8_is_refused(images: State, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(next((data_folder() / "validation").rglob("*.png")).read_bytes())
    with pytest.raises(DataError, match="is not in UTF-8"):
        evaluate(images, other=OtherData(data=tmp_path), which=["best"], predictions=PredictionFile(tmp_path / "written.csv"))


def test_a_folder_without_images_is_told_in_the_words_of_the_command(images: State, tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError) as caught:
        evaluate(images, other=OtherData(data=tmp_path), which=["best"])
    assert "--data FOLDER" in str(caught.value.hint)
    assert "data.other" not in str(caught.value.hint)


def test_16_bit_images_without_bright_values_are_told(images: State, tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16
    for label in LABELS:
        (tmp_path / label).mkdir()
        Image.fromarray(values).save(tmp_path / label / "0.png")
    notes: list[str] = []
    evaluate(images, other=OtherData(data=tmp_path), which=["best"], say=notes.append)
    assert any("so 16 of 256 shades are kept" in note for note in notes)
    recipe = tiny("vit", data={"train": str(tmp_path), "validation": str(tmp_path)})
    noted = init(recipe, tmp_path / "state").manifest.made["notes"]
    assert sum("so 16 of 256 shades are kept" in note for note in noted) == 2
