"""Labels as people write them, and the numbers and names that a model has for them."""

import decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import recap_cli
from recap_cli.data.sources import Raw
from recap_cli.errors import DataError
from recap_cli.rounds import examples
from recap_cli.stages.export import export
from recap_cli.stages.init import init
from recap_cli.stages.prune import prune
from recap_cli.stages.run import run
from recap_cli.state.store import State
from tests.reading import read_splits
from tests.tiny import data_folder, tiny


def table_of(labels: Any, names: list[str] | None = None) -> pa.Table:
    column = labels if isinstance(labels, pa.Array) else pa.array(labels)
    table = pa.table({"text": ["x"] * len(column), "label": column})
    if names is None:
        return table
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return table.replace_schema_metadata(features.arrow_schema.metadata)


def read(folder: Path, train: pa.Table, validation: pa.Table | None = None) -> Raw:
    parquet.write_table(train, folder / "train.parquet")
    parquet.write_table(validation or train, folder / "dev.parquet")
    return read_splits("text-classification", seed=0, train=folder / "train.parquet", validation=folder / "dev.parquet")


def found(raw: Raw) -> tuple[list[str], list[int], list[int]]:
    return raw.label_names, raw.train["label"][:], raw.validation["label"][:]


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([5, 1, 3, 2, 4, 1], ["1", "2", "3", "4", "5"], [4, 0, 2, 1, 3, 0]),
        ([0, 2, 0], ["0", "2"], [0, 1, 0]),
        ([10, 9, 100], ["9", "10", "100"], [1, 0, 2]),
        (["10", "9", "100"], ["9", "10", "100"], [1, 0, 2]),
        (["01", "02", "01"], ["01", "02"], [0, 1, 0]),
        (["1.0", "3.0", "1"], ["1", "3"], [0, 1, 0]),
        ([3.0, 1.0, 3.0], ["1", "3"], [1, 0, 1]),
        (np.array([3, 1, 3], np.float16), ["1", "3"], [1, 0, 1]),
        ([decimal.Decimal("3.0"), decimal.Decimal("1.0")], ["1", "3"], [1, 0]),
        (np.array([1, 2**64 - 1], np.uint64), ["1", str(2**64 - 1)], [0, 1]),
        (["True", "False", "true"], ["False", "True"], [1, 0, 1]),
        (["Yes", "no", "yes", "yes ", " NO", "no"], ["no", "yes"], [1, 0, 1, 1, 0, 0]),
        (["a", "A", "b"], ["A", "a", "b"], [1, 0, 2]),
        (["-1", "1", "0"], ["-1", "0", "1"], [0, 2, 1]),
    ],
)
def test_labels_as_people_write_them(tmp_path: Path, labels: Any, names: list[str], numbers: list[int]) -> None:
    assert found(read(tmp_path, table_of(labels))) == (names, numbers, numbers)


def test_numbers_that_are_numbered_anew_are_told_and_others_are_not(tmp_path: Path) -> None:
    (note,) = read(tmp_path, table_of([1, 2, 5])).notes
    place = f"column 'label' of {tmp_path / 'train.parquet'}"
    assert note == f"{place} holds 1, 2, 5: the model numbers them 0 … 2, and keeps them as the names of its labels"
    assert read(tmp_path, table_of([1, 0, 2])).notes == ()
    assert read(tmp_path, table_of(["b", "a", " a"])).notes == ()


def test_words_taken_for_one_and_letters_that_are_not_are_told(tmp_path: Path) -> None:
    notes = read(tmp_path, table_of(["Yes", "yes", "no", "b", "B"])).notes
    place = f"column 'label' of {tmp_path / 'train.parquet'}"
    assert notes == (
        f"{place}: these spellings count as one label each: 'Yes', 'yes'",
        f"{place}: B, b are separate labels, because single letters differ in case",
    )


@pytest.mark.parametrize(
    ("train", "validation", "numbers"),
    [
        ([1, 2, 5], [5, 1], [2, 0]),
        ([1, 2, 5], ["5", "1.0"], [2, 0]),
        (["1", "2", "5"], [5.0, 1.0], [2, 0]),
        (["Yes", "no"], ["YES", "No"], [0, 1]),
        ([True, False], ["true", "FALSE"], [1, 0]),
    ],
)
def test_validation_labels_are_those_of_the_training_data_by_name(
    tmp_path: Path, train: Any, validation: Any, numbers: list[int]
) -> None:
    assert found(read(tmp_path, table_of(train), table_of(validation)))[2] == numbers


@pytest.mark.parametrize(
    ("train", "validation", "problem"),
    [
        ([1, 2, 5], [5, 0], "holds 0 in row 2, but the labels are 1, 2, 5"),
        ([1, 2, 5], [5, 3], "holds 3 in row 2, but the labels are 1, 2, 5"),
        ([1, 2, 5], [5, -1], "holds -1 in row 2, but the labels are 1, 2, 5"),
        (["a", "A"], ["a", "b"], "holds 'b' in row 2, but the labels are A, a"),
        (["yes", "no"], [1, 0], "holds 1 in row 1, but the labels are no, yes"),
        ([1, 0], [True, False], "holds True in row 1, but the labels are 0, 1"),
    ],
)
def test_a_validation_label_never_trained_on_is_refused(tmp_path: Path, train: Any, validation: Any, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, table_of(train), table_of(validation))
    assert caught.value.message == f"column 'label' of {tmp_path / 'dev.parquet'} {problem}"


