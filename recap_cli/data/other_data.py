"""Examples to score instead of those of the recipe: another file, folder or split of the hub, read in the same way."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recap_cli.core.task import Labels, Task
from recap_cli.data import sources
from recap_cli.data.class_folders import IMAGE_SUFFIXES, checked, is_junk_name
from recap_cli.data.columns import Found, Roles, pick, roles_for
from recap_cli.data.map_folders import SPLIT
from recap_cli.data.tables import READERS
from recap_cli.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

KEY = "data.other"  # a key for the hints of the readers, which `_with_options` replaces by --data


@dataclass(frozen=True)
class Other:
    """Examples with their targets, which mean nothing if they are not `labelled`."""

    examples: "Dataset"
    origin: str
    labelled: bool
    notes: tuple[str, ...] = ()

    @property
    def places(self) -> list[int]:
        """The index of each example in its source, from 0."""
        return places_of(self.examples)

    @property
    def files(self) -> list[str] | None:
        return files_of(self.examples)


def read_other(task: Task, place: Path | None, split: str | None, labels: Labels, data: Mapping[str, Any]) -> Other:
    """Read other data than those of the recipe.

    The examples are unlabelled if each column of labels is missing, is empty, or holds only −1.

    Args:
        task: The task.
        place: A file or a folder. None: the recipe's data set on the hub.
        split: A split of either.
        labels: The labels of the training data.
        data: The section `data` of the recipe.

    Raises:
        DataError: Data are missing, cannot be read, do not fit, or have a label that the model does not have.
    """
    roles = roles_for(task, data)
    try:
        found = _find(roles, place, split, data)
        return _labelled(found, roles, labels)
    except DataError as error:
        raise DataError(error.message, hint=_with_options(error.hint, roles)) from error


def places_of(examples: "Dataset") -> list[int]:
    """Return the index of each example in its source, from 0."""
    return [row - 1 for row in examples.select_columns("row")[:]["row"]]


def files_of(examples: "Dataset") -> list[str] | None:
    """Return the files of the images, or None if the examples are not image files."""
    import pyarrow.compute as pc

    if "image" not in examples.column_names:
        return None
    column = examples.select_columns("image").with_format("arrow")[:].column("image")
    files: list[str | None] = pc.struct_field(column.combine_chunks(), "path").to_pylist()
    return None if None in files else [str(file) for file in files]


def _find(roles: Roles, place: Path | None, split: str | None, data: Mapping[str, Any]) -> Found:
    if place is None:
        if data["name"] is None or split is None:
            raise DataError(
                "the recipe's data are no data set of the hub, so it has no splits", hint="name a file: --data FILE"
            )
        return sources._read_hub(data["name"], data["subset"], [split])[0]
    place = place.expanduser()
    if not place.exists():
        raise DataError(f"there is no file or folder {place}", hint="name one that exists: --data FILE")
    in_names = roles.task.target.maps and any(SPLIT in role.name for role in roles.all)
    if split is not None and not in_names:
        place = _split_of(place, split, folders=roles.task.inputs == "image")
    if place.is_dir() and roles.task.inputs == "image" and (flat := _flat(place)):
        return _unlabelled_images(place, flat)
    return sources._read_path(place, KEY, roles, split or data["validation_split"])


def _split_of(place: Path, split: str, *, folders: bool) -> Path:
    """Return the folder or file of a split. If there are both, the kind of task decides."""
    if not place.is_dir():
        raise DataError(f"{place} is a file, which has no splits", hint="leave out --split, or name a folder with --data")
    there = [child for child in sorted(place.iterdir()) if child.is_dir() or child.suffix.lower() in READERS]
    found = [child for child in there if child.name == split or (child.is_file() and child.stem == split)]
    if len(found) > 1:
        found = [child for child in found if child.is_dir() == folders]
    if len(found) == 1:
        return found[0]
    names = ", ".join(child.name for child in there) or "none"
    what = "no" if not found else "more than one"
    raise DataError(
        f"{place} has {what} split {split!r}", hint=f"its folders and files of data are: {names}; choose by --split"
    )


def _flat(folder: Path) -> list[Path]:
    """Return the images in a folder that has no folders: they have no labels."""
    children = [child for child in sorted(folder.iterdir()) if not is_junk_name(child.name)]
    if any(child.is_dir() for child in children):
        return []
    return [child for child in children if child.suffix.lower() in IMAGE_SUFFIXES]


def _unlabelled_images(folder: Path, images: Sequence[Path]) -> Found:
    import pyarrow as pa

    return Found(pa.table({"image": pa.array(map(checked, images), pa.string())}), str(folder), classes=True)


def _labelled(found: Found, roles: Roles, labels: Labels) -> Other:
    """Read the labels like those of validation data."""
    task = roles.task
    are_classes = task.target.stratified
    labelled = not all(_is_unlabelled(found.table, found.column(role), are_classes) for role in roles.labels)
    picked = pick(found, roles, labelled=labelled)
    targets = sources.targets_of(picked, task, labels) if labelled else _blank(picked.inputs, task, labels)
    examples = sources.as_dataset(picked.inputs, targets, task, labels)
    return Other(examples, found.origin, labelled, (*found.notes, *picked.notes))


def _blank(inputs: "Mapping[str, pa.ChunkedArray]", task: Task, labels: Labels) -> "pa.ChunkedArray | None":
    """Return targets that mean nothing: one for each example, or each word of it; of maps none."""
    import pyarrow as pa

    if task.target.maps:
        return None
    blank, first = task.target.blank(len(labels.names)), next(iter(inputs.values()))
    if task.inputs == "words":
        return pa.chunked_array([pa.array([[blank] * len(words) for words in first.to_pylist()], pa.list_(pa.int64()))])
    kind = pa.list_(pa.float64(), len(blank)) if isinstance(blank, list) else None
    return pa.chunked_array([pa.array([blank] * len(first), kind)])


def _is_unlabelled(table: "pa.Table", name: str, are_classes: bool) -> bool:
    """Whether a table has no column of labels, or every row of it is missing, an empty text, or (of classes) −1."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if (count := table.column_names.count(name)) != 1:
        return bool(count == 0)
    column = table.column(name)
    if column.null_count == len(column):
        return True
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return bool(pc.all(pc.equal(pc.utf8_trim_whitespace(column), "")).as_py())
    number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    return bool(are_classes and number and column.null_count == 0 and pc.all(pc.equal(column, -1)).as_py())


def _with_options(hint: str | None, roles: Roles) -> str | None:
    """Replace the recipe keys in a hint by --data and --split: keys of a state cannot be set any more."""
    if hint is None or "--set" not in hint:
        return hint
    if "--set task.kind=" in hint:
        return "name a file of texts with --data FILE"
    if f"--set {KEY}=" in hint:
        return hint.replace(f"--set {KEY}=", "--data ")
    if "--set data.train=" in hint:
        return "name one of its splits with --split"
    columns = ", ".join(f"{role.key} in {shlex.quote(role.name)}" for role in roles.all)
    return f"columns are read as in training ({columns}): rename those of the file"
