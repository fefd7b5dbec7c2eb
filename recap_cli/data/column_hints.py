"""Whether a table has the columns that a recipe names, and if not, which of its columns may have been meant."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING

from recap_cli.data.class_folders import IMAGE_SUFFIXES
from recap_cli.errors import DataError
from recap_cli.recipe.yaml import setting

if TYPE_CHECKING:
    import pyarrow as pa

SEEN = 2000  # rows that are read to distinguish labels from texts
WANTED = {"text": "text", "text_pair": "text", "image": "images or paths of images", "label": "labels"}


def check_columns(table: "pa.Table", roles: Mapping[str, str], origin: str) -> None:
    """Check that each role has exactly one column, of a type that fits.

    Raises:
        DataError: A role has no such column. The message names all of them; the hint has a `--set` for each, with the column
            that fits or those to choose from.
    """
    wrong = dict(_wrong(table, roles))
    if not wrong:
        return
    raise DataError(
        f"{origin} {_listed(list(wrong.values()))}; its columns are: {', '.join(table.column_names)}",
        hint=_hint(table, roles, list(wrong)),
    )


def _wrong(table: "pa.Table", roles: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each role without a column that fits, and what is wrong with it."""
    for role, name in roles.items():
        there = table.column_names.count(name)
        if there != 1:
            yield role, f"has {'no' if there == 0 else 'more than one'} column {name!r}"
        elif not _can_be(role, table.column(name)):
            yield role, f"has values of type {table.column(name).type} in column {name!r}, not {WANTED[role]}"


def _listed(parts: list[str]) -> str:
    """Return `has no column 'a'`, or for several, `has no column 'a', no column 'b' and …`."""
    rest = [part.removeprefix("has ") for part in parts[1:]]
    return " and ".join(part for part in (", ".join([parts[0], *rest[:-1]]), *rest[-1:]) if part)


def _hint(table: "pa.Table", roles: Mapping[str, str], wrong: list[str]) -> str:
    names = table.column_names
    if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in names[0]), None)):
        return f"the file is separated by {mark!r}; save it with commas, or as .tsv with tabs"
    fits = _fitting(table, {role: name for role, name in roles.items() if role in wrong}, set(roles.values()))
    sets = " ".join(setting(f"data.{role}", fits[role][0] if len(fits[role]) == 1 else "COLUMN") for role in wrong)
    open_roles = [role for role in wrong if len(fits[role]) != 1]
    choices = [
        f"data.{role} is one of {', '.join(fits[role])}" if fits[role] else f"no column of it holds {WANTED[role]}"
        for role in open_roles
    ]
    hint = f"name the column{'s' if len(wrong) > 1 else ''} with {sets}{', where ' if choices else ''}{', and '.join(choices)}"
    return hint if all(fits[role] for role in wrong) else f"{hint}; or choose another task.kind"


def _fitting(table: "pa.Table", wrong: Mapping[str, str], taken: set[str]) -> dict[str, list[str]]:
    """Return the columns that may be meant by each role: one alone if its name or its type decides."""
    free = [name for name in table.column_names if name not in taken and table.column_names.count(name) == 1]
    left: dict[str, list[str]] = {}
    for role, name in wrong.items():
        can = [column for column in free if _can_be(role, table.column(column))]
        near = get_close_matches(name, can, n=1, cutoff=0.8)
        likely = [column for column in can if _is_likely(role, table.column(column))]
        left[role] = near or likely or can
    for _ in wrong:  # a column that only one role can have is no choice for the others
        for role, columns in left.items():
            others = {found[0] for other, found in left.items() if other != role and len(found) == 1}
            left[role] = [column for column in columns if column not in others] or columns
    return left


def _can_be(role: str, column: "pa.ChunkedArray") -> bool:
    """Whether the type of a column allows the role."""
    from pyarrow import types

    kind = column.type
    if role == "label":
        number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
        return bool(_is_text(kind) or number or types.is_boolean(kind))
    if role == "image":
        return _is_text(kind) or _is_encoded(kind) or _is_stored(kind)
    return _is_text(kind)


def _is_text(kind: "pa.DataType") -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind))


def _is_encoded(kind: "pa.DataType") -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_stored(kind: "pa.DataType") -> bool:
    """Whether values are structs as `datasets` stores images: bytes, a path, or both."""
    from pyarrow import types

    if not types.is_struct(kind):
        return False
    fields = {field.name: field.type for field in kind if field.name in ("bytes", "path")}
    fits = {"bytes": _is_encoded, "path": _is_text}
    return bool(fields) and all(types.is_null(field) or fits[name](field) for name, field in fields.items())


def _is_likely(role: str, column: "pa.ChunkedArray") -> bool:
    """Whether the values of a column look like the role: labels repeat, texts do not, paths of images end in .png."""
    from pyarrow import types

    first = column.slice(0, SEEN)
    if role == "image":
        return not _is_text(column.type) or all(
            value is not None and value.lower().endswith(tuple(IMAGE_SUFFIXES)) for value in first.to_pylist()
        )
    repeats = len(first.unique()) <= max(2, len(first) / 2)
    if role == "label":
        whole = not types.is_floating(column.type) or all(
            value is not None and value == value // 1 for value in first.to_pylist()
        )
        return bool(repeats and whole)
    return bool(not repeats)
