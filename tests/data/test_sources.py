"""Examples from files and folders of every kind, and the messages for those that cannot be used."""

import csv
import json
import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from recap_cli.data.sources import Raw, hold_out
from recap_cli.errors import DataError
from tests.reading import read_splits

SHARED = Path(os.environ.get("RECAP_SHARED", Path(__file__).parents[3] / "shared")) / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"no real data at {SHARED}; set RECAP_SHARED to the folder that has data/"
)

TEXTS = ["good", "bad", 'says "hi", he\ndoes', "NA", "null", "good again"]
LABELS = [1, 0, 1, 0, 0, 1]


def write_csv(path: Path, texts: list[str], labels: list[object], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["sentence", "label"])
        writer.writerows(zip(texts, labels, strict=True))
    return path


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def png(shade: int, size: tuple[int, int] = (6, 4)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(file, "png")
    return file.getvalue()


def write_folder(path: Path, classes: dict[str, int]) -> Path:
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for i in range(count):
            (path / name / f"{i}.png").write_bytes(png(10 * i))
        (path / name / "Thumbs.db").write_bytes(b"not an image")
    return path


def read_texts(train: Path, validation: Path | None = None, **keys: object) -> Raw:
    share = {} if validation is not None or "validation_share" in keys else {"validation_share": 0.5}
    given = {"text": "sentence", **share, **keys}
    return read_splits("text-classification", seed=0, train=train, validation=validation, **given)  # type: ignore[arg-type]


def fails(train: Path, validation: Path | None = None, **keys: object) -> tuple[str, str]:
    with pytest.raises(DataError) as caught:
        read_texts(train, validation, **keys)
    return caught.value.message, caught.value.hint or ""


def test_csv_json_jsonl_and_parquet_give_the_same_examples(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"sentence": t, "label": n} for t, n in zip(TEXTS, LABELS, strict=True)]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    files = [
        write_csv(tmp_path / "a.csv", TEXTS, list(LABELS)),
        write_jsonl(tmp_path / "a.jsonl", rows),
        write_jsonl(tmp_path / "lines.json", rows),
        tmp_path / "a.json",
        tmp_path / "a.parquet",
    ]
    for file in files:
        raw = read_texts(file, file)
        assert raw.train[:] == {"text": TEXTS, "label": LABELS, "row": [1, 2, 3, 4, 5, 6]}
        assert raw.label_names == ["0", "1"]
        assert raw.train_origin == raw.validation_origin == str(file)


def test_a_tsv_has_no_quoting(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text('sentence\tlabel\nhe said "no\t0\nand "so" on\t1\n', encoding="utf-8")
    assert read_texts(file, file).train["text"][:] == ['he said "no', 'and "so" on']


def test_texts_that_look_like_numbers_stay_texts(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", ["007", "1e3"], [0, 1])
    assert read_texts(file, file).train["text"][:] == ["007", "1e3"]


def test_a_byte_order_mark_does_not_hide_the_first_column(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes("\ufeffsentence,label\na,0\nb,1\n".encode())
    assert read_texts(file, file).train["text"][:] == ["a", "b"]


def test_nothing_is_written_beside_the_data_or_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write_csv(tmp_path / "a.csv", TEXTS, list(LABELS))
    read_texts(file, train_samples=2)
    assert list(tmp_path.rglob("*")) == [file]


def test_sentence_pairs(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"q": "a", "p": "b", "label": 0}, {"q": "c", "p": "d", "label": 1}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    raw = read_texts(file, file, text="q", text_pair="p")
    assert raw.train.column_names == ["text", "text_pair", "label", "row"]
    assert raw.train[1] == {"text": "c", "text_pair": "d", "label": 1, "row": 2}


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["spam", "ham", "eggs", "ham"], ["eggs", "ham", "spam"], [2, 1, 0, 1]),
        ([True, False, True, False], ["False", "True"], [1, 0, 1, 0]),
        ([2, 0, 1, 1], ["0", "1", "2"], [2, 0, 1, 1]),
        ([1.0, 0.0, 1.0], ["0", "1"], [1, 0, 1]),
    ],
)
def test_labels_become_numbers(tmp_path: Path, labels: list[object], names: list[str], numbers: list[int]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"sentence": "x", "label": label} for label in labels])
    raw = read_texts(file, file)
    assert raw.label_names == names
    assert raw.validation["label"][:] == numbers


