"""From the columns of a source to the ones that a task reads: text, text_pair, image, label."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recap_cli.data.column_hints import check_columns
from recap_cli.errors import DataError
from recap_cli.tasks.task import Kind

if TYPE_CHECKING:
    import pyarrow as pa

Roles = dict[str, str]  # text, text_pair, image or label → the column that has it


@dataclass(frozen=True)
class Found:
    """A table as its source has it.

    Attributes:
        table: All columns and rows.
        origin: The name of the source, for messages.
        folder: The folder that relative paths of images start at, if there is one.
        classes: True for a folder of class folders: its columns are `image` and `label`, whatever the recipe names.
        notes: What a user should know of how it was read.
    """

    table: "pa.Table"
    origin: str
    folder: Path | None = None
    classes: bool = False
    notes: tuple[str, ...] = ()

    def column(self, role: str, roles: Roles) -> str:
        """The column of this table that has a role."""
        return role if self.classes else roles[role]

    def place(self, column: str) -> str:
        """The name of a column and its source, for messages."""
        return f"the folder {self.origin}" if self.classes else f"column {column!r} of {self.origin}"


def roles_for(kind: Kind, *, text: str | None, text_pair: str | None, image: str | None, label: str) -> Roles:
    """Return the columns that a task of this kind reads. One that the recipe does not name has the name of its role."""
    if kind == "image-classification":
        return {"image": image or "image", "label": label}
    pair = {} if text_pair is None else {"text_pair": text_pair}
    return {"text": text or "text", **pair, "label": label}


def pick(found: Found, roles: Roles) -> "dict[str, pa.ChunkedArray]":
    """Return the column of each role: texts as strings, images as `datasets` stores them.

    Raises:
        DataError: Columns are missing, doubled or of another type; the message names all of them. Or a value is missing; the
            message names its row.
    """
    columns = {role: found.column(role, roles) for role in roles}
    check_columns(found.table, columns, found.origin)
    return {role: _PICKERS[role](_complete(found, name), found) for role, name in columns.items()}


def class_names(found: Found, column: str) -> tuple[list[str] | None, list[str]]:
    """Return the names of the labels if the source has them (a `ClassLabel` of `datasets`), and notes."""
    stored = (found.table.schema.metadata or {}).get(b"huggingface")
    if stored is None:
        return None, []
    try:
        feature = json.loads(stored)["info"]["features"][column]
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


def _pick_text(column: "pa.ChunkedArray", _: Found) -> "pa.ChunkedArray":
    import pyarrow as pa

    return column.cast(pa.string())


def _pick_image(column: "pa.ChunkedArray", found: Found) -> "pa.ChunkedArray":
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


def _pick_label(column: "pa.ChunkedArray", _: Found) -> "pa.ChunkedArray":
    return column


_PICKERS: Mapping[str, Callable[["pa.ChunkedArray", Found], "pa.ChunkedArray"]] = {
    "text": _pick_text,
    "text_pair": _pick_text,
    "image": _pick_image,
    "label": _pick_label,
}
