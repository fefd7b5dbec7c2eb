"""The messages for a wrong recipe: the place, the key, what was expected and what was found.

They come from pydantic's errors and the JSON Schema. No key of the recipe is named in this module.
"""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from recap_cli import registry
from recap_cli.errors import RecipeError
from recap_cli.recipe.conflicts import CONFLICTS
from recap_cli.recipe.near import did_you_mean, near
from recap_cli.recipe.yaml import Document, KeyPath, Problem, as_typed, overlap, place

_Schema = Mapping[str, Any]
_LONGEST = 60  # characters of a found value that a message repeats
MOST = 50  # problems that are listed; each costs a search for similar names
_WITHIN_JSON = {"dict", "list"}  # what pydantic adds between the keys of a nested JSON value


def recipe_error(origin: str, found: Iterable[Problem]) -> RecipeError:
    """Return the error that lists the problems, in the order of the file, at most `MOST` of them."""
    every = sorted(set(found))
    lines = [line._replace(key=_cut(line.key)) for line in every[:MOST]]
    where, key = max(len(line.where) for line in lines), max(len(line.key) for line in lines)
    listing = "".join(f"\n  {line.where:<{where}}  {line.key:<{key}}  {line.text}" for line in lines)
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    count = f"more than {count}" if len(every) > MOST else count
    return RecipeError(
        f"{count} in the recipe {origin}{listing}",
        hint="`recap recipes show quickstart` prints a recipe that works; with --filled it has every key.",
    )


def explain(error: ValidationError, document: Document, schema: _Schema) -> tuple[list[Problem], set[KeyPath]]:
    """Return the problems of single keys, and the suspects: keys that are wrong, missing, or probably meant.

    At most `MOST` keys are explained. If there are more, conflicts between keys are not reported.
    """
    found: list[Problem] = []
    suspects: set[KeyPath] = set()
    items = [item for item in error.errors(include_url=False) if item["type"] != CONFLICTS]
    for item in items[: MOST + 1]:
        path = _key_path(item["loc"], document.values)
        suspects.add(path)
        if item["type"] == "invalid_key" or "[key]" in item["loc"]:
            continue  # not a text; parsing the YAML has reported it
        unknown = item["type"] == "extra_forbidden"
        if unknown:
            meant = _meant(path, schema)
            suspects.update(tuple(key.split(".")) for key in meant)
            text = _unknown(path, meant, schema)
        else:
            text = _mismatch(path, document.values, schema)
        order, where = place(document, [path], at_key=unknown)
        if typed := next((given.text for given in reversed(document.overrides) if given.path == path), None):
            text = as_typed(text, ".".join(path), typed.partition("=")[2])
        found.append(Problem(order, where, ".".join(path), text))
    return found, suspects


def conflicts(error: ValidationError, document: Document, suspects: set[KeyPath]) -> list[Problem]:
    """Return the conflicts between keys, without those of `suspects`."""
    found = []
    for item in error.errors(include_url=False):
        for conflict in item["ctx"]["conflicts"] if item["type"] == CONFLICTS else ():
            paths = [tuple(key.split(".")) for key in conflict.keys]
            if not any(overlap(path, suspect) for path in paths for suspect in suspects):
                order, where = place(document, paths, at_key=True)
                found.append(Problem(order, where, conflict.keys[0], conflict.text))
    return found


