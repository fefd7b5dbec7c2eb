"""Recipes from and to YAML: by path or shipped name, with overrides, a digest and a JSON Schema.

Reading reports *all* problems at once. `recap_cli.recipe.schema` checks each key, `recap_cli.recipe.conflicts` checks keys
against each other. `recap_cli.recipe.problems` makes the messages, with the place in the file or on the command line.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from recap_cli.errors import RecipeError
from recap_cli.recipe.bounds import MOST_BYTES
from recap_cli.recipe.classes import read_classes
from recap_cli.recipe.conflicts import ALTERNATIVES, NEEDS, STAND_IN
from recap_cli.recipe.distill import Distill
from recap_cli.recipe.near import near
from recap_cli.recipe.problems import conflicts, explain, recipe_error, without
from recap_cli.recipe.schema import Data, Evaluate, Finetune, Head, Importance, Mask, Model, Prune, Recipe, Task
from recap_cli.recipe.values import bytes_of
from recap_cli.recipe.yaml import Document, KeyPath, Problem, load

__all__ = [
    "Data",
    "Distill",
    "Evaluate",
    "Finetune",
    "Head",
    "Importance",
    "Mask",
    "Model",
    "Prune",
    "Recipe",
    "ShippedRecipe",
    "Task",
    "bytes_of",
    "changed",
    "differences",
    "digest",
    "dump",
    "json_schema",
    "parse",
    "read",
    "shipped",
    "shipped_text",
    "values_of",
]

OPEN_PIPES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")  # a shell's `<(...)`: pipes that have a writer
_HINT = "Give a YAML file, or a name from `recap recipes ls`."


def parse(text: str, origin: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a YAML text with overrides.

    An override of one of several alternatives replaces the others: `data.train=FILE` on a recipe with a hub data set removes
    `data.name` and `data.subset`.

    Args:
        text: The YAML.
        origin: The name of the file, for messages.
        overrides: Each `section.key=value`.

    Raises:
        RecipeError: The text is not a YAML mapping, or keys are unknown, missing, doubled, wrong, or contradict each other. The
            message lists all problems.
    """
    key = (text, tuple(overrides))
    recipe = _SOUND.pop(key, None) or _parsed(text, origin, overrides)
    _SOUND[key] = recipe
    if len(_SOUND) > _KEPT:
        del _SOUND[next(iter(_SOUND))]
    return recipe.model_copy(deep=True)  # a copy: its `model.config` is a dictionary


# The recipes parsed last: every stage of a run asks for the same one, and parsing YAML is slow. Only messages name the origin.
_SOUND: dict[tuple[str, tuple[str, ...]], Recipe] = {}
_KEPT = 16


def _parsed(text: str, origin: str, overrides: Sequence[str]) -> Recipe:
    document = load(text, origin, overrides, ALTERNATIVES, NEEDS)
    found = list(document.problems)
    recipe = None
    if document.root is not None:
        try:
            recipe = Recipe.model_validate(document.values)
        except ValidationError as error:  # it has the faults, but not their places
            faults, suspects = explain(error, document, json_schema())
            found += faults + _conflicts_beside(suspects, document)
    if recipe is None or found:
        raise recipe_error(origin, found)
    return recipe


def values_of(overrides: Sequence[str], origin: str) -> dict[str, Any]:
    """Return the values that overrides alone set, section by section; whether they fit a recipe is not checked.

    Raises:
        RecipeError: One of them is no `key=value`, or its value is no YAML.
    """
    document = load("{}", origin, overrides, (), {})
    if document.problems:
        raise recipe_error(origin, document.problems)
    return document.values


def _conflicts_beside(suspects: set[KeyPath], document: Document) -> list[Problem]:
    """Return the conflicts between keys that are not `suspects`, which have a problem already."""
    try:
        Recipe.model_validate(without(document.values, suspects, STAND_IN))
    except ValidationError as error:  # a second validation: the first one ends before it compares keys
        return conflicts(error, document, suspects)
    return []


