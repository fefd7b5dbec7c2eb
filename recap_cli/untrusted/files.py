"""Files of strangers: opened only if they are ordinary files, and JSON only as large and as deep as such files are.

A named pipe would be waited for, a device read without end, and a deeply nested list would exhaust the stack.
"""

import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recap_cli.errors import ModelError

MOST_BYTES = 64 << 20  # of a JSON file; the largest index of a published checkpoint is below 10 MB
MOST_DEPTH = 50
AGAIN = "copy or download it again"
# Whatever the libraries raise over a configuration or weights that they did not write; a lack of memory is none of these.
LIBRARY_ERRORS = (
    *(ValueError, TypeError, AttributeError, LookupError, OSError, RuntimeError, ArithmeticError, AssertionError, ImportError),
)


def read_json(path: Path, hint: str = AGAIN) -> Any:
    """What a JSON file holds. Raises `ModelError` naming the file if it is missing, no ordinary file, too large or too deep."""
    try:
        found = json.loads(_read(path, hint))
    except RecursionError:
        raise ModelError(f"{path} is nested too deeply", hint=hint) from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise ModelError(f"{path} cannot be read: {error}", hint=hint) from error
    if _is_deep(found):
        raise ModelError(f"{path} is nested more than {MOST_DEPTH} deep", hint=hint)
    return found


def read_object(path: Path, hint: str = AGAIN) -> dict[str, Any]:
    """What a JSON file holds, which is an object. Raises `ModelError` as `read_json` does, and if it is something else."""
    found = read_json(path, hint)
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object, but a {type(found).__name__}", hint=hint)
    return found


def check_ordinary(path: Path, hint: str = AGAIN) -> None:
    """Raise `ModelError` if there is something at `path` that is no ordinary file, nor a link to one; nothing is opened."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # a loop of links, a name with a NUL
        raise ModelError(f"{path} cannot be read: {error}", hint=hint) from error
    if not stat.S_ISREG(mode):
        raise ModelError(f"{path} is no ordinary file", hint=hint)


def check_folder(folder: Path, patterns: Iterable[str]) -> None:
    """Raise `ModelError` if anything in the folder that is named like one of `patterns` is no ordinary file."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            check_ordinary(path)


@contextmanager
def named(place: str | Path | None) -> Iterator[None]:
    """Have each `ModelError` from inside name the place, if there is one, that the model comes from."""
    try:
        yield
    except ModelError as error:
        if place is None or str(place) in error.message:
            raise
        raise type(error)(f"{place}: {error.message}", hint=error.hint) from error


def is_plain(name: object) -> bool:
    """Whether a name out of a file is that of a file in the same folder, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def some(names: Sequence[object], most: int = 5, mark: str = ", ") -> str:
    """The first few of a list of names, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return mark.join(str(name) for name in names[:most]) + more


def _read(path: Path, hint: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} has no {path.name}", hint=hint) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint=hint) from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ModelError(f"{path} is no ordinary file", hint=hint)
        if found.st_size > MOST_BYTES:
            raise ModelError(f"{path} has {found.st_size:,} bytes, more than any such file", hint=hint)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(MOST_BYTES)
    finally:
        os.close(descriptor)


def _is_deep(found: Any) -> bool:
    level = [found]
    for _ in range(MOST_DEPTH):
        level = [
            each for one in level for each in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        ]
        if not level:
            return False
    return True
