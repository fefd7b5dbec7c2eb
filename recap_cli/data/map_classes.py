"""What the pixels of label maps mean: the names of the classes, the value or colour that each has, and what is ignored."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recap_cli.errors import DataError
from recap_cli.recipe.classes import read_classes
from recap_cli.untrusted.files import some

MOST_CLASSES = 10_000
LARGEST = 2**16 - 1  # of a value: maps have 8 or 16 bits
MOST_DIGITS = 9  # of a value as text
Colour = tuple[int, int, int]
FORMS = 'a list of names, {"0": "road", …}, or [{"name": "road", "color": [128, 64, 128]}, …]'


@dataclass(frozen=True)
class MapClasses:
    """The classes of label maps.

    Attributes:
        names: Of the classes; empty where nobody has named them.
        ids: The value of each class in a map.
        colours: Where maps are coloured, the colour of each class, and of what is ignored.
        ignored: Values that are no class.
    """

    names: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    colours: Mapping[Colour, int] | None = None
    ignored: frozenset[int] = frozenset()


def map_classes(data: Mapping[str, Any]) -> MapClasses:
    """Return the classes that a recipe's section `data` names in `classes`, or in the file there, without `ignore_index`.

    Raises:
        DataError: The file cannot be read, or does not say what the classes are.
    """
    given = data["ignore_index"]
    ignored = frozenset(() if given is None else [given] if isinstance(given, int) else given)
    if data["classes"] is None:
        return MapClasses(ignored=ignored)
    path: Path | str = Path(data["classes"]).expanduser() if isinstance(data["classes"], str) else "data.classes"
    entries = list(_entries(_read(path) if isinstance(path, Path) else data["classes"], path))
    _check(entries, path)
    kept = [entry for entry in entries if entry.id not in ignored]
    if len(kept) < 2:
        raise DataError(f"{path} names {len(kept)} classes beside what is ignored; expected 2 at least", hint=_hint())
    colours = {entry.colour: entry.id for entry in entries if entry.colour is not None}
    names, ids = tuple(entry.name for entry in kept), tuple(entry.id for entry in kept)
    return MapClasses(names, ids, colours or None, ignored)


@dataclass(frozen=True)
class _Entry:
    id: int
    name: str
    colour: Colour | None


def _read(path: Path) -> Any:
    try:
        return read_classes(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", hint=_hint()) from error
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}", hint=_hint()) from error


def _entries(found: Any, path: Path | str) -> Iterator[_Entry]:
    if not isinstance(found, dict | list):
        raise _odd(path, f"it holds {found!r:.80}")
    if not 0 < len(found) <= MOST_CLASSES:
        raise _odd(path, f"it has {len(found):,} entries; expected 1 to {MOST_CLASSES:,}")
    pairs: Sequence[tuple[Any, Any]] = list(found.items()) if isinstance(found, dict) else list(enumerate(found))
    for place, value in pairs:
        named = value if isinstance(value, dict) else {"name": value}
        number, name = named.get("id", place), named.get("name")
        if isinstance(number, str) and number.isdecimal() and len(number) <= MOST_DIGITS:
            number = int(number)
        if type(number) is not int or not 0 <= number <= LARGEST:
            raise _odd(path, f"it gives a class the value {number!r:.80}; expected 0 to {LARGEST}")
        if not isinstance(name, str) or not name.strip():
            raise _odd(path, f"it has no name for the value {number}")
        yield _Entry(number, name.strip(), _colour(named.get("color", named.get("colour")), number, path))


def _colour(value: Any, number: int, path: Path | str) -> Colour | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 3 or not all(type(shade) is int and 0 <= shade <= 255 for shade in value):
        raise _odd(path, f"it gives the value {number} the colour {value!r:.80}; expected three whole numbers from 0 to 255")
    return value[0], value[1], value[2]


def _check(entries: Sequence[_Entry], path: Path | str) -> None:
    coloured = [entry for entry in entries if entry.colour is not None]
    if coloured and len(coloured) < len(entries):
        lacking = next(entry.name for entry in entries if entry.colour is None)
        raise _odd(path, f"{lacking!r} has no colour, and others have")
    for what, values in (
        ("value", [str(entry.id) for entry in entries]),
        ("name", [entry.name for entry in entries]),
        ("colour", [str(list(entry.colour or ())) for entry in coloured]),
    ):
        if twice := sorted(value for value, count in Counter(values).items() if count > 1):
            raise _odd(path, f"several classes have the {what} {some(twice)}")


def _odd(path: Path | str, why: str) -> DataError:
    return DataError(f"{path} does not say what the classes are: {why}", hint=_hint())


def _hint() -> str:
    return f"name a JSON file of {FORMS}: --set data.classes=FILE"
