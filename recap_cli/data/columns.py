"""From the columns of a source to the ones that a task reads: text, text_pair, words or image, and labels."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from recap_cli.core.task import LabelColumn, Task
from recap_cli.data import column_types
from recap_cli.data.column_hints import Role, check_columns
from recap_cli.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

TEXT = ("text", column_types.is_text, column_types.is_prose)
WORDS = ("lists of words, or texts", column_types.may_be_words, column_types.is_prose)
IMAGE = ("images or paths of images", column_types.may_be_images, column_types.are_images)


@dataclass(frozen=True)
class Roles:
    """The columns that a task reads.

    Attributes:
        task: The task.
        inputs: Those of its inputs.
        labels: Those of its labels: one, or several of 0 and 1.
    """

    task: Task
    inputs: tuple[Role, ...]
    labels: tuple[Role, ...]

    @property
    def all(self) -> tuple[Role, ...]:
        return (*self.inputs, *self.labels)

    @property
    def texts(self) -> list[str]:
        """The names of the columns of texts, which a csv file may not read as numbers."""
        return [role.name for role in self.inputs if role.key != "image"]


@dataclass(frozen=True)
class Found:
    """A table as its source has it.

    Attributes:
        table: All columns and rows.
        origin: The name of the source, for messages.
        folder: The folder that relative paths of images start at, if there is one.
        classes: True for a folder of class folders, or of images and label maps: its columns are called as their roles,
            whatever the recipe names.
        notes: What a user should know of how it was read.
    """

    table: "pa.Table"
    origin: str
    folder: Path | None = None
    classes: bool = False
    notes: tuple[str, ...] = ()

    def column(self, role: Role) -> str:
        """The column of this table that has a role."""
        return role.key if self.classes else role.name

    def place(self, column: str) -> str:
        """The name of a column and its source, for messages."""
        return f"the folder {self.origin}" if self.classes else f"column {column!r} of {self.origin}"


def roles_for(task: Task, data: Mapping[str, Any]) -> Roles:
    """Return the columns that a task reads, by the keys of a recipe's section `data`: `text`, `text_pair`, `image`, and `label`
    or `label_map`.

    A column that the recipe does not name has the name of its role; a column of maps that of `label`.
    """
    target = task.target
    key, label = ("label_map", data["label_map"] or data["label"]) if target.maps else ("label", data["label"])
    labels = tuple(
        Role(key, name, target.holds, target.can_be, target.is_likely)
        for name in ([label] if isinstance(label, str) else label)
    )
    if task.inputs == "image":
        return Roles(task, (Role("image", data["image"] or "image", *IMAGE),), labels)
    first = Role("text", data["text"] or "text", *(WORDS if task.inputs == "words" else TEXT))
    pair = () if data["text_pair"] is None else (Role("text_pair", data["text_pair"], *TEXT),)
    return Roles(task, (first, *pair), labels)


class Picked(NamedTuple):
    """The columns of a task.

    Attributes:
        inputs: By key: texts as strings, words as lists of strings, images as `datasets` stores them.
        labels: As they stand; none of data that are picked without labels.
        notes: What a user should know of them.
    """

    inputs: "dict[str, pa.ChunkedArray]"
    labels: tuple[LabelColumn, ...]
    notes: tuple[str, ...]


def pick(found: Found, roles: Roles, *, labelled: bool = True) -> Picked:
    """Return the columns of a task.

    Raises:
        DataError: Columns are missing, doubled or of another type; the message names all of them. Or a value is missing; the
            message names its row.
    """
    wanted = roles.all if labelled else roles.inputs
    check_columns(found.table, [role.named(found.column(role)) for role in wanted], found.origin)
    form = FORMS[roles.task.inputs]
    inputs = {role.key: form(_complete(found, found.column(role)), found) for role in roles.inputs}
    labels, notes = [], []
    for role in roles.labels if labelled else ():
        name = found.column(role)
        names, more = class_names(found, name)
        values = _complete(found, name)
        values = _image(values, found) if roles.task.target.maps else values
        labels.append(LabelColumn(values, name, found.place(name), names, words=not found.classes))
        notes += more
    return Picked(inputs, tuple(labels), tuple(notes))


def class_names(found: Found, column: str) -> tuple[list[str] | None, list[str]]:
    """Return the names of the labels if the source has them (a `ClassLabel` of `datasets`, or a list of such), and notes."""
    stored = (found.table.schema.metadata or {}).get(b"huggingface")
    if stored is None:
        return None, []
    try:
        feature = json.loads(stored)["info"]["features"][column]
        if feature["_type"] in ("Sequence", "List"):
            feature = feature["feature"]
        if feature["_type"] != "ClassLabel":
            return None, []
        names = feature["names"]
    except (ValueError, KeyError, TypeError, RecursionError):  # metadata of another program, or damaged
        return None, [f"{found.origin} has metadata of `datasets` that do not describe its column {column!r}"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        return None, [f"{found.origin} has metadata of `datasets` whose names of labels are no list of different texts"]
    return names, []


def _complete(found: Found, name: str) -> "pa.ChunkedArray":
    import pyarrow.compute as pc

    column = found.table.column(name)
    row = pc.index(column.is_null(), True).as_py()
    if row >= 0:
        raise DataError(
            f"column {name!r} of {found.origin} has no value in row {row + 1} ({column.null_count} such rows)",
            hint="fill in these rows, or remove them",
        )
    return column


def _text(column: "pa.ChunkedArray", _: Found) -> "pa.ChunkedArray":
    import pyarrow as pa

    return column.cast(pa.string())


def _words(column: "pa.ChunkedArray", found: Found) -> "pa.ChunkedArray":
    """Return lists of strings; a text is split at its blanks."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column_types.is_text(column.type):
        return pc.utf8_split_whitespace(pc.utf8_trim_whitespace(column.cast(pa.string())))
    words = column.cast(pa.list_(pa.string()))
    for row, each in enumerate(words, 1):
        if any(not (word or "").strip() for word in each.as_py()):
            raise DataError(f"row {row} of {found.origin} has a word that is empty", hint="remove the word and its label")
    return words


def _image(column: "pa.ChunkedArray", found: Found) -> "pa.ChunkedArray":
    """Return images as (bytes, path) structs. Relative paths start at the folder of the file that has them."""
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc

    storage = datasets.Image()
    stored = pa.chunked_array([storage.cast_storage(chunk) for chunk in column.chunks], storage.pa_type)
    if found.folder is None:
        return stored
    encoded, paths = pc.struct_field(stored, "bytes"), pc.struct_field(stored, "path")
    alone = pc.and_(encoded.is_null(), paths.is_valid())  # a path beside bytes is only the name of their file
    if not pc.any(alone).as_py():
        return stored
    rows = zip(alone.to_pylist(), paths.to_pylist(), strict=True)
    files = [_existing(path, row, found, found.folder) if is_alone else path for row, (is_alone, path) in enumerate(rows, 1)]
    whole = pa.StructArray.from_arrays([encoded.combine_chunks(), pa.array(files, pa.string())], ["bytes", "path"])
    return pa.chunked_array([whole], storage.pa_type)


def _existing(path: str, row: int, found: Found, folder: Path) -> str:
    file = folder / path
    if "\0" in path or not file.is_file():
        raise DataError(
            f"the image {file} in row {row} of {found.origin} does not exist",
            hint=f"give paths relative to the folder of the file ({folder}), or absolute ones",
        )
    return str(file)


FORMS: Mapping[str, Callable[["pa.ChunkedArray", Found], "pa.ChunkedArray"]] = {"text": _text, "words": _words, "image": _image}