def test_the_names_that_datasets_stored_are_kept(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    schema = features.arrow_schema
    parquet.write_table(pa.table([["a", "b"], [1, 1]], schema=schema), tmp_path / "a.parquet")
    raw = read_texts(tmp_path / "a.parquet", tmp_path / "a.parquet")
    assert raw.label_names == ["no", "yes"]
    assert raw.train["label"][:] == [1, 1]


def test_categories_of_pandas_are_read(tmp_path: Path) -> None:
    table = pa.table({"sentence": ["a", "b", "c"], "label": pa.array(["x", "y", "x"]).dictionary_encode()})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_texts(tmp_path / "a.parquet", tmp_path / "a.parquet").train["label"][:] == [0, 1, 0]


def test_a_missing_column_lists_those_found_and_the_likely_one(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", TEXTS, list(LABELS))
    message, hint = fails(file, text="text")
    assert message == f"{file} has no column 'text'; its columns are: sentence, label"
    assert hint == "name the column with --set data.text=sentence"
    message, hint = fails(file, label="lable")
    assert "no column 'lable'" in message
    assert hint.endswith("--set data.label=label")


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_csv_with_another_separator_is_told(tmp_path: Path, mark: str) -> None:
    _, hint = fails(write_csv(tmp_path / "a.csv", ["a", "b"], [0, 1], mark))
    assert hint == f"the file is separated by {mark!r}; save it with commas, or as .tsv with tabs"


def test_a_hint_with_a_column_is_for_a_shell(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"the sentence": "a", "label": 0}, {"the sentence": "b", "label": 1}])
    assert fails(file)[1] == "name the column with --set data.text='the sentence'"


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    message, hint = fails(write_folder(tmp_path / "set", {"dog": 1, "cat": 1}))
    assert message == f"the task reads texts, but the folder {tmp_path / 'set'} holds images"
    assert hint == "--set task.kind=image-classification, or name a file of texts with --set data.train=FILE"
    (tmp_path / "none").mkdir()
    assert fails(tmp_path / "none")[0] == f"{tmp_path / 'none'} is a folder, but texts are read from a file"


def test_a_column_that_is_not_text(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"sentence": 1, "label": 0}, {"sentence": 2, "label": 1}])
    message, _ = fails(file)
    assert message == f"{file} has values of type int64 in column 'sentence', not text; its columns are: sentence, label"


@pytest.mark.parametrize("column", ["sentence", "label"])
def test_a_missing_value_names_its_row(tmp_path: Path, column: str) -> None:
    rows: list[dict[str, object]] = [
        {"sentence": "a", "label": 0},
        {"sentence": "b", "label": 1},
        {"sentence": "c", "label": 0},
    ]
    rows[2][column] = None
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    message, _ = fails(file)
    assert message == f"column {column!r} of {file} has no value in row 3 (1 such rows)"


def test_an_empty_cell_of_a_csv_is_missing_and_a_quoted_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('sentence,label\n"",0\nb,1\n', encoding="utf-8")
    assert read_texts(file, file).train["text"][0] == ""
    file.write_text("sentence,label\n,0\nb,1\n", encoding="utf-8")
    assert "no value in row 1" in fails(file)[0]


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ([-1, -1, -1], "holds -1; labels that are whole numbers are 0 or more"),
        ([-1, 0, 1], "holds -1, 0, 1; labels that are whole numbers are 0 or more"),
        (["a", " ", "b"], "holds a label that is empty (1 such rows)"),
        (["xx", " XX", "xx "], "holds only one label, 'xx'"),
        (["x", "x", "x"], "holds only one label, 'x'"),
        ([0, 0, 0], "holds only one label, 0"),
        ([1.0, 1.0], "holds only one label, 1"),
        ([True, True], "holds only one label, True"),
        ([0.5, 1.0, 2.5], "holds values of type double; labels are"),
        ([0.0, 1.0, 1e17], "holds values of type double; labels are"),
        ([0.0, 1.0, float("inf")], "holds values of type double; labels are"),
        ([0.0, 1.0, float("nan")], "holds values of type double; labels are"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path: Path, labels: list[object], problem: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"sentence": "a", "label": label} for label in labels])
    message, _ = fails(file)
    assert message.startswith(f"column 'label' of {file} {problem}")


