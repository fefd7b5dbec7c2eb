"""Columns that a recipe names and a file calls otherwise: one error, with a hint for all of them."""

import json
import shlex
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from recap_cli.data.sources import Raw
from recap_cli.errors import DataError
from recap_cli.recipe import recipe as recipes
from tests.reading import read_splits

NAMES = {"text": "sentence", "label": "stars"}


def png() -> bytes:
    file = BytesIO()
    Image.new("L", (2, 2)).save(file, "png")
    return file.getvalue()


def write(folder: Path, **columns: Any) -> Path:
    parquet.write_table(pa.table(columns), folder / "a.parquet")
    return folder / "a.parquet"


def read(file: Path, kind: str = "text-classification", **names: str) -> Raw:
    return read_splits(kind, seed=0, train=file, validation=file, **names)  # type: ignore[arg-type]


def fails(file: Path, kind: str = "text-classification", **names: str) -> tuple[str, str]:
    with pytest.raises(DataError) as caught:
        read(file, kind, **names)
    return caught.value.message, caught.value.hint or ""


def settings_in(hint: str) -> dict[str, str]:
    """The columns that a hint sets."""
    words = shlex.split(hint)
    return dict(words[i + 1].removeprefix("data.").split("=", 1) for i, word in enumerate(words) if word == "--set")


def test_all_wrong_columns_of_an_image_file_are_proposed_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, picture=[png()] * 4, species=[0, 1, 0, 1], weight=[0.5, 0.25, 1.5, 2.0])
    message, hint = fails(file, "image-classification", image="img", label="fine_label")
    assert message == f"{file} has no column 'img' and no column 'fine_label'; its columns are: picture, species, weight"
    assert hint == "name the columns with --set data.image=picture --set data.label=species"
    assert len(read(file, "image-classification", **settings_in(hint)).train) == 4


def test_texts_and_labels_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    file = write(tmp_path, kind=["spam", "ham"] * 4, body=[f"text {i}" for i in range(8)], when=[float(i) for i in range(8)])
    _, hint = fails(file, **NAMES)
    assert settings_in(hint) == {"text": "body", "label": "kind"}
    assert read(file, **settings_in(hint)).label_names == ["ham", "spam"]


def test_where_several_columns_fit_they_are_listed(tmp_path: Path) -> None:
    file = write(tmp_path, img=[png()] * 4, fine=[0, 1, 0, 1], coarse=[0, 0, 1, 1])
    message, hint = fails(file, "image-classification", image="picture", label="species")
    assert message == f"{file} has no column 'picture' and no column 'species'; its columns are: img, fine, coarse"
    assert hint == (
        "name the columns with --set data.image=img --set data.label=COLUMN, where data.label is one of fine, coarse"
    )


def test_three_wrong_columns_are_one_error(tmp_path: Path) -> None:
    file = write(tmp_path, a=[f"a {i}" for i in range(4)], b=[f"b {i}" for i in range(4)], c=[0, 1, 0, 1])
    message, hint = fails(file, text="q", text_pair="p", label="x")
    assert message.startswith(f"{file} has no column 'q', no column 'p' and no column 'x'; its columns are")
    assert "--set data.text=COLUMN --set data.text_pair=COLUMN --set data.label=c, where data.text is one of a, b" in hint


def test_a_column_of_another_type_is_named_beside_the_missing_one(tmp_path: Path) -> None:
    file = write(tmp_path, sentence=[1.5, 2.5, 3.5, 4.5], body=[f"text {i}" for i in range(4)], kind=[0, 1, 0, 1])
    message, hint = fails(file, **NAMES)
    assert message.startswith(f"{file} has values of type double in column 'sentence', not text and no column 'stars'")
    assert settings_in(hint) == {"text": "body", "label": "kind"}


def test_a_near_name_goes_before_a_likely_type(tmp_path: Path) -> None:
    file = write(tmp_path, sentences=["a"] * 4, body=[f"text {i}" for i in range(4)], star=[1.0, 2.0, 1.0, 2.0], n=[1, 1, 2, 2])
    assert settings_in(fails(file, **NAMES)[1]) == {"text": "sentences", "label": "star"}


def test_no_column_that_fits_asks_for_another_task(tmp_path: Path) -> None:
    file = write(tmp_path, a=[0, 1, 0, 1], b=[1, 1, 0, 0])
    _, hint = fails(file, text="sentence", label="a")
    assert hint == (
        "name the column with --set data.text=COLUMN, where no column of it holds text; or choose another task.kind"
    )


def test_columns_with_blanks_are_quoted_for_a_shell(tmp_path: Path) -> None:
    file = write(tmp_path, **{"the text": [f"text {i}" for i in range(4)], "the class": [0, 1, 0, 1]})
    hint = fails(file, **NAMES)[1]
    assert hint == "name the columns with --set data.text='the text' --set data.label='the class'"


def test_paths_of_images_are_known_by_their_endings(tmp_path: Path) -> None:
    (tmp_path / "0.PNG").write_bytes(png())
    rows = [{"file": "0.PNG", "caption": f"text {i}", "kind": ["cat", "dog"][i % 2]} for i in range(4)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    hint = fails(tmp_path / "list.json", "image-classification", image="img", label="fine")[1]
    assert settings_in(hint) == {"image": "file", "label": "kind"}
    assert len(read(tmp_path / "list.json", "image-classification", **settings_in(hint)).train) == 4


def test_stored_paths_count_from_the_folder_of_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"bytes": None, "path": "a.png"}, {"bytes": png(), "path": "only/a/name.png"}]
    file = write(tmp_path, image=rows, label=[0, 1])
    assert [image.size for image in read(file, "image-classification").train["image"]] == [(2, 2), (2, 2)]
    file = write(tmp_path, image=[*rows, {"bytes": None, "path": "https://example.org/b.png"}], label=[0, 1, 0])
    assert "b.png in row 3 of" in fails(file, "image-classification")[0]


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.struct([("bytes", pa.binary())]),
        pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]),
        pa.struct([("bytes", pa.binary()), ("path", pa.null()), ("size", pa.int64())]),
    ],
)
def test_images_are_stored_in_several_ways(tmp_path: Path, kind: pa.DataType) -> None:
    image = {"bytes": png()} if pa.types.is_struct(kind) else png()
    file = write(tmp_path, image=pa.array([image] * 2, kind), label=[0, 1])
    assert [image.size for image in read(file, "image-classification").train["image"]] == [(2, 2), (2, 2)]


@pytest.mark.parametrize("column", [[[1, 2]] * 2, [{"x": 1}] * 2, [{"bytes": 1}] * 2, [{"bytes": b"x", "path": 1}] * 2])
def test_arrays_that_are_no_stored_images_are_refused_by_their_type(tmp_path: Path, column: list[Any]) -> None:
    message, _ = fails(write(tmp_path, image=column, label=[0, 1]), "image-classification")
    assert "in column 'image', not images or paths of images" in message


@pytest.mark.parametrize(
    "name", ["1", "yes", "a #b", "x: y", "null", "~", "12:30", "it's", "a b", "'", '"', "é", "#x", "=", "$HOME"]
)
def test_a_hint_may_be_typed_whatever_the_columns_are_called(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, **{name: [f"text {i}" for i in range(4)], "kind": [0, 1, 0, 1]})
    words = shlex.split(fails(file, text="sentence", label="kind")[1].removeprefix("name the column with "))
    assert words[0] == "--set"
    assert recipes.read("bert_base_cola", words[1:]).data.text == name
