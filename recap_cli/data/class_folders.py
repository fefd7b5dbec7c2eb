"""A folder with one folder of images per class, as an Arrow table: the path of each image and the name of its class folder."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from recap_cli.errors import DataError
from recap_cli.recipe.yaml import setting

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
# Folders and files that operating systems make, as they make names that begin with a dot.
JUNK_FOLDERS = frozenset({"__macosx", "@eadir", "$recycle.bin", "lost+found", "system volume information"})
JUNK_FILES = frozenset({"thumbs.db", "desktop.ini", "icon\r"})
SPLITS = ("validation", "valid", "val", "dev", "test")  # names of a validation split, the best first
LARGEST_NAMES = 3  # kinds of ignored files that a note names


def read_folder(path: Path, *, key: str) -> "tuple[pa.Table, list[str]]":
    """Read the images below a folder.

    Args:
        path: The folder with the class folders.
        key: The recipe key that names the folder, for hints.

    Returns:
        A table with the columns `image` and `label`, a row per image; and notes on ignored files.

    Raises:
        DataError: There are no folders with images, they are splits instead of classes, or one cannot be read.
    """
    import pyarrow as pa

    hidden: list[Path] = []
    others: Counter[str] = Counter()
    empty: list[str] = []
    found: list[tuple[str, str]] = []
    try:
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not is_junk_name(folder.name))
        for folder in folders:
            files = sorted(files_below(folder))
            hidden += [file for file in files if _is_image(file) and _is_hidden(file, folder)]
            images = [file for file in files if _is_image(file) and not _is_hidden(file, folder)]
            others.update(file.suffix.lower() for file in files if not _is_image(file) and not _is_junk(file, folder))
            found += [(checked(file), folder.name) for file in images]
            if not images:
                empty.append(folder.name)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}", hint=f"name another folder with --set {key}=FOLDER") from error
    if not found:
        raise DataError(
            f"{_printable(path)} has no folders with images in them",
            hint="put the images of each class into a folder named for the class, and name the folder above these: "
            f"--set {key}=FOLDER",
        )
    _check_classes(path, {name for _, name in found})
    images_of, labels = zip(*found, strict=True)
    table = pa.table({"image": pa.array(images_of), "label": pa.array(labels)})
    return table, list(_notes(path, hidden, others, empty))


def holds_images(folder: Path) -> bool:
    """Whether any file below the folder has the suffix of an image."""
    return any(_is_image(file) for file in folder.rglob("*"))


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, without following links to folders. An unreadable folder raises `OSError`."""

    def fail(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=fail):
        yield from (Path(parent, name) for name in names)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def is_junk_name(name: str) -> bool:
    """Whether operating systems make folders of this name, or hide them."""
    return name.startswith(".") or name.lower() in JUNK_FOLDERS


def _is_hidden(file: Path, folder: Path) -> bool:
    """Whether a system made the file, or a folder between it and its class: `._0.png` of macOS holds no image."""
    *between, name = file.relative_to(folder).parts
    return name.startswith(".") or any(map(is_junk_name, between))


def _is_junk(file: Path, folder: Path) -> bool:
    return file.name.lower() in JUNK_FILES or _is_hidden(file, folder)


def checked(file: Path) -> str:
    """Return the path as text.

    Raises:
        DataError: The path is not UTF-8, which tables need, or is not a file.
    """
    name = str(file)
    if name != _printable(file):
        raise DataError(
            f"the name of {_printable(file)} is not in UTF-8",
            hint="rename it, or all of them: convmv -f latin1 -t utf8 -r --notest FOLDER",
        )
    if not file.is_file():
        what = "is a link to a file that does not exist" if file.is_symlink() else "is no file that holds an image"
        raise DataError(f"{file} {what}", hint="remove it, or put the image there")
    return name


def _printable(path: Path | str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _check_classes(path: Path, names: set[str]) -> None:
    lowered = {name.lower(): name for name in names}
    if "train" not in lowered or not lowered.keys() <= {"train", *SPLITS}:
        return
    other = next((lowered[split] for split in SPLITS if split in lowered), None)
    held_out = "--set data.validation_share=0.1" if other is None else setting("data.validation", str(path / other))
    raise DataError(
        f"{path} holds splits ({', '.join(sorted(names))}), not classes",
        hint=f"{setting('data.train', str(path / lowered['train']))} {held_out}",
    )


def _notes(path: Path, hidden: list[Path], others: Counter[str], empty: list[str]) -> Iterator[str]:
    if hidden:
        first = _printable(hidden[0].relative_to(path))
        yield f"{path}: {len(hidden)} hidden images, such as {first}, are ignored"
    if others:
        kinds = ", ".join(suffix or "no suffix" for suffix, _ in others.most_common(LARGEST_NAMES))
        yield f"{path}: {others.total()} files of other kinds ({kinds}) are ignored"
    if empty:
        some = ", ".join(map(_printable, empty[:LARGEST_NAMES])) + (", …" if len(empty) > LARGEST_NAMES else "")
        yield f"{path}: no images, and so no class, in {some}"
