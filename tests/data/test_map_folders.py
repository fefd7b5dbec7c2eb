"""Folders of images and of their label maps: the layouts of data sets, and what does not pair."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recap_cli.data.map_folders import read_pairs
from recap_cli.errors import DataError
from tests.reading import read_splits


def write(folder: Path, *names: str, size: tuple[int, int] = (4, 3)) -> Path:
    """Write files; maps, which have no folder of images in their name, have the values 0 and 1."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix not in (".png", ".jpg", ".tif") or file.name.startswith("."):
            file.write_text("{}")
            continue
        image = Image.new("L", size)
        image.putpixel((0, 0), 1)
        image.save(file)
    return folder


def pairs(folder: Path, image: str = "image", label_map: str = "label", split: str = "train") -> list[tuple[str, str]]:
    table, _ = read_pairs(folder, image=image, label_map=label_map, split=split, key="data.train")
    columns = table.to_pydict()
    return [
        (str(Path(one).relative_to(folder)), str(Path(other).relative_to(folder)))
        for one, other in zip(columns["image"], columns["label_map"], strict=True)
    ]


def fails(folder: Path, image: str = "image", label_map: str = "label") -> tuple[str, str]:
    with pytest.raises(DataError) as caught:
        pairs(folder, image, label_map)
    return caught.value.message.removeprefix(f"{folder}"), caught.value.hint or ""


CITIES = ("aachen/aachen_000000_000019", "aachen/aachen_000001_000019", "bochum/bochum_000000_000885")
KINDS = ("_gtFine_labelIds.png", "_gtFine_color.png", "_gtFine_instanceIds.png", "_gtFine_polygons.json")


def cityscapes(folder: Path, *cities: str) -> Path:
    images = [f"leftImg8bit/{split}/{city}_leftImg8bit.png" for split in ("train", "val") for city in cities]
    maps = [f"gtFine/{split}/{city}{kind}" for split in ("train", "val") for city in cities for kind in KINDS]
    return write(folder, *images, *maps)


@pytest.mark.parametrize("cities", [CITIES, CITIES[:2], CITIES[:1]], ids=["three", "of one frame number", "one"])
@pytest.mark.parametrize("image", ["leftImg8bit/{split}", "leftImg8bit/{split}/**/*_leftImg8bit.png"])
def test_cityscapes_is_read_by_its_split_and_the_ending_of_its_maps(
    image: str, cities: tuple[str, ...], tmp_path: Path
) -> None:
    folder = cityscapes(tmp_path, *cities)
    found = pairs(folder, image, "gtFine/{split}/**/*_labelIds.png", "val")
    assert found == [(f"leftImg8bit/val/{city}_leftImg8bit.png", f"gtFine/val/{city}_gtFine_labelIds.png") for city in cities]


def test_maps_of_several_kinds_are_told_from_a_missing_one(tmp_path: Path) -> None:
    message, hint = fails(cityscapes(tmp_path, *CITIES), "leftImg8bit/{split}", "gtFine/{split}")
    city = f"gtFine/train/{CITIES[0]}_gtFine"
    assert message == (
        f": several label maps may belong to leftImg8bit/train/{CITIES[0]}_leftImg8bit.png: "
        f"{city}_color.png, {city}_instanceIds.png, {city}_labelIds.png"
    )
    assert "*_labelIds.png" in hint


def test_kitti_is_read_by_its_folders_and_frames_without_a_map_by_a_pattern(tmp_path: Path) -> None:
    names = [f"training/{kind}/00000{i}_10.png" for i in range(2) for kind in ("image_2", "semantic", "semantic_rgb")]
    folder = write(tmp_path, *names)
    wanted = [(f"training/image_2/00000{i}_10.png", f"training/semantic/00000{i}_10.png") for i in range(2)]
    assert pairs(folder, "training/image_2", "training/semantic") == wanted
    write(folder, "training/image_2/000000_11.png")
    message, hint = fails(folder, "training/image_2", "training/semantic")
    assert message == ": no label map for training/image_2/000000_11.png"
    assert "by a pattern, as in --set 'data.image=images/**/*_10.png'" in hint
    assert pairs(folder, "training/image_2/*_10.png", "training/semantic") == wanted


