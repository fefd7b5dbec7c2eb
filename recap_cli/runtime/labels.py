"""Labels as the numbers 0 … n − 1, whatever a file calls them.

A label is known by its key: 3, 3.0, "3" and "03" have the same, and so have "Yes", "yes" and " yes".
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recap_cli.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Value = bool | int | str
Spellings = Mapping[str, Counter[str]]  # how often each label, by key, is written in which way

WHOLE = re.compile(r"([0-9]{1,18})(\.0*)?")  # "3", "03" and "3.0"
LARGEST_WHOLE = 2**53  # beyond it, a float does not say which number is meant
MANY = 100  # more labels than that have two examples each, or are no labels
CHOOSE = "choose the column of the labels with --set data.label=NAME"


@dataclass(frozen=True)
class Labels:
    """The classes of the training data: their names in the order of their numbers, and what to tell of them.

    `own` is True where the data set brings the names along: its column then holds places among them. Where `words` is False,
    a name is meant letter by letter, and otherwise upper case and surrounding blanks are no difference.
    """

    names: tuple[str, ...]
    own: bool = False
    words: bool = True
    notes: tuple[str, ...] = ()


def read_labels(column: "pa.ChunkedArray", own: Sequence[str] | None, place: str, *, words: bool = True) -> Labels:
    """The labels of a training column: `own` if the data set comes with names, otherwise what the column holds.

    Whole numbers are in their order, names in the alphabet's; a name that is written in several ways is as most rows have it.
    `place` says where the column is, for messages.

    Raises `DataError` for fewer than two labels, for one that is negative or empty, and for a type that cannot be a label.
    """
    counts = _counts(_plain(column, place))
    if own and type(next(iter(counts))) is int:
        found = Labels(tuple(own), own=True)
    else:
        spellings = _spellings(counts, words, place)
        names = {key: min(ways, key=lambda way: (-ways[way], way)) for key, ways in spellings.items()}
        ordered = sorted(names, key=int if _all_whole(names) else names.__getitem__)
        notes = _notes(ordered, spellings, names, place)
        found = Labels(tuple(names[key] for key in ordered), words=words, notes=tuple(notes))
    if len(found.names) < 2:
        raise DataError(f"{place} holds only one label, {next(iter(counts))!r}", hint=CHOOSE)
    rows = sum(counts.values())
    if not found.own and words and len(found.names) > max(MANY, rows / 2):
        raise DataError(
            f"{place} holds {len(found.names):,} different values in {rows:,} rows, as texts, measurements and numbers of rows "
            "do; labels come again",
            hint=CHOOSE,
        )
    return found


def label_numbers(column: "pa.ChunkedArray", labels: Labels, own: Sequence[str] | None, place: str) -> "pa.ChunkedArray":
    """Each label as its place in `labels`, int64; `own` are the names that come with this column, if any do.

    Raises `DataError`, with the row, for a label that is not among those of the training data.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    plain = _plain(column, place)
    values = pc.unique(plain)
    place_of = _finder(labels, own)
    places = [place_of(value) for value in values.to_pylist()]
    numbers = pc.take(pa.array(places, pa.int64()), pc.index_in(plain, value_set=values))
    if (row := pc.index(numbers.is_null(), True).as_py()) >= 0:
        raise DataError(
            f"{place} holds {plain[row].as_py()!r} in row {row + 1}, but the labels are {_some(labels.names)}",
            hint="use the same labels for training and validation (a label of -1 marks a test set without labels)",
        )
    return numbers


def check_names(found: Sequence[str], wanted: Sequence[str], origin: str) -> None:
    """Raise `DataError` unless the labels of the data are those that a model was made for, in the same order."""
    if list(found) != list(wanted):
        raise DataError(
            f"the labels of {origin} are {_some(found)}, but the model was made for {_some(wanted)}",
            hint="put the data back as they were, or make a new state for them with `recap init`",
        )


