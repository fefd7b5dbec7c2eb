"""Folders with one folder of images per class, as people and systems leave them."""

import os
import shlex
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from recap_cli.data.sources import Raw
from recap_cli.errors import DataError
from recap_cli.recipe import recipe as recipes
from tests.reading import read_splits
from tests.tiny import data_folder, tiny


def png() -> bytes:
    file = BytesIO()
    Image.new("L", (2, 2)).save(file, "png")
    return file.getvalue()


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png() if name.endswith(".png") and "/._" not in name else b"\0\5\x16\7")
    return folder


def read(train: Path, validation: Path | None = None, **names: str) -> Raw:
    return read_splits("image-classification", seed=0, train=train, validation=validation or train, **names)  # type: ignore[arg-type]


def fails(folder: Path) -> tuple[str, str]:
    with pytest.raises(DataError) as caught:
        read(folder)
    return caught.value.message, caught.value.hint or ""


def images_of(raw: Raw, folder: Path) -> list[str]:
    import datasets

    encoded = raw.train.cast_column("image", datasets.Image(decode=False))
    return [str(Path(image["path"]).relative_to(folder)) for image in encoded["image"]]


def test_what_systems_leave_is_passed_over_and_hidden_images_are_told(tmp_path: Path) -> None:
    junk = ("cat/.DS_Store", "cat/Thumbs.db", "dog/desktop.ini", ".hidden/a.png", "__MACOSX/cat/._0.png", "@eaDir/a.png")
    hidden = ("cat/._0.png", "dog/.thumbnails/0.png", "dog/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.png")
    folder = write(tmp_path / "set", "cat/0.png", "dog/0.png", "dog/more/1.png", *junk, *hidden)
    raw = read(folder)
    assert raw.label_names == ["cat", "dog"]
    assert images_of(raw, folder) == ["cat/0.png", "dog/0.png", "dog/more/1.png"]
    assert raw.notes == (f"{folder}: 3 hidden images, such as cat/._0.png, are ignored",)


def test_other_files_and_empty_classes_are_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "cat/0.png", "dog/0.png", "cat/1.heic", "cat/2.heic", "cat/README", "newt/0.heic")
    assert read(folder).notes == (
        f"{folder}: 4 files of other kinds (.heic, no suffix) are ignored",
        f"{folder}: no images, and so no class, in newt",
    )


def test_column_names_do_not_count_for_a_folder_and_that_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "cat/0.png", "dog/0.png")
    assert read(folder).notes == read(folder, image="image", label="label").notes == ()
    raw = read(folder, image="img", label="fine_label")
    assert raw.notes == ("a folder of class folders has no columns: ignored data.image (img) and data.label (fine_label)",)
    assert raw.train.column_names == ["image", "label", "row"]


def test_a_folder_beside_a_file_with_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    folder = write(tmp_path / "set", "cat/0.png", "dog/0.png")
    parquet.write_table(pa.table({"img": [png()] * 2, "kind": ["dog", "cat"]}), tmp_path / "dev.parquet")
    raw = read(folder, tmp_path / "dev.parquet", image="img", label="kind")
    assert raw.validation["label"][:] == [1, 0]


def test_a_recipe_for_a_folder_needs_no_column(tmp_path: Path) -> None:
    recipe = tiny("vit", data={"image": None})
    assert recipe.data.image is None
    folder = data_folder()
    assert read(folder / "train", folder / "validation").label_names == ["cat", "dog", "newt"]


def test_folders_that_differ_in_case_are_different_classes(tmp_path: Path) -> None:
    raw = read(write(tmp_path / "set", "Us/0.png", "US/0.png", "01/0.png", "1/0.png"))
    assert raw.label_names == ["01", "1", "US", "Us"]
    assert raw.train["label"][:] == [0, 1, 2, 3]


def test_an_unknown_class_of_the_validation_folder_is_refused(tmp_path: Path) -> None:
    train, validation = write(tmp_path / "a", "cat/0.png", "dog/0.png"), write(tmp_path / "b", "cat/0.png", "newt/0.png")
    with pytest.raises(DataError) as caught:
        read(train, validation)
    assert caught.value.message == f"the folder {validation} holds 'newt' in row 2, but the labels are cat, dog"


@pytest.mark.parametrize(
    ("names", "validation"),
    [
        (["train"], "--set data.validation_share=0.1"),
        (["train", "test"], "--set data.validation={}/test"),
        (["train", "test", "val"], "--set data.validation={}/val"),
        (["Train", "Dev"], "--set data.validation={}/Dev"),
    ],
)
def test_a_folder_of_splits_is_never_validated_on_its_training_data(tmp_path: Path, names: list[str], validation: str) -> None:
    folder = write(tmp_path / "set", *(f"{name}/cat/0.png" for name in names))
    message, hint = fails(folder)
    assert message == f"{folder} holds splits ({', '.join(sorted(names))}), not classes"
    assert hint == f"--set data.train={folder}/{names[0]} {validation.format(folder)}"


@pytest.mark.parametrize("name", [b"cat\xff/0.png", b"cat/0\xff.png"])
def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path, name: bytes) -> None:
    folder = write(tmp_path / "set", "dog/0.png", os.fsdecode(name))
    message, hint = fails(folder)
    assert message == f"the name of {folder}/{name.decode(errors='backslashreplace')} is not in UTF-8"
    assert "convmv" in hint


def test_what_is_named_like_an_image_and_is_none_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "dog/0.png", "cat/0.png")
    os.mkfifo(folder / "cat" / "1.png")
    assert fails(folder)[0] == f"{folder}/cat/1.png is no file that holds an image"
    (folder / "cat" / "1.png").unlink()
    (folder / "cat" / "1.png").symlink_to("gone.png")
    assert fails(folder)[0] == f"{folder}/cat/1.png is a link to a file that does not exist"
    (folder / "cat" / "1.png").unlink()
    (folder / "cat" / "1.png").symlink_to("0.png")
    assert len(read(folder).train) == 3


@pytest.mark.usefixtures("permissions")
def test_a_folder_within_a_class_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "dog/0.png", "cat/0.png", "cat/more/1.png")
    (folder / "cat" / "more").chmod(0)
    try:
        assert "Permission denied" in fails(folder)[0]
        assert "cat/more" in fails(folder)[0]
    finally:
        (folder / "cat" / "more").chmod(0o700)


def test_folders_that_are_numbers_with_a_point_are_classes_in_their_order(tmp_path: Path) -> None:
    raw = read(write(tmp_path / "set", "10.0/0.png", "2.0/0.png", "1.0/0.png"))
    assert raw.label_names == ["1.0", "2.0", "10.0"]


@pytest.mark.parametrize("name", ["a #b", "x: y", "null", "my set"])
def test_the_hint_of_a_folder_of_splits_may_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(Path(name), "train/cat/0.png", "test/cat/0.png")
    words = [word for word in shlex.split(fails(folder)[1]) if word != "--set"]
    data = recipes.read("vit_base_cifar100", words).data
    assert (data.train, data.validation) == (str(folder / "train"), str(folder / "test"))


def test_a_folder_without_images_is_told_how_to_name_another(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    assert "--set data.train=FOLDER" in fails(tmp_path)[1]
