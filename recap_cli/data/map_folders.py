"""A folder of images and a folder of their label maps, as an Arrow table: the paths of both, a row for each image."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recap_cli.data.class_folders import IMAGE_SUFFIXES, checked, is_junk_name
from recap_cli.errors import DataError
from recap_cli.recipe.yaml import setting

if TYPE_CHECKING:
    import pyarrow as pa

USUAL = {  # what such folders are called most often, in lower case
    "image": ("images", "image", "imgs", "img", "leftimg8bit", "jpegimages", "rgb"),
    "label_map": ("label_maps", "labels", "label", "annotations", "masks", "mask", "segmentation", "gtfine", "semantic"),
}
SPLIT = "{split}"
MARKS = "_-."  # where a name may end, and what says the kind of a file begins
LISTED = 3


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


Keyed = dict[str, Path]  # by the path below its folder, without suffix


def _files(path: Path, role: str, name: str, key: str) -> Keyed:
    """Return the images that a name means. Raises `DataError` if there are none."""
    folder, pattern = _place(path, role, name)
    files = sorted(_below(folder, pattern)) if folder is not None and folder.is_dir() else []
    if folder is None or not files:
        others = sorted(child.name for child in path.iterdir() if child.is_dir() and not is_junk_name(child.name))
        there = f"its folders are: {', '.join(others[:10])}" if others else "it has no folders"
        what = {"image": "images", "label_map": "label maps"}[role]
        raise DataError(
            f"{path} has no {what} in {name!r}; {there}",
            hint=f"name their folder, or a pattern: {setting(f'data.{role}', others[0] if others else 'FOLDER')}; or another "
            f"folder above both: --set {key}=FOLDER",
        )
    return {os.path.relpath(file.with_suffix(""), folder): file for file in files}


def _place(path: Path, role: str, name: str) -> tuple[Path | None, str]:
    """Return the folder that a name means and the pattern inside of it; no folder where nothing of such a name is there."""
    parts = Path(name).parts
    plain = [part for part in parts if not re.search(r"[*?\[]", part)]
    if len(plain) < len(parts):
        first = next(i for i, part in enumerate(parts) if part not in plain)
        return path.joinpath(*parts[:first]), str(Path(*parts[first:]))
    if (path / name).is_dir():
        return path / name, "**/*"
    by_name = {child.name.lower(): child for child in sorted(path.iterdir()) if child.is_dir()}
    return next((by_name[usual] for usual in USUAL[role] if usual in by_name), None), "**/*"


def _below(folder: Path, pattern: str) -> Iterator[Path]:
    for file in folder.glob(pattern):
        parts = file.relative_to(folder).parts
        if file.suffix.lower() in IMAGE_SUFFIXES and not any(map(is_junk_name, parts)):
            yield file


def _pairs(path: Path, images: Keyed, maps: Keyed) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Return the pairs, and the names of maps without an image. Raises `DataError` for an image without a map."""
    if not images.keys() <= maps.keys():
        images, maps = _without_ending(path, images), _without_ending(path, maps)
    if lacking := sorted(images.keys() - maps.keys()):
        names = ", ".join(str(images[key].relative_to(path)) for key in lacking[:LISTED])
        more = f" and {len(lacking) - LISTED} more" if len(lacking) > LISTED else ""
        raise DataError(
            f"{path}: no label map for {names}{more}",
            hint="give each image a map of the same name, as in images/0.jpg and labels/0.png, or remove the image",
        )
    return [(images[key], maps[key]) for key in sorted(images)], sorted(maps.keys() - images.keys())


def _without_ending(path: Path, files: Keyed) -> Keyed:
    """Return the files by their keys without the ending that all have, as `_leftImg8bit`. Raises `DataError` for doubles."""
    ending = _ending(list(files))
    found: Keyed = {}
    for key, file in files.items():
        short = key.removesuffix(ending)
        if short in found:
            raise DataError(
                f"{path}: {found[short].relative_to(path)} and {file.relative_to(path)} may both belong to one image",
                hint="name the files of one kind by a pattern, as in --set 'data.label_map=labels/*_labelIds.png'",
            )
        found[short] = file
    return found


def _ending(keys: Sequence[str]) -> str:
    """Return what all keys end in, from a mark on; of one alone, what stands from the last mark on."""
    if len(keys) == 1:
        at = max((keys[0].rfind(mark) for mark in MARKS), default=-1)
        return keys[0][at:] if at > 0 else ""
    first, last = min(backwards := [key[::-1] for key in keys]), max(backwards)
    alike = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    common = first[:alike][::-1]
    at = min((place for mark in MARKS if (place := common.find(mark)) >= 0), default=-1)
    return common[at:] if at >= 0 else ""
