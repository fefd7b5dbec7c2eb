"""From the columns that a source happens to have to the ones that we read: text, text_pair, image, label."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from recap_cli.errors import DataError
from recap_cli.runtime.tasks import Kind

if TYPE_CHECKING:
    import pyarrow as pa

Roles = dict[str, str]  # text, text_pair, image or label → the column that has it


@dataclass(frozen=True)
class Found:
    """A table as its source has it. `origin` names the source; image paths start at `folder`, if there is one."""

    table: "pa.Table"
    origin: str
    folder: Path | None = None


def roles_for(kind: Kind, *, text: str | None, text_pair: str | None, image: str | None, label: str) -> Roles:
    """The columns that a task of this kind reads; one that the recipe does not name is called what it is."""
    if kind == "image-classification":
        return {"image": image or "image", "label": label}
    pair = {} if text_pair is None else {"text_pair": text_pair}
    return {"text": text or "text", **pair, "label": label}


def pick(found: Found, roles: Roles) -> "dict[str, pa.ChunkedArray]":
    """The column of each role, complete and of a type that fits: texts as strings, images as `datasets` stores them.

    Raises `DataError` for a column that is missing, twice there, of another type, or with a missing value; with its row.
    """
    return {role: _PICKERS[role](_column(found, role, name), found, name) for role, name in roles.items()}


def class_names(found: Found, column: str) -> list[str] | None:
    """The names of the labels if the source comes with them (a `ClassLabel` of `datasets`)."""
    import datasets
    import pyarrow as pa

    schema = found.table.schema
    alone = pa.schema([schema.field(column)], metadata=schema.metadata)
    feature = datasets.Features.from_arrow_schema(alone)[column]
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _column(found: Found, role: str, name: str) -> "pa.ChunkedArray":
    import pyarrow.compute as pc

    there = found.table.column_names.count(name)
    if there != 1:
        raise DataError(
            f"{found.origin} has {'no' if there == 0 else 'more than one'} column {name!r}; its columns are: "
            f"{', '.join(found.table.column_names)}",
            hint=_column_hint(found.table, role, name),
        )
    column = found.table.column(name)
    row = pc.index(column.is_null(), True).as_py()
    if row >= 0:
        raise DataError(
            f"column {name!r} of {found.origin} has no value in row {row + 1} ({column.null_count} such rows)",
            hint="fill these rows in, or take them out",
        )
    return column


def _column_hint(table: "pa.Table", role: str, name: str) -> str:
    names = table.column_names
    if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in names[0]), None)):
        return f"the file is separated by {mark!r}; save it with commas, or as .tsv with tabs"
    return f"name the column with --set data.{role}={shlex.quote(_likely(table, role, name))}"


def _likely(table: "pa.Table", role: str, name: str) -> str:
    """The column that was probably meant: the nearest name, or else the first of a type that fits the role."""
    from pyarrow import types

    fits: dict[str, Callable[[pa.DataType], bool]] = {
        "image": lambda kind: types.is_struct(kind) or types.is_binary(kind),
        "label": types.is_integer,
        "text": types.is_string,
        "text_pair": types.is_string,
    }
    near: list[str] = get_close_matches(name, table.column_names, n=1)
    fitting: list[str] = [field.name for field in table.schema if fits[role](field.type)]
    return [*near, *fitting, "COLUMN"][0]


def _pick_text(column: "pa.ChunkedArray", found: Found, name: str) -> "pa.ChunkedArray":
    import pyarrow as pa

    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise _wrong_type(found, name, column, "text")
    return column.cast(pa.string())


def _pick_image(column: "pa.ChunkedArray", found: Found, name: str) -> "pa.ChunkedArray":
    """As (bytes, path) pairs; paths count from the folder of the file that has them."""
    import datasets
    import pyarrow as pa

    kind = column.type
    encoded = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    stored = pa.types.is_struct(kind) and {"bytes", "path"} & {field.name for field in kind}
    path = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (encoded or stored or path):
        raise _wrong_type(found, name, column, "images or paths of images")
    if path and found.folder is not None:
        column = pa.chunked_array([_existing(column, found, found.folder)])
    storage = datasets.Image()
    return pa.chunked_array([storage.cast_storage(chunk) for chunk in column.chunks], storage.pa_type)


def _existing(column: "pa.ChunkedArray", found: Found, folder: Path) -> "pa.Array":
    import pyarrow as pa

    files = [folder / path for path in column.to_pylist()]
    for row, file in enumerate(files, 1):
        if not file.is_file():
            raise DataError(
                f"the image {file} in row {row} of {found.origin} does not exist",
                hint=f"give paths from the folder of the file on ({folder}), or absolute ones",
            )
    return pa.array(map(str, files), pa.string())


def _pick_label(column: "pa.ChunkedArray", found: Found, name: str) -> "pa.ChunkedArray":
    return column


def _wrong_type(found: Found, name: str, column: "pa.ChunkedArray", wanted: str) -> DataError:
    return DataError(
        f"column {name!r} of {found.origin} holds values of type {column.type}, not {wanted}; its columns are: "
        f"{', '.join(found.table.column_names)}",
        hint="name another column with --set data.text=NAME or --set data.image=NAME, or choose another task.kind",
    )


_PICKERS: Mapping[str, Callable[["pa.ChunkedArray", Found, str], "pa.ChunkedArray"]] = {
    "text": _pick_text,
    "text_pair": _pick_text,
    "image": _pick_image,
    "label": _pick_label,
}
