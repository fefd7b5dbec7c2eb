"""Whether a column of a table may hold texts, words or images: by its type, and by what its first values look like."""

from typing import TYPE_CHECKING

from recap_cli.data.class_folders import IMAGE_SUFFIXES

if TYPE_CHECKING:
    import pyarrow as pa

SEEN = 2000  # rows that are read to distinguish labels from texts


def is_text(kind: "pa.DataType") -> bool:
    """Whether values are texts."""
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind))


def may_be_words(kind: "pa.DataType") -> bool:
    """Whether values are lists of texts, or texts that are split at their blanks."""
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind)
    return bool(is_text(kind) or (is_list and is_text(kind.value_type)))


def may_be_images(kind: "pa.DataType") -> bool:
    """Whether values are paths, encoded images, or structs of both as `datasets` stores them."""
    return is_text(kind) or _is_encoded(kind) or _is_stored(kind)


def is_prose(column: "pa.ChunkedArray") -> bool:
    """Whether the values of a column differ, as texts do."""
    from pyarrow import types

    first = column.slice(0, SEEN)
    if types.is_list(column.type) or types.is_large_list(column.type):
        return True
    return len(first.unique()) > max(2, len(first) / 2)


def are_images(column: "pa.ChunkedArray") -> bool:
    """Whether a column holds images: texts are paths that end in .png and the like."""
    return not is_text(column.type) or all(
        value is not None and value.lower().endswith(tuple(IMAGE_SUFFIXES)) for value in column.slice(0, SEEN).to_pylist()
    )


def _is_encoded(kind: "pa.DataType") -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_stored(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if not types.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind if field.name in ("bytes", "path")}
    fits = {"bytes": _is_encoded, "path": is_text}
    return bool(fields) and all(types.is_null(field) or fits[name](field) for name, field in fields.items())
