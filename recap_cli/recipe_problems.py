"""What is wrong with a recipe, in words: where it stands, which key, what was expected and what was found.

Works on YAML nodes, plain values, pydantic's errors and the JSON Schema; it knows no key of the recipe by name.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from recap_cli.errors import RecipeError

CONFLICTS = "recipe_conflicts"  # the type of the pydantic error whose context carries `Conflict`s

_KeyPath = tuple[str, ...]


class Conflict(NamedTuple):
    """Keys that are well-formed and do not go together; the first is the one to change."""

    keys: tuple[str, ...]
    text: str


class Problem(NamedTuple):
    """One line of the message; problems sort by place in the file, then by order on the command line."""

    order: tuple[int, int, int]
    where: str
    key: str
    text: str


class Override(NamedTuple):
    """One `--set key=value`."""

    text: str
    path: _KeyPath
    value: object


@dataclass(frozen=True)
class Document:
    """A recipe's YAML nodes, the overrides that were applied, the values of both, and the problems so far."""

    origin: str
    root: yaml.Node | None
    values: dict[str, Any]
    overrides: tuple[Override, ...] = ()
    problems: tuple[Problem, ...] = ()


def recipe_error(origin: str, found: Iterable[Problem]) -> RecipeError:
    """Return the one error that lists all the problems `found`, in the order of the file."""
    lines = sorted(set(found))
    where, key = max(len(line.where) for line in lines), max(len(line.key) for line in lines)
    listing = "".join(f"\n  {line.where:<{where}}  {line.key:<{key}}  {line.text}" for line in lines)
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return RecipeError(
        f"{count} in the recipe {origin}{listing}",
        hint="`recap recipes show quickstart` prints a recipe that works; docs/recipe.md explains every key.",
    )


# Reading: text and overrides in, a document out.


def load(
    text: str,
    origin: str,
    overrides: Sequence[str],
    alternatives: Iterable[tuple[str, ...]],
    needs: dict[str, str],
) -> Document:
    """Return the document that YAML `text` and the `overrides` make; doubled keys and the like are among its problems.

    An override of one of the `alternatives` removes the others, and what `needs` them, unless overridden as well.

    Raises:
        RecipeError: the text is not YAML, or not a mapping.
    """
    parsed, found = _parse_overrides(overrides)
    document = Document(origin, None, {}, problems=tuple(found))
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that only looks like one
        line, column, reason = _yaml_fault(error)
        raise recipe_error(origin, [*found, _at(document, line, column, "", reason)]) from error
    if not isinstance(root, yaml.MappingNode):
        reason = f"expected keys with values, such as `rounds: 10`; found {shown(values)}"
        raise recipe_error(origin, [*found, _at(document, 0, 0, "", reason)])
    document = replace(document, root=root)
    doubled = [_at(document, node.start_mark.line, node.start_mark.column, key, why) for node, key, why in _odd(root)]
    # A section whose keys are all commented out is an empty one.
    values = {key: {} if value is None and key not in needs else value for key, value in values.items()}
    document = replace(document, values=values, problems=(*found, *doubled))
    return _apply(document, parsed, alternatives, needs)