@pytest.mark.parametrize(("labels", "odd", "names"), [([0, 1], -1, "0, 1"), ([0, 1], 2, "0, 1"), (["a", "b"], "c", "a, b")])
def test_a_validation_label_that_training_does_not_have(tmp_path: Path, labels: list[object], odd: object, names: str) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"sentence": "a", "label": label} for label in labels])
    validation = write_jsonl(tmp_path / "dev.jsonl", [{"sentence": "a", "label": label} for label in (labels[0], odd)])
    message, _ = fails(train, validation)
    assert message == f"column 'label' of {validation} holds {odd!r} in row 2, but the labels are {names}"


def test_labels_of_another_kind(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"sentence": "a", "label": label} for label in "01"])
    validation = write_jsonl(tmp_path / "dev.jsonl", [{"sentence": "a", "label": label} for label in (False, True)])
    assert "holds False in row 1, but the labels are 0, 1" in fails(train, validation)[0]


def test_a_missing_file(tmp_path: Path) -> None:
    message, hint = fails(tmp_path / "no.csv")
    assert message == f"{tmp_path / 'no.csv'} does not exist"
    assert hint == "name a file that does with --set data.train=FILE"


def test_a_missing_validation_file(tmp_path: Path) -> None:
    _, hint = fails(write_csv(tmp_path / "a.csv", TEXTS, list(LABELS)), tmp_path / "no.csv")
    assert hint == "name a file that does with --set data.validation=FILE"


def test_training_data_alone_needs_a_share_to_hold_out(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", TEXTS, list(LABELS))
    message, hint = fails(file, None, validation_share=None)
    assert "neither data.validation nor data.validation_share is set" in message
    assert "--set data.validation_share=0.1" in hint
    assert "both data.validation and data.validation_share are set" in fails(file, file, validation_share=0.5)[0]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_files_that_are_empty_or_something_else(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(b"")
    assert fails(file)[0] == f"{file} is empty"


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl"])
@pytest.mark.parametrize("size", [1, 2**40])
def test_zero_bytes_are_no_text_however_many(tmp_path: Path, suffix: str, size: int) -> None:
    file = tmp_path / f"a.{suffix}"
    with file.open("wb") as made:
        made.truncate(size)
    assert fails(file)[0] == f"{file} begins with zero bytes and no text: it was not written whole"
    file.write_bytes(b'\xff\xfe{"\x00garbage\n\x80\x81')
    assert fails(file)[0].startswith(f"{file} cannot be read as {suffix}: ")


@pytest.mark.parametrize(
    ("suffix", "encoding"),
    [("csv", "utf-16"), ("csv", "latin-1"), ("tsv", "latin-1"), ("json", "utf-16"), ("jsonl", "latin-1")],
)
def test_a_text_that_is_not_utf8(tmp_path: Path, suffix: str, encoding: str) -> None:
    contents = {"csv": "sentence,label\ncafé,0\nb,1\n", "tsv": "sentence\tlabel\ncafé\t0\nb\t1\n"}
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(contents.get(suffix, '[{"sentence": "café", "label": 0}]').encode(encoding))
    message, hint = fails(file)
    assert message == f"{file} cannot be read as {suffix}: its text is not in UTF-8"
    assert hint.startswith("save it as UTF-8")


def test_a_truncated_parquet_file(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"sentence": TEXTS, "label": LABELS}), file)
    file.write_bytes(file.read_bytes()[:-20])
    assert "cannot be read as parquet" in fails(file)[0]


