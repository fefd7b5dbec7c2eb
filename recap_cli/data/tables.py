"""Local files as Arrow tables: csv, tsv, json, jsonl and parquet.

`datasets` reads them too, but writes a copy into the user's cache, and reads csv by pandas. pandas takes the texts "NA", "null"
and "None" for missing values. This module writes nothing, and only an empty cell without quotes is missing.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recap_cli.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

LARGEST_BLOCK = 2**31 - 1  # bytes of a csv that Arrow reads at once
SMALLEST_BLOCK = 2**20


def read_file(path: Path, *, key: str, text_columns: list[str]) -> "pa.Table":
    """Read all columns and rows of one file. The suffix decides its kind.

    Args:
        path: The file.
        key: The recipe key that names the file, for hints.
        text_columns: Columns of a csv that are text, whatever they hold.

    Raises:
        DataError: The file is missing, empty, unreadable, of an unknown kind, or of another kind than its suffix.
    """
    import pyarrow as pa

    reader = READERS.get(path.suffix.lower())
    if not path.exists():
        raise DataError(f"{path} does not exist", hint=f"name a file that does with --set {key}=FILE")
    if reader is None:
        raise DataError(
            f"{path} is of an unknown kind; known are {', '.join(sorted(READERS))}, and a folder with one folder of images "
            "per class",
            hint=f"convert it, and name the new file with --set {key}=FILE",
        )
    if not path.is_file():
        raise DataError(
            f"{path} is no regular file, but a pipe, a device or a socket",
            hint=f"write its output into a file, and name that with --set {key}=FILE",
        )
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty", hint=f"name another file with --set {key}=FILE")
        if reader is not _read_parquet and _is_blank(path):
            raise DataError(
                f"{path} begins with zero bytes and no text: it was not written whole",
                hint=f"copy it again, or name another file with --set {key}=FILE",
            )
        table = reader(path, text_columns)
        table.column_names  # noqa: B018 (decodes the names, which may fail)
    except RecursionError as error:
        raise _unreadable(path, key, ValueError("its values are nested too deeply")) from error
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:  # unreadable, truncated, or of another kind
        raise _unreadable(path, key, error) from error
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows", hint=f"name another file with --set {key}=FILE")
    return table


def _is_blank(path: Path) -> bool:
    """Whether a file begins with zero bytes only, as a copy that was stopped does; it may have no end of a line."""
    with path.open("rb") as file:
        return not file.read(2**12).strip(b"\0")


def _unreadable(path: Path, key: str, error: Exception) -> DataError:
    kind = path.suffix[1:].lower()
    if kind != "parquet" and not _is_utf8(path):
        return DataError(
            f"{path} cannot be read as {kind}: its text is not in UTF-8", hint="save it as UTF-8 (in a spreadsheet: CSV UTF-8)"
        )
    return DataError(
        f"{path} cannot be read as {kind}: {error}", hint=f"repair the file, or name another with --set {key}=FILE"
    )


def _is_utf8(path: Path) -> bool:
    """Whether all of a text file is UTF-8. True also for a file that cannot be opened: that is another error."""
    try:
        with path.open(encoding="utf-8") as lines:
            for _ in lines:
                pass
    except UnicodeDecodeError:
        return False
    except OSError:
        return True
    return True


def _read_delimited(path: Path, text_columns: list[str], *, delimiter: str, quote: str | bool) -> "pa.Table":
    import pyarrow as pa
    from pyarrow import csv

    parse = csv.ParseOptions(delimiter=delimiter, quote_char=quote, newlines_in_values=quote is not False)
    convert = csv.ConvertOptions(
        column_types=dict.fromkeys(text_columns, "string"),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )

    def read(block: int) -> "pa.Table":
        return csv.read_csv(path, csv.ReadOptions(block_size=block), parse, convert)

    try:
        return read(SMALLEST_BLOCK)
    except pa.ArrowInvalid:  # perhaps a row is longer than a block
        size = path.stat().st_size
        if size <= SMALLEST_BLOCK:
            raise
    return read(min(size + 1, LARGEST_BLOCK))


def _read_csv(path: Path, text_columns: list[str]) -> "pa.Table":
    return _read_delimited(path, text_columns, delimiter=",", quote='"')


def _read_tsv(path: Path, text_columns: list[str]) -> "pa.Table":
    # Tab-separated values have no quoting (IANA text/tab-separated-values), and GLUE's have unbalanced quotes in their texts.
    return _read_delimited(path, text_columns, delimiter="\t", quote=False)


def _read_jsonl(path: Path, _: list[str]) -> "pa.Table":
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:  # add the line to the message
                    raise ValueError(f"line {number}: {error}") from error
    return _from_rows(rows)


def _read_json(path: Path, text_columns: list[str]) -> "pa.Table":
    """Read a list of objects. Some .json files hold one object per line instead."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("{"):
        return _read_jsonl(path, text_columns)
    return _from_rows(json.loads(text))


def _from_rows(rows: Any) -> "pa.Table":
    import pyarrow as pa

    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected objects with the columns as keys")
    names = dict.fromkeys(name for row in rows for name in row)  # in order of appearance
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def _read_parquet(path: Path, _: list[str]) -> "pa.Table":
    import pyarrow as pa
    from pyarrow import parquet

    table = parquet.read_table(path)
    for i, field in enumerate(table.schema):
        try:
            table.column(i).validate(full=True)  # a reader of parquet takes any bytes for a text
        except pa.ArrowInvalid as error:
            raise ValueError(f"the column {field.name!r} is damaged: {error}") from error
        if pa.types.is_dictionary(field.type):  # a categorical column of pandas
            table = table.set_column(i, field.name, table.column(i).cast(field.type.value_type))
    return table


READERS: dict[str, Callable[[Path, list[str]], "pa.Table"]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}
