"""Labels as the numbers 0 … n − 1, whatever a file calls them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from recap_cli.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

LabelKind = Literal["numbers", "names", "truths"]


def label_names(column: "pa.ChunkedArray", names: Sequence[str] | None, place: str) -> list[str]:
    """The label names of a training column, in the order of their numbers.

    They are `names` if the data set comes with them; "0" … "n − 1" for whole numbers, "False" and "True" for booleans, and
    otherwise the texts found, sorted. `place` says where the column is, for messages.

    Raises `DataError` if whole numbers do not cover 0 … n − 1, if there is only one label, or if the type cannot be a label.
    """
    import pyarrow.compute as pc

    kind = label_kind(column, place)
    found = sorted(pc.unique(column).to_pylist())
    if len(found) < 2 and not names and found[0] != -1:
        raise DataError(
            f"{place} holds only one label, {found[0]!r}", hint="choose the column of the labels with --set data.label=NAME"
        )
    if kind == "truths":
        return ["False", "True"]
    if kind == "numbers":
        found = [int(number) for number in found]
        named = list(names) if names else [str(number) for number in range(len(found))]
        if found[0] < 0 or (not names and found != list(range(len(found)))):
            raise DataError(
                f"{place} holds {_some(found)}; labels that are whole numbers must be 0, 1, … with none left out",
                hint="renumber them from 0, or write them as text (a label of -1 marks a test set without labels)",
            )
    else:
        named = found
    if len(named) < 2:
        raise DataError(
            f"{place} holds only one label, {named[0]!r}",
            hint="choose the column of the labels with --set data.label=NAME",
        )
    return named


def label_numbers(column: "pa.ChunkedArray", names: Sequence[str], kind: LabelKind, place: str) -> "pa.ChunkedArray":
    """Each label as its place in `names`, int64. `kind` is that of the training column, to which this one must conform.

    Raises `DataError`, with the row, for a label that is not among `names`, as the training data has them.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    own = label_kind(column, place)
    if own != kind:
        raise DataError(
            f"{place} holds {own}, but the labels of the training data are {kind}", hint="use the same labels in both"
        )
    if kind == "names":
        numbers = pc.index_in(column.cast(pa.string()), value_set=pa.array(names, pa.string())).cast(pa.int64())
    else:
        numbers = column.cast(pa.int64())
    wrong = pc.index(pc.fill_null(pc.and_(pc.greater_equal(numbers, 0), pc.less(numbers, len(names))), False), False)
    if (row := wrong.as_py()) >= 0:
        raise DataError(
            f"{place} holds {column[row].as_py()!r} in row {row + 1}, but the labels are {_some(names)}",
            hint="use the same labels for training and validation (a label of -1 marks a test set without labels)",
        )
    return numbers


def label_kind(column: "pa.ChunkedArray", place: str) -> LabelKind:
    """Whether labels are whole numbers, names or truth values; anything else is a `DataError`."""
    import pyarrow as pa

    if pa.types.is_integer(column.type) or _is_whole(column):
        return "numbers"
    if pa.types.is_boolean(column.type):
        return "truths"
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return "names"
    raise DataError(
        f"{place} holds values of type {column.type}; labels are whole numbers, texts or booleans",
        hint="choose the column of the labels with --set data.label=NAME",
    )


def _is_whole(column: "pa.ChunkedArray") -> bool:
    """Whether a column of floats holds whole numbers only: pandas writes 1 as 1.0 where a value is missing elsewhere."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_floating(column.type):
        return False
    return bool(pc.all(pc.and_(pc.is_finite(column), pc.equal(column, pc.floor(column)))).as_py())


def _some(values: Sequence[object]) -> str:
    """The values, or the first and the last few of many."""
    if len(values) <= 8:
        return ", ".join(map(str, values))
    return f"{', '.join(map(str, values[:4]))}, …, {values[-1]} ({len(values)} of them)"