def test_a_damaged_text_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"sentence": ["a long sentence", "b"], "label": [0, 1]}), file, compression="none")
    file.write_bytes(file.read_bytes().replace(b"a long sentence", b"a long \xb2entence"))
    message, hint = fails(file)
    assert message.startswith(f"{file} cannot be read as parquet: the column 'sentence' is damaged: ")
    assert hint.startswith("repair the file")


def test_a_broken_line_of_a_jsonl_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"sentence": "a", "label": 0}\n{"sentence": "b", \n', encoding="utf-8")
    assert "cannot be read as jsonl: line 2: " in fails(file)[0]


def test_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    assert fails(write_csv(tmp_path / "a.csv", [], []))[0].endswith("a.csv has no rows")


def test_an_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"x")
    message, _ = fails(tmp_path / "a.xlsx")
    assert "of an unknown kind; known are .csv, .json, .jsonl" in message


@pytest.mark.usefixtures("permissions")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", TEXTS, list(LABELS))
    file.chmod(0)
    assert "Permission denied" in fails(file)[0]


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    train = write_folder(tmp_path / "train", {"dog": 3, "cat": 2})
    validation = write_folder(tmp_path / "val", {"dog": 1})
    raw = read_splits("image-classification", seed=0, train=train, validation=validation, image="img", label="fine")
    assert raw.label_names == ["cat", "dog"]
    assert raw.train["label"][:] == [0, 0, 1, 1, 1]
    assert raw.validation["label"][:] == [1]
    assert raw.train[4]["image"].getpixel((0, 0)) == (20, 20, 20)


def test_folders_that_are_no_classes(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(png(1))
    with pytest.raises(DataError, match="has no folders with images in them"):
        read_splits("image-classification", seed=0, train=tmp_path / "flat", validation_share=0.5)


def test_a_row_of_a_csv_may_be_long(tmp_path: Path) -> None:
    texts = ["short", "x" * 3_000_000, "line\nbreak " * 200_000, "short again"]
    file = write_csv(tmp_path / "a.csv", texts, [0, 1, 0, 1])
    assert read_texts(file, file).train["text"][:] == texts


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, '[{"sentence": ' + "[" * 100_000])
def test_values_in_values_without_end_are_refused(tmp_path: Path, suffix: str, content: str) -> None:
    file = tmp_path / f"a.{suffix}"
    file.write_text(content)
    message, hint = fails(file)
    assert message.startswith(f"{file} cannot be read as {suffix}: ")
    assert "nested too deeply" in message
    assert hint.startswith("repair the file")


@pytest.mark.parametrize("number", ["9" * 30, "-" + "9" * 30, "9" * 5000, "1e999"])
def test_a_number_that_no_column_holds(tmp_path: Path, number: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"sentence": "a", "label": {number}}}\n{{"sentence": "b", "label": 1}}\n')
    assert str(file) in fails(file)[0]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.{suffix}"
    os.mkfifo(file)
    message, hint = fails(file)
    assert message == f"{file} is no regular file, but a pipe, a device or a socket"
    assert "--set data.train=FILE" in hint


def test_a_folder_named_like_a_file_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.csv").mkdir()
    assert fails(tmp_path / "a.csv")[0] == f"{tmp_path / 'a.csv'} is a folder, but texts are read from a file"


@pytest.mark.parametrize("as_struct", [True, False])
def test_encoded_images_in_parquet(tmp_path: Path, as_struct: bool) -> None:
    images = [{"bytes": png(i), "path": None} if as_struct else png(i) for i in (7, 8)]
    parquet.write_table(pa.table({"img": images, "label": [0, 1]}), tmp_path / "a.parquet")
    raw = read_splits(
        "image-classification", seed=0, train=tmp_path / "a.parquet", validation=tmp_path / "a.parquet", image="img"
    )
    assert [image.getpixel((0, 0))[0] for image in raw.train["image"]] == [7, 8]


