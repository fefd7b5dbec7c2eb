"""A folder of images and a folder of their label maps, as an Arrow table: the paths of both, a row for each image."""

import os
import re
from collections.abc import Collection, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from recap_cli.data.class_folders import IMAGE_SUFFIXES, checked, files_below, is_junk_name
from recap_cli.errors import DataError
from recap_cli.recipe.near import near
from recap_cli.recipe.yaml import setting
from recap_cli.untrusted.files import some

if TYPE_CHECKING:
    import pyarrow as pa

USUAL = {  # what such folders are called most often, in lower case
    "image": ("images", "image", "imgs", "img", "leftimg8bit", "jpegimages", "rgb"),
    "label_map": ("label_maps", "labels", "label", "annotations", "masks", "mask", "segmentation", "gtfine", "semantic"),
}
UNNAMED = {"image": ("image",), "label_map": ("label_map", "label")}  # what a recipe calls them that names no folder
SPLIT = "{split}"
MARKS = "_-./"  # where what says the kind of a file begins
LISTED = 3
Keyed = dict[str, Path]  # by the path below its folder, without suffix


def read_pairs(path: Path, *, image: str, label_map: str, split: str, key: str) -> "tuple[pa.Table, list[str]]":
    """Read the images and the label maps below a folder.

    Each is named by a folder below it, or by a pattern such as `gtFine/{split}/**/*_labelIds.png`. A pair has the same path
    below its folder, apart from the suffix, and from an ending that all images, or all maps, have in common.

    Args:
        path: The folder with both.
        image: Where the images are: a folder or a pattern.
        label_map: Where the maps are, likewise.
        split: What stands for `{split}` in either.
        key: The recipe key that names the folder, for hints.

    Returns:
        A table with the columns `image` and `label_map`, and notes.

    Raises:
        DataError: There are no images or no maps, or an image has no map, or several.
    """
    import pyarrow as pa

    try:
        images = _files(path, "image", image.replace(SPLIT, split), key)
        maps = _files(path, "label_map", label_map.replace(SPLIT, split), key)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}", hint=f"name another folder with --set {key}=FOLDER") from error
    pairs, alone = _pairs(path, images, maps)
    notes = [f"{path}: {len(alone)} label maps without an image, such as {alone[0]}, are ignored"] if alone else []
    found = [(checked(one), checked(other)) for one, other in pairs]
    of_images, of_maps = zip(*found, strict=True)
    return pa.table({"image": pa.array(of_images), "label_map": pa.array(of_maps)}), notes


def _files(path: Path, role: str, name: str, key: str) -> Keyed:
    """Return the images that a name means. Raises `DataError` if there are none, or two of one name."""
    what = {"image": "images", "label_map": "label maps"}[role]
    folder, pattern = _place(path, role, name)
    try:
        files = sorted(_below(folder, pattern)) if folder is not None and folder.is_dir() else []
    except ValueError as error:  # of `glob`
        raise DataError(f"{name!r} is no pattern of {what}: {error}", hint=PATTERN) from error
    if folder is None or not files:
        others = sorted(child.name for child in path.iterdir() if child.is_dir() and not is_junk_name(child.name))
        there = f"its folders are: {', '.join(others[:10])}" if others else "it has no folders"
        meant = (*near(name, others), *others, "FOLDER")[0]
        raise DataError(
            f"{path} has no {what} in {name!r}; {there}",
            hint=f"name their folder, or a pattern: {setting(f'data.{role}', meant)}; or another folder above both: "
            f"--set {key}=FOLDER",
        )
    found: Keyed = {}
    for file in files:
        other = found.setdefault(os.path.relpath(file.with_suffix(""), folder), file)
        if other != file:
            raise DataError(f"{path} has two {what} of one name: {_named([other, file], path)}", hint=PATTERN)
    return found


PATTERN = "name the files of one kind by a pattern, as in --set 'data.label_map=labels/**/*_labelIds.png'"


def _place(path: Path, role: str, name: str) -> tuple[Path | None, str | None]:
    """Return the folder that a name means and the pattern inside of it, if there is one; no folder where there is none."""
    parts = Path(name).parts
    if (path / name).is_dir():
        return path / name, None
    if (first := next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), None)) is not None:
        return path.joinpath(*parts[:first]), str(Path(*parts[first:]))
    by_name = {child.name.lower(): child for child in sorted(path.iterdir()) if child.is_dir()}
    usual = USUAL[role] if name in UNNAMED[role] else ()
    return next((by_name[one] for one in usual if one in by_name), None), None


def _below(folder: Path, pattern: str | None) -> Iterator[Path]:
    for file in files_below(folder) if pattern is None else folder.glob(pattern):
        parts = file.relative_to(folder).parts
        if file.suffix.lower() in IMAGE_SUFFIXES and not any(map(is_junk_name, parts)):
            yield file


def _pairs(path: Path, images: Keyed, maps: Keyed) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Return the pairs, and the names of maps without an image. Raises `DataError` for an image without a map."""
    ways = product(_endings(images), _endings(maps))
    of_images, of_maps = min(ways, key=lambda way: (len(_lacking(images, maps, *way)), len(way[0]) + len(way[1])))
    if lacking := _lacking(images, maps, of_images, of_maps):
        _check_several(path, images, maps)
        raise DataError(
            f"{path}: no label map for {_named([images[key] for key in lacking], path)}",
            hint="give each image a map of the same name, as in images/0.jpg and labels/0.png; remove the image; or name the "
            "images that have one by a pattern, as in --set 'data.image=images/**/*_10.png'",
        )
    partners = {key.removesuffix(of_maps): key for key in maps}
    pairs = {key: partners.pop(key.removesuffix(of_images)) for key in sorted(images)}
    alone = [os.path.relpath(maps[key], path) for key in sorted(partners.values())]
    return [(images[key], maps[other]) for key, other in pairs.items()], alone


def _endings(keys: Collection[str]) -> list[str]:
    """Return what all keys end in, from a mark on, as `_leftImg8bit`, the shortest first; and before that, nothing.

    An ending has a letter: `dog_1` and `dog_2` are two dogs.
    """
    common = os.path.commonprefix([key[::-1] for key in keys])[::-1]  # noqa: RUF071 (of letters, as it is meant)
    most = min(map(len, keys)) - 1  # something is left of each
    found = (common[at:] for at, sign in enumerate(common) if sign in MARKS)
    return ["", *sorted((one for one in found if len(one) <= most and re.search(r"[^\W\d_]", one)), key=len)]


def _lacking(images: Keyed, maps: Keyed, of_images: str, of_maps: str) -> list[str]:
    """Return the images without a map of the same name, apart from these endings; sorted."""
    there = {key.removesuffix(of_maps) for key in maps}
    return sorted(key for key in images if key.removesuffix(of_images) not in there)


def _check_several(path: Path, images: Keyed, maps: Keyed) -> None:
    """Refuse maps of several kinds, as `x_color.png` and `x_labelIds.png`. Raises `DataError`."""
    for key, ending in product(sorted(images)[:1], _endings(images)):
        name = key.removesuffix(ending)
        found = [maps[other] for other in sorted(maps) if other.startswith(name) and other[len(name) :][:1] in tuple(MARKS)]
        if len(found) > 1:
            image = os.path.relpath(images[key], path)
            raise DataError(f"{path}: several label maps may belong to {image}: {_named(found, path)}", hint=PATTERN)


def _named(files: Collection[Path], path: Path) -> str:
    return some([os.path.relpath(file, path) for file in files], LISTED)
