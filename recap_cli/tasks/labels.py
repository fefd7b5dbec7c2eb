"""Labels of classes as the numbers 0 … n − 1, whatever a file calls them.

Labels with the same key are the same label: 3, 3.0, "3" and "03", or "Yes", "yes" and " yes".
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from recap_cli.core.task import Labels
from recap_cli.errors import DataError
from recap_cli.untrusted.files import some

if TYPE_CHECKING:
    import pyarrow as pa

Value = bool | int | str
Find = Callable[[str], int | None]  # from a label as written to its number
Spellings = Mapping[str, Counter[str]]  # by key: how often a label is written in which way

WHOLE = re.compile(r"([0-9]{1,18})(\.0*)?")  # "3", "03" and "3.0"
LARGEST_WHOLE = 2**53  # beyond it, floats do not hold every whole number
SEEN = 2000  # rows that are read to distinguish labels from texts
MANY = 100  # more labels than this must have two examples each on average, or the column holds no labels
CHOOSE = "choose the column of the labels with --set data.label=NAME"


def read_labels(column: "pa.ChunkedArray", names: Sequence[str] | None, place: str, *, words: bool = True) -> Labels:
    """Return the labels of a training column.

    Whole numbers are sorted by value, names by alphabet. Of several spellings of a name the most frequent counts.

    Args:
        column: The column.
        names: The names that the data set has for its labels, if it has any.
        place: Where the column is, for messages.
        words: False if names are compared letter by letter.

    Raises:
        DataError: There are fewer than two labels, one is negative or empty, or their type cannot be a label.
    """
    counts = _counts(_plain(column, place))
    if names and type(next(iter(counts))) is int:
        found = Labels(tuple(names), from_dataset=True)
    else:
        spellings = _spellings(counts, words, place)
        by_key = {key: min(ways, key=lambda way: (-ways[way], way)) for key, ways in spellings.items()}
        by_number = _all_whole(by_key)
        ordered = sorted(by_key, key=lambda key: (_number(key) if by_number else 0, by_key[key]))
        notes = _notes(ordered, spellings, by_key, place)
        found = Labels(tuple(by_key[key] for key in ordered), words=words, notes=tuple(notes))
    if len(found.names) < 2:
        raise DataError(f"{place} holds only one label, {next(iter(counts))!r}", hint=CHOOSE)
    rows = sum(counts.values())
    if not found.from_dataset and words and len(found.names) > max(MANY, rows / 2):
        raise DataError(
            f"{place} holds {len(found.names):,} different values in {rows:,} rows: labels repeat more often, "
            "texts and measurements do not",
            hint=CHOOSE,
        )
    return found


def label_numbers(
    column: "pa.ChunkedArray",
    labels: Labels,
    names: Sequence[str] | None,
    place: str,
    *,
    row_of: Callable[[int], int] = lambda index: index,
) -> "pa.ChunkedArray":
    """Return the number of each label in `labels`, int64.

    Args:
        column: The column.
        labels: The labels of the training data.
        names: The names that this data set has for its labels, if it has any. Its whole numbers then are indices into them.
            Without names they are indices or values, as in the training data.
        place: Where the column is, for messages.
        row_of: The row, from 0, of a value of the column, where rows have several.

    Raises:
        DataError: A label is not one of the training data, or may be two of them. The message names the row.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    plain = _plain(column, place)
    values = pc.unique(plain)
    places = _places(values.to_pylist(), labels, names, place)
    numbers = pc.take(pa.array(places, pa.int64()), pc.index_in(plain, value_set=values))
    if (index := pc.index(numbers.is_null(), True).as_py()) >= 0:
        odd = plain[index].as_py()
        named = f" ({names[odd]!r})" if names and type(odd) is int and 0 <= odd < len(names) else ""
        raise DataError(
            f"{place} holds {odd!r}{named} in row {row_of(index) + 1}, but the labels are {some(labels.names)}",
            hint="use the same labels for training and validation (a label of -1 marks a test set without labels)",
        )
    return numbers


def may_be_classes(kind: "pa.DataType") -> bool:
    """Whether a column of this type may hold labels: whole numbers, texts or booleans."""
    from pyarrow import types

    number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return bool(types.is_string(kind) or types.is_large_string(kind) or number or types.is_boolean(kind))