def test_paths_of_images_start_at_their_file(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(3))
    (tmp_path / "b.png").write_bytes(png(4))
    rows: list[dict[str, object]] = [{"image": "a.png", "label": 0}, {"image": str(tmp_path / "b.png"), "label": 1}]
    file = write_jsonl(folder / "list.jsonl", rows)
    raw = read_splits("image-classification", seed=0, train=file, validation=file)
    assert [image.getpixel((0, 0))[0] for image in raw.train["image"]] == [3, 4]
    file = write_jsonl(folder / "list.jsonl", [*rows, {"image": "c.png", "label": 1}])
    with pytest.raises(DataError, match=r"the image .*c\.png in row 3 of .*list\.jsonl does not exist"):
        read_splits("image-classification", seed=0, train=file, validation=file)


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits  # here: its import takes a second, and no other test has need of it

    pixels, labels = load_digits(return_X_y=True)  # (1797, 64), (1797,)
    wanted = (pixels.reshape(-1, 8, 8) * 255 / 16).round()  # (1797, 8, 8)
    raw = read_splits("image-classification", seed=0, builtin="digits")
    for split in (raw.train, raw.validation):
        rows = np.array(split["row"][:]) - 1
        assert np.array_equal(np.stack([np.asarray(image) for image in split["image"]]), wanted[rows])
        assert np.array_equal(split["label"][:], labels[rows])


def test_digits_come_with_recap_in_a_fixed_split() -> None:
    raw = read_splits("image-classification", seed=0, builtin="digits")
    assert raw.label_names == [str(digit) for digit in range(10)]
    assert (len(raw.train), len(raw.validation)) == (1438, 359)
    counts = torch.bincount(torch.tensor(raw.validation["label"][:]))
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert raw.train[0]["image"].size == (8, 8)
    assert raw.train[0]["image"].mode == "L"
    again = read_splits("image-classification", seed=0, builtin="digits")
    other = read_splits("image-classification", seed=1, builtin="digits")
    assert raw.validation["row"][:] == again.validation["row"][:] != other.validation["row"][:]
    assert not set(raw.validation["row"]) & set(raw.train["row"])


def test_digits_are_no_texts() -> None:
    with pytest.raises(DataError, match="has no column 'text'; its columns are: image, label"):
        read_splits("text-classification", seed=0, builtin="digits")


def test_no_source_at_all() -> None:
    with pytest.raises(DataError, match="names no data"):
        read_splits("text-classification", seed=0)


def test_hold_out_takes_a_share_of_every_label() -> None:
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)[torch.randperm(100, generator=torch.Generator().manual_seed(3))]
    kept, out = hold_out(labels, 0.1, seed=0, origin="x")
    assert torch.bincount(labels[out]).tolist() == [7, 2, 1]
    assert torch.cat([kept, out]).sort().values.tolist() == list(range(100))


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_hold_out_leaves_examples_on_both_sides(share: float) -> None:
    with pytest.raises(DataError, match="leaves none for"):
        hold_out(torch.tensor([0, 1, 0]), share, seed=0, origin="x")


def test_samples_are_the_first_after_a_shuffle(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [str(i) for i in range(40)], [i % 2 for i in range(40)])
    small = read_texts(file, file, train_samples=5, validation_samples=100)
    larger = read_texts(file, file, train_samples=10)
    assert small.train["row"][:] == larger.train["row"][:5] != [1, 2, 3, 4, 5]
    assert small.validation["row"][:] == list(range(1, 41))
    assert small.train["text"][0] == str(small.train["row"][0] - 1)


@needs_shared
def test_real_glue_files() -> None:
    folder = SHARED / "glue" / "cola"
    raw = read_texts(folder / "train.parquet", folder / "validation.parquet")
    assert (len(raw.train), len(raw.validation), raw.label_names) == (8551, 1043, ["0", "1"])
    assert fails(folder / "train.parquet", folder / "test.parquet")[0].startswith(
        f"column 'label' of {folder / 'test.parquet'} holds -1 in row 1, but"
    )


@needs_shared
def test_real_cifar_images() -> None:
    file = SHARED / "cifar100" / "test.parquet"
    raw = read_splits("image-classification", seed=0, train=file, validation_share=0.1, train_samples=10)
    assert (len(raw.train), len(raw.validation), len(raw.label_names)) == (10, 1000, 100)
    assert raw.train[0]["image"].size == (32, 32)