@pytest.mark.parametrize(
    ("train", "own", "validation", "its_own", "numbers"),
    [
        ([1, 0], ["no", "yes"], [0, 1], ["yes", "no"], [1, 0]),  # each file has its own order
        ([1, 0], ["no", "yes"], [1, 0], None, [1, 0]),  # and one has none: places among those of training
        ([1, 0], ["no", "yes"], ["Yes", "no"], None, [1, 0]),
        (["yes", "no"], None, [1, 0], ["no", "yes"], [1, 0]),
        ([1, 0], None, [1, 0], ["no", "yes"], [1, 0]),
        ([5, 4, 3, 2, 1], None, [1, 4], ["1", "2", "3", "4", "5"], [1, 4]),  # places, although they are labels as well
        ([0, 1, 2], ["2", "0", "1"], [0, 1], ["0", "1"], [1, 2]),
        ([0, 1, 2, 3, 4], ["1", "2", "3", "4", "5"], [1, 5], None, [0, 4]),  # no places: there is none from 0 on for 5
        ([0, 1, 2, 3, 4], ["1", "2", "3", "4", "5"], [0, 4], None, [0, 4]),
        ([1, 0], ["US", "us"], [1, 0], ["US", "us"], [1, 0]),  # the names of a data set are meant letter by letter
    ],
)
def test_the_names_of_a_data_set_go_before_its_numbers(
    tmp_path: Path, train: Any, own: Any, validation: Any, its_own: Any, numbers: list[int]
) -> None:
    assert found(read(tmp_path, table_of(train, own), table_of(validation, its_own)))[2] == numbers


def test_a_validation_label_beyond_the_names_of_a_data_set_is_refused(tmp_path: Path) -> None:
    for odd in (2, -1):
        with pytest.raises(DataError, match=f"holds {odd} in row 2, but the labels are no, yes"):
            read(tmp_path, table_of([0, 1], ["no", "yes"]), table_of([0, odd], ["no", "yes"]))


@pytest.mark.parametrize(
    "metadata",
    [
        b"no json",
        b"[" * 100_000,
        b"[]",
        b'{"info": {"features": {"label": {"names": ["a", "b"]}}}}',
        b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "a"]}}}}',
        b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": "ab"}}}}',
    ],
)
def test_damaged_metadata_of_datasets_are_told_and_the_numbers_are_read(tmp_path: Path, metadata: bytes) -> None:
    raw = read(tmp_path, table_of([0, 1]).replace_schema_metadata({b"huggingface": metadata}))
    assert found(raw) == (["0", "1"], [0, 1], [0, 1])
    assert f"{tmp_path / 'train.parquet'} has metadata of `datasets`" in raw.notes[0]


def test_a_kind_of_feature_that_is_not_known_hides_nothing(tmp_path: Path) -> None:
    table = table_of([0, 1], ["no", "yes"])
    stored = table.schema.metadata[b"huggingface"].replace(b'"_type": "Value"', b'"_type": "OfTomorrow"')
    assert b"OfTomorrow" in stored
    assert read(tmp_path, table.replace_schema_metadata({b"huggingface": stored})).label_names == ["no", "yes"]


@pytest.mark.parametrize("labels", [list(range(300)), [f"text {i}" for i in range(300)]])
def test_a_column_of_ids_or_texts_is_no_label(tmp_path: Path, labels: Any) -> None:
    with pytest.raises(DataError, match="holds 300 different values in 300 rows") as caught:
        read(tmp_path, table_of(labels))
    assert caught.value.hint == "choose the column of the labels with --set data.label=NAME"
    assert len(read(tmp_path, table_of(labels * 2)).label_names) == 300


def test_stars_from_1_to_5_are_the_labels_of_the_exported_model(tmp_path: Path) -> None:
    lines = [f"w{stars} w{6 + i % 9},{stars}" for i in range(12) for stars in (5, 3, 1, 4, 2)]
    (tmp_path / "reviews.csv").write_text("\n".join(["review,stars", *lines]) + "\n")
    columns = {"text": "review", "label": "stars", "validation": None, "validation_share": 0.2}
    recipe = tiny("bert", rounds=1, data={"train": str(tmp_path / "reviews.csv"), **columns})
    run(recipe, tmp_path / "state")
    state = State.open(tmp_path / "state")
    notes = state.manifest.history[0]["notes"]
    assert any("holds 1, 2, 3, 4, 5: the model numbers them 0 … 4" in note for note in notes)
    export(state, tmp_path / "out")
    loaded = recap_cli.load(tmp_path / "out")
    assert loaded.config.id2label == {0: "1", 1: "2", 2: "3", 3: "4", 4: "5"}


def test_other_labels_under_a_state_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (data_folder() / "train.csv").read_text()
    file = tmp_path / "train.csv"
    file.write_text(text)
    init(tiny("bert", data={"train": str(file), "validation": None, "validation_share": 0.2}), tmp_path / "state")
    file.write_text(text.replace(",cat\n", ",zebra\n"))
    monkeypatch.setattr(examples, "_SPLITS", {})  # as in another process
    with pytest.raises(DataError) as caught:
        prune(State.open(tmp_path / "state"))
    assert caught.value.message == f"the labels of {file} are dog, newt, zebra, but the model was made for cat, dog, newt"


def test_numbers_beside_names_that_are_other_numbers_are_refused_where_they_may_be_both(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, table_of([0, 1, 2], ["1", "2", "3"]), table_of([1, 2]))
    place = f"column 'label' of {tmp_path / 'dev.parquet'}"
    readings = "which is the label '2' by its index from 0, and the label '1' by its name"
    assert caught.value.message == f"{place} holds 1, {readings}: the labels are 1, 2, 3"


def test_names_that_a_file_has_for_numbers_of_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 1 \('2 stars'\) in row 1, but the labels are 1, 2, 3"):
        read(tmp_path, table_of([1, 2, 3]), table_of([1, 2], ["1 star", "2 stars", "3 stars"]))
