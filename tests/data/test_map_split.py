"""Label maps of a split: their sizes, decoded or held, beside the images that they belong to, and those that do not fit."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from recap_cli.core.task import IGNORED
from recap_cli.data import crops, map_split
from recap_cli.data.crops import VARIANTS, window
from recap_cli.data.images import LOOKED_AT, RAM_BYTES, ImageInputs
from recap_cli.data.label_maps import open_map, reading_of
from recap_cli.data.map_classes import MapClasses, map_classes
from recap_cli.data.sampling import batches
from recap_cli.data.soft_targets import fingerprint
from recap_cli.data.sources import Raw
from recap_cli.data.split import Split
from recap_cli.data.splits import make_split
from recap_cli.errors import DataError
from recap_cli.recipe.schema import Data
from tests.reading import read_splits

NATIVE = (20, 24)  # height and width of the made images
VALUES = NATIVE[0] * NATIVE[1]
COUNT = 5
PLACES = [f"place {i}" for i in range(VALUES)]
ROAD = ("road", "tree")


def png(image: Image.Image, **how: Any) -> bytes:
    file = BytesIO()
    image.save(file, "png", **how)
    return file.getvalue()


def places(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose pixels say where they are, and a map whose values say it, too."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows * 10, columns * 10, np.full_like(rows, 200)], axis=-1).astype(np.uint8)
    return image, (rows * width + columns).astype(np.uint16)


def placed(count: int = COUNT) -> dict[str, list[Any]]:
    image, label = places(*NATIVE)
    return {"image": [png(Image.fromarray(image))] * count, "label": [png(Image.fromarray(label))] * count}


def noise(sizes: list[tuple[int, int]], values: int = 3) -> dict[str, list[Any]]:
    """Images and maps of random pixels, of these (height, width)."""
    random = np.random.default_rng(0)
    images = [png(Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))) for size in sizes]
    labels = [png(Image.fromarray(random.integers(0, values, size, dtype=np.uint8))) for size in sizes]
    return {"image": images, "label": labels}


def written(folder: Path, columns: dict[str, list[Any]], name: str = "data.parquet") -> Path:
    parquet.write_table(pa.table(columns), folder / name)
    return folder / name


def raw_of(folder: Path, columns: dict[str, list[Any]], names: Sequence[str] = (), **data: Any) -> Raw:
    """The examples of a file, whose classes have these names if any are given."""
    file = written(folder, columns)
    if names:
        (folder / "classes.json").write_text(json.dumps(list(names)))
        data["classes"] = folder / "classes.json"
    return read_splits("semantic-segmentation", train=file, validation=file, image="image", **data)


def inputs_of(names: Sequence[str], *, native: bool = False, augment: Any = "none") -> ImageInputs:
    """Inputs of 16 × 16 pixels, with maps of the values 0, 1 … for these names, and 255 for what is ignored."""
    classes = MapClasses(tuple(names), tuple(range(len(names))), None, frozenset({255}))
    reading = replace(reading_of(classes, names), native=native)
    return ImageInputs((16, 16), 3, (0.5,) * 3, (0.25,) * 3, "nearest", augment, reading)


def split_of(raw: Raw, inputs: ImageInputs, *, ram_bytes: int = RAM_BYTES, workers: int = 0) -> Split:
    return make_split(raw.train, inputs, origin="made.parquet", workers=workers, ram_bytes=ram_bytes)


SIZES = [(20, 24), (16, 16), (9, 31), (20, 24), (40, 8)]
EVERY = torch.arange(len(SIZES))


def test_a_model_is_trained_on_maps_of_the_size_of_its_images(tmp_path: Path) -> None:
    columns = noise(SIZES)
    batch = split_of(raw_of(tmp_path, columns), inputs_of(["0", "1", "2"])).batch(EVERY)
    assert batch["labels"].shape == (5, 16, 16)
    assert batch["labels"].dtype == torch.int64
    assert "label_sizes" not in batch  # all are of one size
    for label, stored in zip(batch["labels"], columns["label"], strict=True):
        wanted = Image.open(BytesIO(stored)).resize((16, 16), Image.Resampling.NEAREST)
        assert label.tolist() == np.array(wanted).tolist()


@pytest.mark.parametrize("ram_bytes", [0, RAM_BYTES])
def test_a_model_is_scored_on_maps_of_their_own_size_which_a_batch_pads(ram_bytes: int, tmp_path: Path) -> None:
    columns = noise(SIZES)
    split = split_of(raw_of(tmp_path, columns), inputs_of(["0", "1", "2"], native=True), ram_bytes=ram_bytes)
    batch = split.batch(EVERY)
    assert batch["labels"].shape == (5, 40, 31)
    assert batch["label_sizes"].tolist() == [list(size) for size in SIZES]
    for label, (height, width), stored in zip(batch["labels"], SIZES, columns["label"], strict=True):
        assert label[:height, :width].tolist() == np.array(Image.open(BytesIO(stored))).tolist()
        assert int((label != IGNORED).sum()) == height * width
    assert split.labels(torch.tensor([1]))["labels"].shape == (1, 16, 16)


@pytest.mark.parametrize("augment", ["none", "flip"])
@pytest.mark.parametrize("workers", [0, 2])
def test_maps_in_memory_are_those_that_each_batch_decodes(augment: str, workers: int, tmp_path: Path) -> None:
    raw, inputs = raw_of(tmp_path, noise(SIZES)), inputs_of(["0", "1", "2"], augment=augment)
    held, decoded = split_of(raw, inputs), split_of(raw, inputs, ram_bytes=0, workers=workers)
    for indices in (EVERY, torch.tensor([3, 0, 0, 4, 1])):
        for variants in (None, torch.tensor([0, 1, 0, 1, 1])):
            found, wanted = held.batch(indices, variants), decoded.batch(indices, variants)
            assert found.keys() == wanted.keys() == {"pixel_values", "labels"}
            assert all(torch.equal(found[name], wanted[name]) for name in found)


def shown(split: Split, indices: torch.Tensor, variants: torch.Tensor | None) -> None:
    """Check that each pixel of the images and of the maps was at the same place, and padding in both or in neither."""
    batch = split.batch(indices, variants)
    shades = (batch["pixel_values"] * 0.25 + 0.5).mul(255).round().long()  # (batch, 3, height, width)
    rows, columns, padding = shades[:, 0] // 10, shades[:, 1] // 10, shades[:, 2] == 128  # the mean
    assert torch.equal(batch["labels"] == IGNORED, padding)
    assert torch.equal(batch["labels"][~padding], (rows * NATIVE[1] + columns)[~padding])


@pytest.mark.parametrize(("augment", "variants"), [("none", 1), ("flip", 2), ("crop", 1 + VARIANTS)])
def test_an_image_and_its_map_show_the_same_part(augment: str, variants: int, tmp_path: Path) -> None:
    split = split_of(raw_of(tmp_path, placed(), PLACES), inputs_of(PLACES, augment=augment))
    assert split.variants == variants
    shown(split, torch.arange(COUNT), None)
    shown(split, torch.arange(variants) % COUNT, torch.arange(variants))


def test_a_flip_turns_an_image_and_its_map(tmp_path: Path) -> None:
    split = split_of(raw_of(tmp_path, placed(), PLACES), inputs_of(PLACES, augment="flip"))
    plain, flipped = (split.batch(torch.tensor([2]), torch.tensor([variant])) for variant in (0, 1))
    assert not torch.equal(plain["labels"], flipped["labels"])
    for name in ("labels", "pixel_values"):
        assert torch.equal(plain[name].flip(-1), flipped[name])


def test_a_drawn_crop_is_none_of_the_example_as_it_is_and_the_same_in_every_process(tmp_path: Path) -> None:
    inputs = inputs_of(PLACES, augment="crop")
    first, second = (split_of(raw_of(tmp_path, placed(), PLACES), inputs, workers=workers) for workers in (0, 2))
    drawn = [
        torch.cat([batch["labels"] for batch in batches(split, torch.arange(COUNT), size, augment_seed=3)])
        for split, size in ((first, 2), (second, 5))
    ]
    assert torch.equal(*drawn)
    whole = first.batch(torch.arange(COUNT))["labels"]
    assert not any(torch.equal(one, plain) for one, plain in zip(drawn[0], whole, strict=True))
    assert window(4, 7) == window(4, 7)


def test_windows_are_within_the_image_of_all_scales_and_half_of_them_are_flipped() -> None:
    assert all(window(index, 0) == crops.WHOLE for index in range(3))
    windows = [window(index, variant) for index in range(20) for variant in range(1, VARIANTS + 1)]
    assert len(set(windows)) == len(windows)
    scales = []
    for one in windows:
        left, top, right, bottom = one.box
        x, y, wide, high = one.place
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        assert 0 <= min(x, y) <= max(x, y) + wide <= 1 + 1e-12
        assert wide == high
        assert right - left == pytest.approx(bottom - top)
        assert min(1 / (right - left), 1 / wide) == 1
        scales.append(wide / (right - left))
    log = np.log2(scales)
    assert -1 <= log.min() < -0.95
    assert 0.95 < log.max() <= 1
    assert abs(log.mean()) < 0.1
    assert 0.4 < np.mean([one.flip for one in windows]) < 0.6


def test_pixels_of_each_class_are_counted_without_those_that_are_ignored(tmp_path: Path) -> None:
    columns = noise(SIZES, values=3)
    numbers = [np.array(Image.open(BytesIO(stored))) for stored in columns["label"]]
    wanted = np.bincount(np.concatenate([one.ravel() for one in numbers]), minlength=3)
    for ram_bytes in (0, RAM_BYTES):
        reading = reading_of(MapClasses(ROAD, (1, 2), None, frozenset({0})), ROAD)
        inputs = replace(inputs_of(ROAD), maps=replace(reading, native=True))
        targets = split_of(raw_of(tmp_path, columns), inputs, ram_bytes=ram_bytes).targets
        assert len(targets) == 5
        assert targets.pixels_of(2).tolist() == wanted[1:].tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("ram_bytes", [0, RAM_BYTES])
def test_a_digest_of_a_split_hangs_on_its_maps(ram_bytes: int, tmp_path: Path) -> None:
    columns, names = noise(SIZES), ["0", "1", "2"]
    first = fingerprint(split_of(raw_of(tmp_path, columns), inputs_of(names), ram_bytes=ram_bytes))
    assert fingerprint(split_of(raw_of(tmp_path, columns), inputs_of(names), ram_bytes=ram_bytes)) == first
    turned = np.array(Image.open(BytesIO(columns["label"][4])))[::-1]
    columns["label"][4] = png(Image.fromarray(turned))
    assert fingerprint(split_of(raw_of(tmp_path, columns), inputs_of(names), ram_bytes=ram_bytes)) != first


def test_a_map_fits_an_image_that_its_exif_turns(tmp_path: Path) -> None:
    image, label = places(*NATIVE)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    columns = {"image": [png(Image.fromarray(np.rot90(image)), exif=exif)] * 2, "label": [png(Image.fromarray(label))] * 2}
    split = split_of(raw_of(tmp_path, columns, PLACES), inputs_of(PLACES))
    shown(split, torch.arange(2), None)


@pytest.mark.parametrize("native", [True, False])
def test_images_without_maps_have_blank_ones_of_their_size(native: bool, tmp_path: Path) -> None:
    raw = raw_of(tmp_path, noise(SIZES))
    split = make_split(raw.train.remove_columns("label"), inputs_of(["0", "1"], native=native), origin="new")
    batch = split.batch(torch.tensor([2, 4]))
    assert batch.get("label_sizes", torch.empty(0)).tolist() == ([[9, 31], [40, 8]] if native else [])
    assert bool((batch["labels"] == IGNORED).all())
    assert split.targets.pixels_of(2).tolist() == [0, 0]  # type: ignore[union-attr]


def with_map(row: int, label: bytes | None) -> Callable[[dict[str, list[Any]]], None]:
    def change(columns: dict[str, list[Any]]) -> None:
        columns["label"][row - 1] = label

    return change


SMALL = png(Image.new("L", (16, 17)))
WRONG: dict[str, tuple[Callable[[dict[str, list[Any]]], None], str, str]] = {  # the change, what is said, and the hint
    "another size": (
        with_map(2, SMALL),
        "row 2 of made.parquet: the image has 16 × 16 pixels, and its label map 17 × 16",
        "give each image the map that was drawn for it",
    ),
    "turned": (
        with_map(1, png(Image.new("L", (20, 24)))),
        "row 1 of made.parquet: the image has 20 × 24 pixels, and its label map 24 × 20",
        "give each image",
    ),
    "a value that is no class": (
        with_map(5, png(Image.new("L", (8, 40), 12))),
        "the label map in row 5 of made.parquet: it has the value 12 at row 1, column 1, which is no class: they are 0, 1, 2",
        "--set 'data.ignore_index=[12,255]'",
    ),
    "a broken file": (
        with_map(3, SMALL[:40]),
        "the label map in row 3 of made.parquet cannot be decoded: ",
        "replace the map, or remove its row",
    ),
    "no image": (
        with_map(3, b"no"),
        "row 3 of made.parquet cannot be decoded: it is of no format that Pillow knows",
        "replace",
    ),
    "colours without names": (
        with_map(4, png(Image.new("RGB", (24, 20), (1, 2, 3)))),
        "the label map in row 4 of made.parquet: it is coloured, and the colours have no names",
        "--set data.classes=FILE",
    ),
}


@pytest.mark.parametrize(("augment", "ram_bytes"), [("flip", 0), ("flip", RAM_BYTES), ("crop", RAM_BYTES)])
@pytest.mark.parametrize("name", WRONG)
def test_a_map_that_does_not_fit_is_told_with_its_row_before_a_training(
    name: str, augment: str, ram_bytes: int, tmp_path: Path
) -> None:
    change, said, hint = WRONG[name]
    columns = noise(SIZES)
    change(columns)
    raw = raw_of(tmp_path, columns, ["0", "1", "2"])
    with pytest.raises(DataError) as caught:
        split_of(raw, inputs_of(["0", "1", "2"], augment=augment), ram_bytes=ram_bytes)
    assert said in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_file_is_named_beside_its_row(tmp_path: Path) -> None:
    columns = noise(SIZES)
    for i, (image, label) in enumerate(zip(columns["image"], columns["label"], strict=True)):
        (tmp_path / f"{i}.jpg").write_bytes(image)
        (tmp_path / f"{i}_map.png").write_bytes(label if i != 1 else SMALL)
    lines = ["picture,truth", *(f"{i}.jpg,{i}_map.png" for i in range(5))]
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "classes.json").write_text('["0", "1", "2"]')
    data = {"train": tmp_path / "data.csv", "validation": tmp_path / "data.csv", "classes": tmp_path / "classes.json"}
    data |= {"image": "picture", "label_map": "truth"}
    raw = read_splits("semantic-segmentation", **data)
    with pytest.raises(DataError, match=r"row 2 of made\.parquet: the image has 16 × 16 pixels"):
        split_of(raw, inputs_of(["0", "1", "2"]))
    (tmp_path / "1_map.png").write_bytes(SMALL[:40])
    with pytest.raises(DataError, match=rf"the label map {tmp_path}/1_map\.png in row 2 of made\.parquet cannot be decoded"):
        split_of(raw, inputs_of(["0", "1", "2"]))
    (tmp_path / "1_map.png").unlink()
    with pytest.raises(DataError, match=rf"the image {tmp_path}/1_map\.png in row 2 of {tmp_path}/data\.csv does not exist"):
        read_splits("semantic-segmentation", **data)


def test_a_row_without_a_map_is_told(tmp_path: Path) -> None:
    columns = noise(SIZES)
    columns["label"][2] = None
    with pytest.raises(DataError, match=r"column 'label' of .* has no value in row 3 \(1 such rows\)"):
        raw_of(tmp_path, columns)


def test_maps_whose_pixels_are_all_ignored_are_refused_wherever_that_is_seen(tmp_path: Path) -> None:
    columns = noise(SIZES)
    columns["label"] = [png(Image.new("L", size[::-1], 255)) for size in SIZES]
    with pytest.raises(DataError, match="all pixels of its maps are ignored") as caught:
        raw_of(tmp_path, columns)
    assert "--set data.ignore_index=255" in (caught.value.hint or "")
    raw = raw_of(tmp_path, columns, ROAD)
    for ram_bytes in (0, RAM_BYTES):
        for augment in ("none", "crop"):
            with pytest.raises(DataError, match=r"made\.parquet: all pixels of its maps are ignored"):
                split_of(raw, inputs_of(ROAD, augment=augment), ram_bytes=ram_bytes)


def test_one_pixel_that_is_counted_is_enough_wherever_it_stands(tmp_path: Path) -> None:
    """Of more than `LOOKED_AT` images every other one is looked at first; the one that has it is not among them."""
    image, void = png(Image.new("RGB", (2, 2))), png(Image.new("L", (2, 2), 255))
    last = Image.new("L", (2, 2), 255)
    last.putpixel((1, 1), 1)
    columns = {"image": [image] * (LOOKED_AT + 2), "label": [void] * (LOOKED_AT + 1) + [png(last)]}
    raw = raw_of(tmp_path, columns, ROAD)
    split = split_of(raw, inputs_of(ROAD), ram_bytes=0)
    assert int((split.labels(torch.tensor([LOOKED_AT + 1]))["labels"] != IGNORED).sum()) == 64


def test_classes_that_nobody_has_named_are_the_values_in_their_order(tmp_path: Path) -> None:
    columns = {"image": noise([(1, 3)])["image"], "label": [png(Image.fromarray(np.array([[10, 9, 255]], dtype=np.uint8)))]}
    assert raw_of(tmp_path, columns).label_names == ["9", "10"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([7, 7, 255], "have no value but 7, apart from what is ignored"),
        (list(range(300)), "have 300 different values, and so no"),
    ],
)
def test_values_that_cannot_be_classes_are_refused(values: list[int], said: str, tmp_path: Path) -> None:
    label = png(Image.fromarray(np.array([values], dtype=np.uint16)))
    with pytest.raises(DataError, match=rf"the maps of column 'label' of .*data\.parquet {said}") as caught:
        raw_of(
            tmp_path, {"image": noise([(1, len(values))])["image"], "label": [label]}, ignore_index=255 if values[0] else None
        )
    assert "--set data.classes=FILE" in (caught.value.hint or "")


def test_colours_of_a_file_of_classes_give_the_classes(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('[{"name": "road", "color": [9, 8, 7]}, {"name": "tree", "color": [0, 99, 0]}]')
    shades = np.array([[[0, 99, 0], [9, 8, 7]]], dtype=np.uint8)
    columns = {"image": noise([(1, 2)])["image"], "label": [png(Image.fromarray(shades))]}
    raw = raw_of(tmp_path, columns, classes=tmp_path / "classes.json")
    classes = map_classes(Data(classes=str(tmp_path / "classes.json")).model_dump())
    inputs = replace(inputs_of(ROAD), maps=replace(reading_of(classes, raw.label_names), native=True))
    assert split_of(raw, inputs).batch(torch.tensor([0]))["labels"].tolist() == [[[1, 0]]]


@pytest.mark.parametrize(
    ("augment", "ram_bytes", "times"),
    [("flip", RAM_BYTES, 0), ("flip", 5 * 256 * 2, 0), ("flip", 5 * 256 * 2 - 1, 1), ("crop", RAM_BYTES, 1)],
)
def test_a_batch_decodes_maps_only_where_they_do_not_fit_or_are_cropped(
    augment: str, ram_bytes: int, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = split_of(raw_of(tmp_path, noise(SIZES)), inputs_of(["0", "1", "2"], augment=augment), ram_bytes=ram_bytes)
    opened: list[Any] = []

    def counted(stored: Any, read: Any) -> Any:
        opened.append(stored)
        return open_map(stored, read)

    monkeypatch.setattr(map_split, "open_map", counted)
    split.labels(EVERY)
    assert len(opened) == times * len(SIZES)


def test_maps_that_are_larger_than_those_that_were_looked_at_are_not_held() -> None:
    def decoded(indices: torch.Tensor, _: torch.Tensor | None) -> list[torch.Tensor]:
        return [torch.zeros(10, int(index) + 1, dtype=torch.int16) for index in indices]

    whole = sum(20 * (index + 1) for index in range(4))
    every = [range(0, 2), range(2, 4)]
    held = map_split._decoded_within(whole, decoded, every)
    assert [one.shape[1] for one in held or []] == [1, 2, 3, 4]
    assert map_split._decoded_within(whole - 1, decoded, every) is None