LAYOUTS: dict[str, tuple[tuple[str, ...], str, str]] = {  # the files, two pairs in order; the names of both
    "usual names": (("images/0.jpg", "labels/0.png", "images/1.jpg", "labels/1.png"), "image", "label"),
    "usual names in capitals": (("RGB/0.jpg", "Masks/0.png", "RGB/1.jpg", "Masks/1.png"), "image", "label"),
    "folders in both": (("a/x/0.jpg", "b/x/0.png", "a/y/0.jpg", "b/y/0.png"), "a", "b"),
    "one folder": (("a/0.jpg", "a/0.png", "a/1.jpg", "a/1.png"), "a/*.jpg", "a/*.png"),
    "one folder, endings": (("a/0_img.png", "a/0_map.png", "a/1_img.png", "a/1_map.png"), "a/*_img.png", "a/*_map.png"),
    "an ending of maps": (("a/0.jpg", "b/0_mask.png", "a/1.jpg", "b/1_mask.png"), "a", "b"),
    "a folder for each pair": (("0/rgb.png", "0/map.png", "1/rgb.png", "1/map.png"), "*/rgb.png", "*/map.png"),
    "a folder named as a pattern": (("a[1]/0.jpg", "b/0.png", "a[1]/1.jpg", "b/1.png"), "a[1]", "b"),
    "names with points": (("a/v1.0_0.jpg", "b/v1.0_0.png", "a/v1.0_1.jpg", "b/v1.0_1.png"), "a", "b"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts(name: str, tmp_path: Path) -> None:
    files, image, label_map = LAYOUTS[name]
    assert pairs(write(tmp_path, *files), image, label_map) == [files[:2], files[2:]]


def test_maps_beyond_the_images_are_told_and_do_not_change_the_pairs(tmp_path: Path) -> None:
    """Of the images alone, `_10_img` is an ending too."""
    folder = write(tmp_path, "a/x_10_img.png", "a/y_10_img.png", "b/x_10_map.png", "b/y_10_map.png", "b/z_11_map.png")
    assert pairs(folder, "a", "b") == [("a/x_10_img.png", "b/x_10_map.png"), ("a/y_10_img.png", "b/y_10_map.png")]
    _, notes = read_pairs(folder, image="a", label_map="b", split="train", key="data.train")
    assert notes == [f"{folder}: 1 label maps without an image, such as b/z_11_map.png, are ignored"]


def test_images_without_a_map_are_named_and_numbers_are_no_endings(tmp_path: Path) -> None:
    assert fails(write(tmp_path / "one", "a/cat_1.jpg", "b/cat_2.png"), "a", "b")[0] == ": no label map for a/cat_1.jpg"
    folder = write(tmp_path / "five", *(f"a/{i}_img.png" for i in range(5)), "b/2_map.png")
    assert fails(folder, "a", "b")[0] == (": no label map for a/0_img.png, a/1_img.png, a/3_img.png and 1 more")


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    message, hint = fails(write(tmp_path, "a/0.jpg", "a/0.png", "b/0.png"), "a", "b")
    assert message == " has two images of one name: a/0.jpg, a/0.png"
    assert "--set 'data.label_map=" in hint
    assert "two label maps of one name: b/0.png, b/0.tif" in fails(write(tmp_path, "b/0.tif"), "a/*.jpg", "b")[0]


@pytest.mark.parametrize(("image", "label_map"), [("imgaes", "labels"), ("images", "lables"), ("images", "labels/*.gif")])
def test_a_name_that_is_not_there_is_not_replaced_by_a_usual_one(image: str, label_map: str, tmp_path: Path) -> None:
    """Only where the recipe names nothing are the usual names tried."""
    message, hint = fails(write(tmp_path, "images/0.png", "labels/0.png"), image, label_map)
    wrong = image if image != "images" else label_map
    assert message == f" has no {'images' if wrong == image else 'label maps'} in {wrong!r}; its folders are: images, labels"
    assert ("--set data.image=images" if wrong == image else "--set data.label_map=labels") in hint  # the one that is like it
    assert "--set data.train=FOLDER" in hint


def test_a_folder_without_folders_is_told(tmp_path: Path) -> None:
    assert fails(tmp_path)[0] == " has no images in 'image'; it has no folders"


@pytest.mark.parametrize("pattern", ["a**/x.png", "a/[", "***/x"])
def test_a_pattern_that_is_none_is_told(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no pattern of images|has no images in") as caught:
        pairs(write(tmp_path, "a/0.png", "b/0.png"), pattern, "b")
    assert "pattern" in (caught.value.hint or "")


def test_what_systems_leave_is_passed_over(tmp_path: Path) -> None:
    junk = ("a/.DS_Store", "a/._0.png", "a/Thumbs.db", "a/@eaDir/0.png", "b/.thumbnails/0.png", ".git/0.png", "README")
    assert pairs(write(tmp_path, "a/0.png", "b/0.png", *junk), "a", "b") == [("a/0.png", "b/0.png")]


def test_folders_may_lie_beside_the_one_that_is_named(tmp_path: Path) -> None:
    write(tmp_path, "set/x", "other/0.png", "maps/0.png")
    table, _ = read_pairs(tmp_path / "set", image="../other", label_map=str(tmp_path / "maps"), split="train", key="data.train")
    assert table["label_map"].to_pylist() == [str(tmp_path / "maps" / "0.png")]
    (tmp_path / "maps" / "0.png").rename(tmp_path / "maps" / "1.png")
    assert fails(tmp_path / "set", "../other", str(tmp_path / "maps"))[0] == ": no label map for ../other/0.png"


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "a/0.png", "b/1.png")
    (folder / "b" / "0.png").symlink_to("gone.png")
    assert fails(folder, "a", "b")[0] == "/b/0.png is a link to a file that does not exist"


@pytest.mark.usefixtures("permissions")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, "a/x/0.png", "a/y/0.png", "b/x/0.png", "b/y/0.png")
    (folder / "a" / "y").chmod(0)
    try:
        assert "Permission denied" in fails(folder, "a", "b")[0]
    finally:
        (folder / "a" / "y").chmod(0o700)


def splits_of(**data: Any) -> Any:
    return read_splits("semantic-segmentation", **data)


def test_each_split_of_a_recipe_has_its_own_name_in_the_patterns(tmp_path: Path) -> None:
    folder = cityscapes(tmp_path, *CITIES)
    names = {"image": "leftImg8bit/{split}", "label_map": "gtFine/{split}/**/*_labelIds.png", "validation_split": "val"}
    raw = splits_of(train=folder, validation=folder, **names)
    assert (len(raw.train), len(raw.validation), raw.label_names) == (3, 3, ["0", "1"])
    for split, part in (("train", raw.train), ("val", raw.validation)):
        stored = [row["path"] for column in ("image", "label") for row in part.data.table[column].to_pylist()]
        assert all(f"/{split}/" in path for path in stored)


def test_a_share_of_the_pairs_is_held_out(tmp_path: Path) -> None:
    raw = splits_of(
        train=write(tmp_path, *(f"{kind}/{i}.png" for kind in ("img", "masks") for i in range(4))), validation_share=0.25
    )
    assert (len(raw.train), len(raw.validation)) == (3, 1)
