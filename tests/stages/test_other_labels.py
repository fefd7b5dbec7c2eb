"""Labels of other data mean what those of validation data mean, whether the training data had names, words or numbers."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from recap_cli.data import sources
from recap_cli.errors import DataError
from recap_cli.rounds.scoring import OtherData, PredictionFile
from recap_cli.stages.eval import evaluate
from recap_cli.stages.init import init
from recap_cli.state.store import State
from tests.tiny import tiny


def table(labels: list[Any], names: list[str] | None = None) -> pa.Table:
    found = pa.table({"sentence": [f"w{at} w{at + 1}" for at in range(len(labels))], "label": labels})
    if names is None:
        return found
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return found.replace_schema_metadata(features.arrow_schema.metadata)


def write(path: Path, labels: list[Any], names: list[str] | None = None) -> Path:
    parquet.write_table(table(labels, names), path)
    return path


def made(folder: Path, train: pa.Table, validation: pa.Table) -> State:
    files = {}
    for split, rows in (("train", train), ("validation", validation)):
        files[split] = str(folder / f"{split}.parquet")
        parquet.write_table(rows, files[split])
    return init(tiny("bert", data=files), folder / "state")


def seen(state: State, folder: Path, **given: Any) -> list[str]:
    """The labels that `eval` takes the examples to have."""
    written = folder / "written.parquet"
    evaluate(
        state, which=["full"], other=OtherData(**given) if given else None, predictions=PredictionFile(written, force=True)
    )
    return [str(label) for label in parquet.read_table(written).column("label").to_pylist()]


@pytest.mark.parametrize(
    ("train", "names", "other", "its_own", "expected"),
    [
        ([0, 1] * 4, ["no", "yes"], [1, 0], None, ["yes", "no"]),
        ([0, 1] * 4, ["no", "yes"], [1, 0], ["yes", "no"], ["no", "yes"]),
        ([0, 1] * 4, ["no", "yes"], ["Yes", "no"], None, ["yes", "no"]),
        (["no", "yes"] * 4, None, ["Yes", "NO"], None, ["yes", "no"]),
        ([1, 2, 3] * 4, None, [1, 2, 1], None, ["1", "2", "1"]),
        ([1, 2, 3] * 4, None, [1, 2, 1], ["1", "2", "3"], ["2", "3", "2"]),
        ([0, 1, 2] * 4, ["1", "2", "3"], [1, 2, 3], None, ["1", "2", "3"]),
        ([0, 1, 2] * 4, ["1", "2", "3"], [0, 1, 2], None, ["1", "2", "3"]),
    ],
)
def test_other_data_are_read_as_validation_data_are(
    tmp_path: Path, train: list[Any], names: Any, other: list[Any], its_own: Any, expected: list[str]
) -> None:
    state = made(tmp_path, table(train, names), table(other, its_own))
    assert seen(state, tmp_path) == expected
    assert seen(state, tmp_path, data=write(tmp_path / "other.parquet", other, its_own)) == expected


@pytest.mark.parametrize(
    ("train", "names", "test", "expected"),
    [
        ([1, 2, 3] * 4, None, [1, 2, 1, 2], ["1", "2", "1", "2"]),
        ([0, 1, 2] * 4, ["a b", "c d", "e f"], [1, 2, 1, 0], ["c d", "e f", "c d", "a b"]),
    ],
)
def test_a_split_of_the_hub_is_read_as_the_training_split_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: list[int], names: Any, test: list[int], expected: list[str]
) -> None:
    splits = {"train": table(train, names), "validation": table(train[:3], names), "test": table(test, names)}
    monkeypatch.setattr(sources, "read_hub", lambda name, subset, wanted: [splits[one] for one in wanted])
    recipe = tiny("bert", data={"train": None, "validation": None, "name": "some/set"})
    state = init(recipe, tmp_path / "state")
    assert seen(state, tmp_path, split="test") == expected
    assert seen(state, tmp_path, data=write(tmp_path / "bare.parquet", test)) == expected


def test_numbers_that_may_be_places_or_names_are_refused(tmp_path: Path) -> None:
    names = ["1", "2", "3"]
    state = made(tmp_path, table([0, 1, 2] * 4, names), table([0, 1], names))
    with pytest.raises(DataError) as caught:
        seen(state, tmp_path, data=write(tmp_path / "other.parquet", [1, 2]))
    assert "holds 1, which is the label '2' by its index from 0, and the label '1' by its name" in caught.value.message
    assert seen(state, tmp_path, data=write(tmp_path / "other.parquet", ["1", "2"])) == ["1", "2"]


@pytest.mark.parametrize("labels", [[None, None], ["", " "], [-1, -1], [-1.0, -1.0]])
def test_a_label_column_with_nothing_in_it_is_none(tmp_path: Path, labels: list[Any]) -> None:
    state = made(tmp_path, table(["no", "yes"] * 4), table(["no", "yes"]))
    assert seen(state, tmp_path, data=write(tmp_path / "other.parquet", labels)) == ["None", "None"]
    with pytest.raises(DataError, match="row 2"):
        seen(state, tmp_path, data=write(tmp_path / "other.parquet", ["no", labels[0] and str(labels[0])]))


def test_class_folders_name_the_labels_of_a_file_in_another_case(tmp_path: Path) -> None:
    for folder in ("Cat", "Dog"):
        (tmp_path / "folders" / folder).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "folders" / folder / "0.png")
    rows = [f"folders/{name}/0.png,{name.lower()}" for name in ("Cat", "Dog") * 4]
    (tmp_path / "train.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    files = {"train": str(tmp_path / "train.csv"), "validation": str(tmp_path / "folders")}
    state = init(tiny("vit", data=files), tmp_path / "state")
    assert seen(state, tmp_path) == ["cat", "dog"]
    assert seen(state, tmp_path, data=tmp_path / "folders") == ["cat", "dog"]
