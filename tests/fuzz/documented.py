"""What the documentation forbids of a recipe, and which exit codes there are: read from two pages of docs/reference."""

import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import category

from recap_cli import registry
from recap_cli.tasks.calls import task_named

DOCS = Path(__file__).parents[2] / "docs" / "reference"
OPEN = ("options", "model.config")  # sections whose keys are someone else's
SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
MARKS = {
    "memory_budget": re.compile(r"\d+(\.\d+)? ?([KMGT]i?)?B"),
    "device": re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?"),
    "kind": re.compile("|".join(registry.names("tasks"))),
    "metric": re.compile("|".join({m.name for kind in registry.names("tasks") for m in task_named(kind).all_metrics})),
}
LISTED = " or a list of 2 or more, each "


@cache
def exit_codes() -> frozenset[int]:
    """The exit codes of the table in docs/reference/errors.md."""
    return frozenset(int(code) for code in re.findall(r"^\| (\d+) \|", (DOCS / "errors.md").read_text(), re.M))


@cache
def keys() -> dict[str, str]:
    """The keys of a recipe with their types, in the words of docs/reference/recipe.md."""
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| ", (DOCS / "recipe.md").read_text(), re.M)
    return dict(rows)


@cache
def sections() -> frozenset[str]:
    """The names of the recipe's sections."""
    return frozenset(key.partition(".")[0] for key in keys() if "." in key)


def violations(values: Any) -> Iterator[str]:
    """Each rule of docs/reference/recipe.md that the values of a recipe break; none where they are no mapping."""
    for key, value in values.items() if isinstance(values, dict) else ():
        if key in sections() and isinstance(value, dict):
            for name, inner in value.items():
                yield from violation(f"{key}.{name}", inner)
        else:
            yield from violation(str(key), value)


def violation(key: str, value: Any) -> Iterator[str]:
    """The rule that a value breaks at its dotted key, if any."""
    if key in sections():
        if not isinstance(value, dict) and value is not None:
            yield f"{key} is a section"
    elif key not in keys():
        if not key.startswith(tuple(f"{name}." for name in OPEN)):
            yield "keys that are not listed are refused"
    elif not _fits(key, keys()[key], value):
        yield f"{key} is {keys()[key]}"


def _fits(key: str, told: str, value: Any) -> bool:  # noqa: PLR0911, PLR0912  (a line or two a type)
    """Whether a value is of the type that the documentation tells of; true where it tells nothing that can be checked."""
    if told.endswith(" or null"):
        if value is None:
            return True
        told = told.removesuffix(" or null")
    if told.endswith(" or false"):
        if value is False:
            return True
        told = told.removesuffix(" or false")
    if LISTED in told:
        alone, _, each = told.partition(LISTED)
        listed = isinstance(value, list | tuple) and len(value) >= 2 and all(_fits(key, each, item) for item in value)
        return listed or _fits(key, alone, value)
    if isinstance(value, str) and SCIENTIFIC.fullmatch(value):
        value = float(value)  # "`1e-4` is a number, with or without a dot"
        if told.startswith("a whole number") and math.isfinite(value) and value.is_integer():
            value = int(value)
    if told.startswith("a section"):
        return isinstance(value, dict)
    if told.startswith("one of "):
        return value in told.removeprefix("one of ").split(", ")
    if told.startswith("text such as"):
        mark = MARKS[key.rpartition(".")[2]]
        return isinstance(value, str) and mark.fullmatch(value) is not None
    if told.startswith("text that can name a folder"):
        return isinstance(value, str | float) and _names_a_folder(str(value))
    if told.startswith("text"):
        return isinstance(value, str | float) and value != ""
    if told.startswith("true"):
        return isinstance(value, bool) or value in re.findall(r'"(\w+)"', told)
    if told.startswith('"'):
        return value in re.findall(r'"(\w+)"', told)
    if told.startswith("a list of 2, each "):
        each = told.removeprefix("a list of 2, each ")
        return isinstance(value, list | tuple) and len(value) == 2 and all(_fits(key, each, item) for item in value)
    if isinstance(value, str) and f'"{value}"' in told:
        return True
    return _is_number(told, value)


def _names_a_folder(text: str) -> bool:
    """The rule for a name: one plain part of a path."""
    plain = text not in ("", ".", "..") and not text.startswith(("-", "~")) and text == text.strip()
    return plain and len(text.encode("utf-8", "surrogatepass")) <= 200 and not leads_astray(text)


def leads_astray(name: str) -> bool:
    """Whether a name is no part of a path but more, or speaks to the terminal."""
    return name in (".", "..") or any(char in "/\\" or category(char) == "Cc" for char in name)


def _is_number(told: str, value: Any) -> bool:
    whole = told.startswith("a whole number")
    if not whole and not told.startswith("a number"):
        raise AssertionError(f"a type that this module cannot read: {told}")
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not (whole or math.isfinite(value)):
        return False
    if found := re.match(r"a (?:whole )?number from (\d+) to (\d+)", told):
        return int(found[1]) <= value <= int(found[2])
    if found := re.match(r"a number in ([\[(])(\d+), (\d+)([\])])", told):
        low, high = int(found[2]), int(found[3])
        return (value >= low if found[1] == "[" else value > low) and (value <= high if found[4] == "]" else value < high)
    if found := re.match(r"a (?:whole )?number (>=|>) (\d+)", told):
        return value >= int(found[2]) if found[1] == ">=" else value > int(found[2])
    raise AssertionError(f"a type that this module cannot read: {told}")
