"""Foreign files: opened only if they are ordinary files, and JSON only up to a size and a depth.

Reading a named pipe would block, reading a device would not end, and a deeply nested list would exhaust the stack.
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
# What the libraries raise for configurations or weights that they did not write. A lack of memory is none of these.
LIBRARY_ERRORS = (
    *(ValueError, TypeError, AttributeError, LookupError, OSError, RuntimeError, ArithmeticError, AssertionError, ImportError),
)


def read_json(path: Path, hint: str = AGAIN) -> Any:
    """Return the value in a JSON file.

    Raises:
        ModelError: The file is missing, not an ordinary file, not JSON, too large or too deeply nested.
    """
    try:
        found = json.loads(_read(path, hint))
    except RecursionError:
        raise ModelError(f"{path} is nested too deeply", hint=hint) from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise ModelError(f"{path} cannot be read: {error}", hint=hint) from error
    if _is_deep(found):
        raise ModelError(f"{path} is nested more than {MOST_DEPTH} deep", hint=hint)
    return found


def read_object(path: Path, hint: str = AGAIN) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ModelError: As `read_json` does, or the value is not an object.
    """
    found = read_json(path, hint)
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object, but a {type(found).__name__}", hint=hint)
    return found


def check_ordinary(path: Path, hint: str = AGAIN) -> None:
    """Check that a path is an ordinary file, a link to one, or nothing. Opens no file.

    Raises:
        ModelError: It is something else.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # a loop of links, a name with a NUL
        raise ModelError(f"{path} cannot be read: {error}", hint=hint) from error
    if not stat.S_ISREG(mode):
        raise ModelError(f"{path} is no ordinary file", hint=hint)


def check_folder(folder: Path, patterns: Iterable[str]) -> None:
    """Check that everything in a folder that matches one of `patterns` is an ordinary file.

    Raises:
        ModelError: Something is not.
    """
    for pattern in patterns:
        for path in folder.glob(pattern):
            check_ordinary(path)


@contextmanager
def named(place: str | Path | None) -> Iterator[None]:
    """Add the place that a model comes from, if there is one, to each `ModelError` from inside."""
    try:
        yield
    except ModelError as error:
        if place is None or str(place) in error.message:
            raise
        raise type(error)(f"{place}: {error.message}", hint=error.hint) from error


def is_plain(name: object) -> bool:
    """Whether a name from a foreign file names a file in the same folder, and is not a path to another place."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def some(names: Sequence[object], most: int = 5, mark: str = ", ") -> str:
    """Return the first few of a list of names, for a message."""
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
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path} is no ordinary file", hint=hint)
        if status.st_size > MOST_BYTES:
            raise ModelError(f"{path} has {status.st_size:,} bytes; expected at most {MOST_BYTES:,}", hint=hint)
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