def _finder(labels: Labels, own: Sequence[str] | None) -> Callable[[Value], int | None]:
    """From a label as a column holds it to its place in `labels`."""
    exact = {name: number for number, name in enumerate(labels.names)}
    keys = Counter(_key(name, labels.words) for name in labels.names)
    alike = {key: exact[name] for name in labels.names if keys[key := _key(name, labels.words)] == 1}
    by_place = (own or labels.names) if labels.own or (own and not _all_whole(labels.names)) else None

    def place_of(value: Value) -> int | None:
        if by_place is not None and type(value) is int:
            if not 0 <= value < len(by_place):
                return None
            value = by_place[value]
        return exact.get(str(value), alike.get(_key(value, labels.words)))

    return place_of


def _plain(column: "pa.ChunkedArray", place: str) -> "pa.ChunkedArray":
    """The labels as whole numbers, texts or booleans; anything else is a `DataError`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_string(kind):
        return column
    if pa.types.is_large_string(kind):
        return column.cast(pa.string())
    if pa.types.is_floating(kind):  # pandas writes 1 as 1.0 where a value is missing elsewhere
        wide = column.cast(pa.float64())
        whole = pc.and_(pc.less_equal(pc.abs(wide), LARGEST_WHOLE), pc.equal(wide, pc.floor(wide)))
        if pc.all(whole).as_py():
            return wide.cast(pa.int64())
    if pa.types.is_decimal(kind) and pc.all(pc.equal(column, pc.floor(column))).as_py():  # a number of a database
        return column.cast(pa.int64())
    raise DataError(f"{place} holds values of type {kind}; labels are whole numbers, texts or booleans", hint=CHOOSE)


def _counts(plain: "pa.ChunkedArray") -> dict[Value, int]:
    import pyarrow.compute as pc

    return {entry["values"]: entry["counts"] for entry in pc.value_counts(plain).to_pylist()}


def _spellings(counts: Mapping[Value, int], words: bool, place: str) -> Spellings:
    """How each label is written, by its key. Raises `DataError` for a label that is negative or empty."""
    numbers = [value for value in counts if type(value) is int]
    if numbers and min(numbers) < 0:
        raise DataError(
            f"{place} holds {_some(sorted(numbers))}; labels that are whole numbers are 0 or more",
            hint="a label of -1 marks a test set without labels; where it is a class, call it by a word",
        )
    found: dict[str, Counter[str]] = {}
    for value, count in counts.items():
        key = _key(value, words)
        if not key:
            raise DataError(f"{place} holds a label that is empty ({count} such rows)", hint="name it, or take its rows out")
        way = str(value).strip() if words else str(value)
        whole = WHOLE.fullmatch(way) if words else None
        found.setdefault(key, Counter())[whole[1] if whole else way] += count
    return found


def _key(value: Value, words: bool) -> str:
    """What a label is known by. A single letter is no word: `a` and `A` are two, as where handwriting is read."""
    text = str(value)
    if not words:
        return text
    text = text.strip()
    if whole := WHOLE.fullmatch(text):
        return whole[1].lstrip("0") or "0"
    return text.casefold() if len(text) > 1 else text


def _all_whole(names: Sequence[str] | Mapping[str, str]) -> bool:
    return all(WHOLE.fullmatch(name) for name in names)


def _notes(ordered: Sequence[str], spellings: Spellings, names: Mapping[str, str], place: str) -> Iterator[str]:
    count = len(ordered)
    if _all_whole(ordered) and ordered != [str(number) for number in range(count)]:
        named = _some([names[key] for key in ordered])
        yield f"{place} holds {named}: the model numbers them 0 … {count - 1}, and keeps them as the names of its labels"
    several = [", ".join(map(repr, sorted(spellings[key]))) for key in ordered if len(spellings[key]) > 1]
    if several:
        yield f"{place}: written differently, and one label each: {_some(several, '; ')}"
    alone = [key for key in ordered if len(key) == 1 and key.swapcase() in spellings and key != key.swapcase()]
    if alone:
        yield f"{place}: {_some(alone)} are labels of their own, for single letters differ in case"


def _some(values: Sequence[object], mark: str = ", ") -> str:
    """The values, or the first and the last few of many."""
    if len(values) <= 8:
        return mark.join(map(str, values))
    return f"{mark.join(map(str, values[:4]))}{mark}…{mark}{values[-1]} ({len(values)} of them)"