def repeats(column: "pa.ChunkedArray") -> bool:
    """Whether the first values of a column look like labels: they repeat, and numbers are whole."""
    from pyarrow import types

    first = column.slice(0, SEEN)
    whole = not types.is_floating(column.type) or all(value is not None and value == value // 1 for value in first.to_pylist())
    return bool(len(first.unique()) <= max(2, len(first) / 2) and whole)


def check_names(found: Sequence[str], wanted: Sequence[str], origin: str) -> None:
    """Check that the labels of the data are those that a model was made for, in the same order.

    Raises:
        DataError: They are not.
    """
    if list(found) != list(wanted):
        raise DataError(
            f"the labels of {origin} are {some(found)}, but the model was made for {some(wanted)}",
            hint="restore the data, or make a new state for them with `recap init`",
        )


def finder(names: Sequence[str], key: Callable[[str], str]) -> Find:
    """Return a function from a text to the number of its label: by exact name, else by a key that only one name has."""
    exact = {name: number for number, name in enumerate(names)}
    keys = Counter(map(key, names))
    alike = {key(name): number for name, number in exact.items() if key(name) and keys[key(name)] == 1}
    return lambda text: exact.get(text, alike.get(key(text)))


def key_of(text: str) -> str:
    """Return the key of a label. Single letters keep their case: with handwriting, `a` and `A` are two labels."""
    text = text.strip()
    if whole := WHOLE.fullmatch(text):
        return whole[1].lstrip("0") or "0"
    return text.casefold() if len(text) > 1 else text


def _places(values: Collection[Value], labels: Labels, names: Sequence[str] | None, place: str) -> list[int | None]:
    """Return the number of each value in `labels`, or None. Raises `DataError` if two readings fit, and differ."""
    find = finder(labels.names, key_of if labels.words else str)
    by_value = [find(str(value)) for value in values]
    if names is not None:
        if not any(find(name) is not None for name in names) and _is_plain_count(labels.names, len(names)):
            return by_value  # the labels of the training data have numbers, and no names
        return _by_place(values, [find(name) for name in names], by_value)
    if not labels.from_dataset:
        return by_value
    by_place = _by_place(values, range(len(labels.names)), by_value)
    if not _all_whole(labels.names):
        return by_place
    fitting = [places for places in (by_value, by_place) if None not in places]
    if len(fitting) < 2 or by_value == by_place:
        return fitting[0] if fitting else by_value
    first = next(value for value, one, other in zip(values, by_value, by_place, strict=True) if one != other)
    raise DataError(
        f"{place} holds {first}, which is the label {labels.names[int(first)]!r} by its index from 0, and the label "
        f"{str(first)!r} by its name: the labels are {some(labels.names)}",
        hint='write the labels as texts, which are names: "label": "1" in a .jsonl file',
    )


def _by_place(values: Collection[Value], places: Sequence[int | None], otherwise: Sequence[int | None]) -> list[int | None]:
    """Return `places[value]` for whole numbers, and the value in `otherwise` for texts."""
    return [
        other if type(value) is not int else places[value] if 0 <= value < len(places) else None
        for value, other in zip(values, otherwise, strict=True)
    ]


def _is_plain_count(names: Sequence[str], count: int) -> bool:
    return list(names) == [str(number) for number in range(count)]


def _plain(column: "pa.ChunkedArray", place: str) -> "pa.ChunkedArray":
    """Return the labels as whole numbers, texts or booleans. Raises `DataError` for any other type."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_string(kind):
        return column
    if pa.types.is_large_string(kind):
        return column.cast(pa.string())
    if pa.types.is_floating(kind):  # pandas writes 1 as 1.0 if another value is missing
        wide = column.cast(pa.float64())
        whole = pc.and_(pc.less_equal(pc.abs(wide), LARGEST_WHOLE), pc.equal(wide, pc.floor(wide)))
        if pc.all(whole).as_py():
            return wide.cast(pa.int64())
    if pa.types.is_decimal(kind) and pc.all(pc.equal(column, pc.floor(column))).as_py():  # as databases store numbers
        return column.cast(pa.int64())
    raise DataError(f"{place} holds values of type {kind}; labels are whole numbers, texts or booleans", hint=CHOOSE)


def _counts(plain: "pa.ChunkedArray") -> dict[Value, int]:
    import pyarrow.compute as pc

    return {entry["values"]: entry["counts"] for entry in pc.value_counts(plain).to_pylist()}


def _spellings(counts: Mapping[Value, int], words: bool, place: str) -> Spellings:
    """Return the spellings of each label by key. Raises `DataError` for a label that is negative or empty."""
    numbers = [value for value in counts if type(value) is int]
    if numbers and min(numbers) < 0:
        raise DataError(
            f"{place} holds {some(sorted(numbers))}; labels that are whole numbers are 0 or more",
            hint="a label of -1 marks a test set without labels; if it is a class, give it a name",
        )
    found: dict[str, Counter[str]] = {}
    for value, count in counts.items():
        key = _key(value, words)
        if not key:
            raise DataError(f"{place} holds a label that is empty ({count} such rows)", hint="name it, or remove its rows")
        way = str(value).strip() if words else str(value)
        whole = WHOLE.fullmatch(way) if words else None
        found.setdefault(key, Counter())[whole[1] if whole else way] += count
    return found


def _key(value: Value, words: bool) -> str:
    return key_of(str(value)) if words else str(value)


def _number(key: str) -> int:
    return int(key.partition(".")[0])


def _all_whole(names: Sequence[str] | Mapping[str, str]) -> bool:
    return all(WHOLE.fullmatch(name) for name in names)


def _notes(ordered: Sequence[str], spellings: Spellings, names: Mapping[str, str], place: str) -> Iterator[str]:
    count = len(ordered)
    if _all_whole(ordered) and ordered != [str(number) for number in range(count)]:
        named = some([names[key] for key in ordered])
        yield f"{place} holds {named}: the model numbers them 0 … {count - 1}, and keeps them as the names of its labels"
    several = [", ".join(map(repr, sorted(spellings[key]))) for key in ordered if len(spellings[key]) > 1]
    if several:
        yield f"{place}: these spellings count as one label each: {some(several, mark='; ')}"
    alone = [key for key in ordered if len(key) == 1 and key.swapcase() in spellings and key != key.swapcase()]
    if alone:
        yield f"{place}: {some(alone)} are separate labels, because single letters differ in case"
