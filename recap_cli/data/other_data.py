"""Examples to score beside those of the recipe: another file, a folder, or a split of the hub's, read as its own are."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recap_cli.data import sources
from recap_cli.data.class_folders import IMAGE_SUFFIXES, checked, is_junk_name
from recap_cli.data.columns import Found, Roles, class_names, pick, roles_for
from recap_cli.data.labels import Labels, label_numbers
from recap_cli.data.tables import READERS
from recap_cli.errors import DataError
from recap_cli.tasks.task import Kind

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

KEY = "data.other"  # stands in the hints of the readers, where a recipe's key would; `_retold` puts --data in its place


@dataclass(frozen=True)
class Other:
    """Examples with their labels as numbers, all 0 where they are not `labelled`."""

    examples: "Dataset"
    origin: str
    labelled: bool
    notes: tuple[str, ...] = ()

    @property
    def places(self) -> list[int]:
        """Where each example stands in its source, from 0."""
        return places_of(self.examples)

    @property
    def files(self) -> list[str] | None:
        return files_of(self.examples)


def read_other(kind: Kind, place: Path | None, split: str | None, labels: Labels, data: Mapping[str, Any]) -> Other:
    """Read the file or folder `place`, or its `split`; without a place, the split of the recipe's data set on the hub.

    `labels` are those of the training data, `data` is the recipe's section. A column of labels that is not there, is empty, or
    holds nothing but −1, makes the examples unlabelled.

    Raises `DataError` for what is missing, cannot be read, does not fit, or has a label that the model does not know.
    """
    roles = roles_for(kind, **{role: data[role] for role in ("text", "text_pair", "image", "label")})
    try:
        found = _find(roles, place, split, data)
        return _labelled(found, roles, labels)
    except DataError as error:
        raise DataError(error.message, hint=_retold(error.hint, roles)) from error


def places_of(examples: "Dataset") -> list[int]:
    """Where each example stands in its source, from 0."""
    return [row - 1 for row in examples.select_columns("row")[:]["row"]]


def files_of(examples: "Dataset") -> list[str] | None:
    """The files of images that are files; None for anything else."""
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
        raise DataError(f"there is no file or folder {place}", hint="name one that is there: --data FILE")
    if split is not None:
        place = _split_of(place, split, folders="image" in roles)
    if place.is_dir() and "image" in roles and (flat := _flat(place)):
        return _unlabelled_images(place, flat)
    return sources._read_path(place, KEY, roles)


def _split_of(place: Path, split: str, *, folders: bool) -> Path:
    """The folder or the file of that name in a folder; where there are both, what the task reads."""
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
    """The images that stand in a folder itself, where it has no folders: images without labels."""
    children = [child for child in sorted(folder.iterdir()) if not is_junk_name(child.name)]
    if any(child.is_dir() for child in children):
        return []
    return [child for child in children if child.suffix.lower() in IMAGE_SUFFIXES]


def _unlabelled_images(folder: Path, images: Sequence[Path]) -> Found:
    import pyarrow as pa

    return Found(pa.table({"image": pa.array(map(checked, images), pa.string())}), str(folder), classes=True)


def _labelled(found: Found, roles: Roles, labels: Labels) -> Other:
    """The labels as those of validation data are read."""
    import pyarrow as pa

    name = found.column("label", roles)
    inputs = {role: column for role, column in roles.items() if role != "label"}
    labelled = not _is_unlabelled(found.table, name)
    columns = pick(found, roles if labelled else inputs)
    told: list[str] = []
    if labelled:
        own, told = class_names(found, name)
        columns["label"] = label_numbers(columns["label"], labels, own, found.place(name))
    else:
        columns["label"] = pa.chunked_array([pa.array([0] * found.table.num_rows, pa.int64())])
    return Other(sources._dataset(columns, labels.names), found.origin, labelled, (*found.notes, *told))


def _is_unlabelled(table: "pa.Table", name: str) -> bool:
    """Whether a table lacks the column of the labels, or has nothing in it: no value, an empty text, or −1, in every row."""
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
    return bool(number and column.null_count == 0 and pc.all(pc.equal(column, -1)).as_py())


def _retold(hint: str | None, roles: Roles) -> str | None:
    """A hint of a reader for someone who has given --data, and cannot set the recipe's columns any more."""
    if hint is None or "--set" not in hint:
        return hint
    if "--set task.kind=" in hint:
        return "name a file of texts with --data FILE"
    if f"--set {KEY}=" in hint:
        return hint.replace(f"--set {KEY}=", "--data ")
    if "--set data.train=" in hint:
        return "name one of its splits with --split"
    columns = ", ".join(f"{role} in {shlex.quote(column)}" for role, column in roles.items())
    return f"columns are read as in training ({columns}): rename those of the file"
