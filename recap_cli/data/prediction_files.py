"""Predictions per example on disk: csv, jsonl or parquet by the suffix, written whole or not at all."""

import csv
import json
import math
import os
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from recap_cli.errors import StorageError, UsageError
from recap_cli.state import files

Columns = Mapping[str, Sequence[Any]]


def check(path: Path, *, force: bool) -> None:
    """Check, before anything is computed, that predictions can be written.

    Raises:
        UsageError: The suffix is unknown, the path is a folder, or the file exists and `force` is False.
        StorageError: The file cannot be written.
    """
    if path.suffix.lower() not in WRITERS:
        raise UsageError(
            f"--predictions {path}: expected one of the suffixes {', '.join(WRITERS)}",
            hint=f"--predictions {shlex.quote(str(path.with_suffix('.csv')))}",
        )
    if path.is_dir():
        raise UsageError(
            f"--predictions {path}: is a folder", hint=f"--predictions {shlex.quote(str(path / 'predictions.csv'))}"
        )
    if os.path.lexists(path) and not force:
        raise UsageError(f"--predictions {path}: exists already", hint="name another file, or overwrite it with --force")
    place = _behind(path)
    if place.exists() and not place.is_file():
        raise UsageError(f"--predictions {path}: is no ordinary file", hint="name another file")
    if not place.parent.is_dir():
        raise StorageError(f"{path} cannot be written: there is no folder {place.parent}", hint="make it first")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise StorageError(f"{path} cannot be written: permission denied", hint="name a file in a folder you may write to")


def write(path: Path, columns: Columns) -> None:
    """Write columns of the same length. None becomes an empty value. A link stays, and its target is written.

    Raises:
        StorageError: The file cannot be written.
    """
    data = WRITERS[path.suffix.lower()](columns)
    place = _behind(path)
    temporary = place.with_name(f".recap-{secrets.token_hex(8)}.tmp")
    try:
        with files.storage_errors(path, len(data)):
            with temporary.open("xb") as file:
                file.write(data)
            files.flush(temporary)
            os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def _behind(path: Path) -> Path:
    """Return the target of a link, or the path itself."""
    try:
        return path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError):  # a link to itself
        return path


def _csv(columns: Columns) -> bytes:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def _jsonl(columns: Columns) -> bytes:
    rows = (dict(zip(columns, map(_in_json, row), strict=True)) for row in zip(*columns.values(), strict=True))
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def _in_json(value: Any) -> Any:
    """Return the value, or None for NaN and infinity, which JSON lacks: a diverged model gives NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parquet(columns: Columns) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    known = {name: next((value for value in values if value is not None), "") for name, values in columns.items()}
    kinds = {name: {float: pa.float64(), int: pa.int64()}.get(type(value), pa.string()) for name, value in known.items()}
    kinds["loss"] = pa.float64()  # also of data without labels
    table = pa.table({name: pa.array(values, kinds[name]) for name, values in columns.items()})
    written = BytesIO()
    parquet.write_table(table, written)
    return written.getvalue()


WRITERS: dict[str, Callable[[Columns], bytes]] = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