def without(values: Mapping[str, Any], suspects: Iterable[KeyPath], stand_in: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `values` without the `suspects`, with missing keys from the sections of `stand_in`."""
    kept: dict[str, Any] = copy.deepcopy(dict(values))
    for path in suspects:
        section, names = kept, list(path)
        while len(names) > 1 and isinstance(section.get(names[0]), dict):
            section = section[names.pop(0)]
        for key in [key for key in section if str(key) == names[0]]:
            del section[key]
    return kept | {name: {**keys, **(kept.get(name) or {})} for name, keys in stand_in.items()}


def expected(node: _Schema) -> str:
    """Return what a node of the JSON Schema accepts, in words: "a whole number >= 1 or null"."""
    if "anyOf" in node:
        options = ("true, false" if option == {"type": "boolean"} else expected(option) for option in node["anyOf"])
        return " or ".join(options)
    if "enum" in node:
        return "one of " + ", ".join(node["enum"])
    kind = "const" if "const" in node else "object" if "$ref" in node else node.get("type", "")
    if kind in ("integer", "number"):
        return _number(node)
    if kind == "array":
        items = node.get("prefixItems")
        count, each = (len(items), items[0]) if items else (f"{node['minItems']} or more", node["items"])
        return f"a list of {count}, each {expected(each)}"
    if kind == "string" and ("$comment" in node or "examples" in node):  # the comment describes it for people
        return str(node.get("$comment") or "text such as " + ", ".join(node["examples"]))
    words = {"string": "text", "boolean": "true or false", "null": "null", "object": "a section (keys with values)"}
    words["const"] = json.dumps(node.get("const"))
    return words.get(kind, "text, a number, true, false, null or a list of such")


def _number(node: _Schema) -> str:
    words = "a whole number" if node["type"] == "integer" else "a number"
    low, high, above, below = (node.get(name) for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))
    if high is not None:
        return f"{words} from {low} to {high}" if above is None else f"{words} in ({above:g}, {high:g}]"
    if below is not None:
        return f"{words} in " + (f"[{low:g}, {below:g})" if above is None else f"({above:g}, {below:g})")
    return words + (f" > {above:g}" if above is not None else f" >= {low:g}")


def _mismatch(path: KeyPath, values: Mapping[str, Any], schema: _Schema) -> str:
    """Return "expected ...; found ..." for a value that is missing or wrong."""
    node = _node(schema, path)
    found, missing = _value(values, path)
    plugins = registry.names(node["plugins"]) if "plugins" in node else None
    words = f"one of {', '.join(plugins)}" if plugins else expected(node)
    text = f"expected {words}; found {'nothing' if missing else _shown(found)}"
    if words.startswith("text") and not missing and not isinstance(found, str | dict | list | None):
        return f"{text} (put it in quotes)"
    return text + did_you_mean(near(str(found), node.get("enum", ())))


def _shown(value: object) -> str:
    return _cut(json.dumps(value, ensure_ascii=False, default=str))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _meant(path: KeyPath, schema: _Schema) -> list[str]:
    """Return the keys that an unknown key may mean: similar ones in its section, the same or similar ones in others."""
    *section, name = path
    every = list(_keys(schema, schema))
    if name in every:
        return [name]
    beside = near(name, _properties(_node(schema, tuple(section)), schema))
    meant = [".".join((*section, word)) for word in beside]
    meant += [key for key in every if key.rpartition(".")[2] == name]
    similar = near(name, {key.rpartition(".")[2] for key in every})
    return meant or [key for key in every if key.rpartition(".")[2] in similar]


def _unknown(path: KeyPath, meant: Sequence[str], schema: _Schema) -> str:
    if list(path) == meant:  # a dotted key, as for --set
        section, _, name = path[0].rpartition(".")
        return f"unknown key; write `{section}:` and, indented below it, `{name}:`"
    known = ", ".join(_properties(_node(schema, path[:-1]), schema))
    return "unknown key" + (did_you_mean(meant) or f"; known keys: {known}")


def _keys(node: _Schema, schema: _Schema, prefix: str = "") -> Iterator[str]:
    for name, inner in _properties(node, schema).items():
        yield prefix + name
        yield from _keys(inner, schema, f"{prefix}{name}.")


def _properties(node: _Schema, schema: _Schema) -> Mapping[str, _Schema]:
    name = node.get("$ref", "").rpartition("/")[2]
    properties: Mapping[str, _Schema] = (schema["$defs"][name] if name else node).get("properties", {})
    return properties


def _node(schema: _Schema, path: KeyPath) -> _Schema:
    """Return the schema of the key at `path`. Inside free-form data it is that of any value."""
    node = schema
    for part in path:
        if part in (properties := _properties(node, schema)):
            node = properties[part]
        elif part.isdigit() and int(part) < len(node.get("prefixItems", ())):
            node = node["prefixItems"][int(part)]
        else:
            return {}
    return node


def _value(values: Any, path: KeyPath) -> tuple[Any, bool]:
    """Return the value at `path`, and whether there is none."""
    for part in path:
        if isinstance(values, dict) and part in values:
            values = values[part]
        elif isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        else:
            return None, True
    return values, False


def _key_path(location: Sequence[int | str], values: Mapping[str, Any]) -> KeyPath:
    """Return the keys of a pydantic location, without the types that it adds between the keys of a JSON value.

    An item that is missing from a list gives the path of the list.
    """
    path: KeyPath = ()
    for part in location:
        if isinstance(part, int) and isinstance(_value(values, path)[0], list) and _value(values, (*path, str(part)))[1]:
            break
        if part not in _WITHIN_JSON or not _value(values, (*path, str(part)))[1]:
            path = (*path, str(part))
    return path