def read(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in the file `source`, or the shipped one of that name, with overrides.

    It has the content of the file that `data.classes` names, as far as that can be read.

    Raises:
        RecipeError: There is no such recipe, it cannot be read, or it has problems.
    """
    if source in _shipped_files():
        return _with_classes(parse(shipped_text(source), f"{source}.yaml", overrides))
    try:
        if Path(source).is_fifo() and not source.startswith(OPEN_PIPES):  # reading a pipe without a writer blocks
            raise RecipeError(f"cannot read the recipe {source}: it is a pipe, not a file", hint=_HINT)
        with Path(source).open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise RecipeError(f"cannot read the recipe {source}: it is larger than {MOST_BYTES // 1024} KiB", hint=_HINT)
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:  # an unknown name or a missing file
        raise _unknown(source) from None
    except OSError as error:  # the message names the file
        raise RecipeError(f"cannot read the recipe {source}: {error.strerror}", hint=_HINT) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"cannot read the recipe {source}: it is not UTF-8 text", hint=_HINT) from error
    return _with_classes(parse(text, source, overrides))


def _with_classes(recipe: Recipe) -> Recipe:
    """Return a recipe with the content of its file of classes; one that cannot be read is told when the data are."""
    if not isinstance(recipe.data.classes, str):
        return recipe
    with suppress(OSError, ValueError, ValidationError):
        classes = read_classes(Path(recipe.data.classes).expanduser())
        data = Data.model_validate({**recipe.data.model_dump(), "classes": classes})
        return recipe.model_copy(update={"data": data})
    return recipe


def _unknown(source: str) -> RecipeError:
    stem, names = Path(source).stem, list(_shipped_files())
    meant = [stem] if stem in names else near(stem, names)
    question = f"Did you mean {' or '.join(meant)}? " if meant else ""
    return RecipeError(
        f"no recipe {source}: there is no such file, and no shipped recipe of that name",
        hint=f"{question}`recap recipes ls` lists the shipped recipes.",
    )


def dump(recipe: Recipe) -> str:
    """Return YAML with every default filled in. `parse` returns an equal recipe."""
    return str(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def digest(recipe: Recipe) -> str:
    """Return the SHA-256 of all values as 64 hex digits. Comments and the order of keys do not count."""
    values = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(values.encode()).hexdigest()


def differences(a: Recipe, b: Recipe) -> list[str]:
    """Return the dotted keys whose values differ, in the schema's order."""
    first, second = (dict(_leaves(recipe.model_dump(mode="json"))) for recipe in (a, b))
    return [key for key in first | second if first.get(key) != second.get(key)]


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def changed(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return a recipe with other values of dotted keys, as in `{"finetune.checkpointing": True}`.

    Raises:
        RecipeError: The values contradict each other.
    """
    return parse(dump(recipe), recipe.name, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe, with a description of every key, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


class ShippedRecipe(NamedTuple):
    """A recipe that comes with the package: the name to run it by, and its first comment line."""

    name: str
    title: str


def shipped() -> list[ShippedRecipe]:
    """Return the recipes that come with the package, by name."""
    texts = {name: file.read_text(encoding="utf-8") for name, file in _shipped_files().items()}
    return [ShippedRecipe(name, text.partition("\n")[0].strip("# ")) for name, text in texts.items()]


def shipped_text(name: str) -> str:
    """Return the YAML of the shipped recipe `name`, comments included.

    Raises:
        RecipeError: No shipped recipe has that name.
    """
    if name not in (files := _shipped_files()):
        raise _unknown(name)
    return files[name].read_text(encoding="utf-8")


def _shipped_files() -> dict[str, Traversable]:
    files = {file.name: file for file in resources.files("recap_cli.recipes").iterdir()}
    return {name.removesuffix(".yaml"): files[name] for name in sorted(files) if name.endswith(".yaml")}
