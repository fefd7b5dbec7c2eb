"""Whether a table has the columns that a recipe names, and if not, which of its columns may have been meant."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

from recap_cli.errors import DataError
from recap_cli.recipe.yaml import setting

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Role:
    """A column that a task reads.

    Attributes:
        key: What it is for: `text`, `text_pair`, `image` or `label`, the key of the recipe's section `data`.
        name: Of the column.
        holds: What stands in it, in the plural, for messages.
        can_be: Whether a column of a type may have the role.
        is_likely: Whether the values of a column, of such a type, look like it.
    """

    key: str
    name: str
    holds: str
    can_be: "Callable[[pa.DataType], bool]"
    is_likely: "Callable[[pa.ChunkedArray], bool]"

    def named(self, name: str) -> "Role":
        """The same role for another column."""
        return replace(self, name=name)


def check_columns(table: "pa.Table", roles: Sequence[Role], origin: str) -> None:
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


def _wrong(table: "pa.Table", roles: Sequence[Role]) -> Iterator[tuple[Role, str]]:
    """Yield each role without a column that fits, and what is wrong with it."""
    for role in roles:
        there = table.column_names.count(role.name)
        if there != 1:
            yield role, f"has {'no' if there == 0 else 'more than one'} column {role.name!r}"
        elif not role.can_be(kind := table.column(role.name).type):
            yield role, f"has values of type {kind} in column {role.name!r}, not {role.holds}"


def _listed(parts: list[str]) -> str:
    """Return `has no column 'a'`, or for several, `has no column 'a', no column 'b' and …`."""
    rest = [part.removeprefix("has ") for part in parts[1:]]
    return " and ".join(part for part in (", ".join([parts[0], *rest[:-1]]), *rest[-1:]) if part)


def _hint(table: "pa.Table", roles: Sequence[Role], wrong: list[Role]) -> str:
    names = table.column_names
    if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in names[0]), None)):
        return f"the file is separated by {mark!r}; save it with commas, or as .tsv with tabs"
    fits = _fitting(table, wrong, {role.name for role in roles})
    sets = " ".join(_settings(roles, fits))
    choices = dict.fromkeys(  # columns of one key may lack the same
        f"data.{role.key} is one of {', '.join(fits[role])}" if fits[role] else f"no column of it holds {role.holds}"
        for role in wrong
        if len(fits[role]) != 1
    )
    hint = f"name the column{'s' if len(wrong) > 1 else ''} with {sets}{', where ' if choices else ''}{', and '.join(choices)}"
    return hint if all(fits[role] for role in wrong) else f"{hint}; or choose another task.kind"


def _settings(roles: Sequence[Role], fits: dict[Role, list[str]]) -> Iterator[str]:
    """Yield a `--set` for each key that is wrong; of a key with several columns it names all of them."""
    for key in dict.fromkeys(role.key for role in fits):
        of_key = [role for role in roles if role.key == key]
        named = [role.name if role not in fits else fits[role][0] if len(fits[role]) == 1 else "COLUMN" for role in of_key]
        yield setting(f"data.{key}", named[0] if len(named) == 1 else named)


def _fitting(table: "pa.Table", wrong: Sequence[Role], taken: set[str]) -> dict[Role, list[str]]:
    """Return the columns that may be meant by each role: one alone if its name or its type decides."""
    free = [name for name in table.column_names if name not in taken and table.column_names.count(name) == 1]
    left: dict[Role, list[str]] = {}
    for role in wrong:
        can = [column for column in free if role.can_be(table.column(column).type)]
        near = get_close_matches(role.name, can, n=1, cutoff=0.8)
        likely = [column for column in can if role.is_likely(table.column(column))]
        left[role] = near or likely or can
    for _ in wrong:  # a column that only one role can have is no choice for the others
        for role, columns in left.items():
            others = {found[0] for other, found in left.items() if other != role and len(found) == 1}
            left[role] = [column for column in columns if column not in others] or columns
    return left
