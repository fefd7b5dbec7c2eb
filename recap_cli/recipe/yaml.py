"""The YAML of a recipe and its `--set` overrides as one document: values with their places.

No key of the recipe is named in this module. Bad YAML, doubled keys and overrides without `=` become a `Problem` each.
`recap_cli.recipe.problems` adds those of the schema.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from recap_cli.recipe.bounds import DEEPEST, check_size, is_number, unprintable

KeyPath = tuple[str, ...]
NULLS = ("null", "Null", "NULL", "~")
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
_IN_QUOTES = re.compile(r"\(put (text|it) in quotes\)")  # advice for a file
_LONGEST = 60  # characters of an override that a message repeats


class Problem(NamedTuple):
    """One line of the message. Problems are sorted by their place in the file, then by that on the command line."""

    order: tuple[int, int, int]
    where: str
    key: str
    text: str


class Override(NamedTuple):
    """One `--set key=value`, and its position among them."""

    position: int
    text: str
    path: KeyPath
    value: Any


class Document(NamedTuple):
    """The values of a file with overrides, and the places that they come from.

    `root` is None, and there are no values, if the file is not a YAML mapping.
    """

    origin: str
    root: yaml.Node | None
    overrides: list[Override]
    values: dict[str, Any]
    problems: list[Problem]


def load(
    text: str, origin: str, overrides: Sequence[str], alternatives: Iterable[Sequence[str]], needs: Mapping[str, str]
) -> Document:
    """Return the document of a YAML text and its overrides.

    Args:
        text: The YAML.
        origin: The name of the file, for messages.
        overrides: Each `section.key=value`.
        alternatives: Groups of keys. An override of one key of a group removes the others that are not overridden too.
        needs: Keys that go with the key that they need.
    """
    document = Document(origin, None, [], {}, [])
    try:
        root, values, odd = _parse(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date like 2024-13-45
        line, column, reason = _fault(error)
        document.problems.append(_in_file(origin, line, column, "(yaml)", f"expected YAML: {reason}"))
        root, values, odd = None, {}, []
    document.problems.extend(_in_file(origin, mark.line, mark.column, key, reason) for mark, key, reason in odd)
    if not isinstance(values, dict):
        found = {"NoneType": "nothing", "list": "a list"}.get(type(values).__name__, "a single value")
        reason = f"expected keys with values, such as `rounds: 10`; found {found}"
        document.problems.append(_in_file(origin, 0, 0, "(yaml)", reason))
        root, values = None, {}
    document = document._replace(root=root, values=values)
    for position, override in enumerate(overrides):
        _apply(document, position, override)
    _displace(document, alternatives, needs)
    return document


def setting(key: str, value: str | list[str]) -> str:
    """Return the `--set` of a text, or a list of texts, as a user types it, with the quotes that YAML and the shell need."""
    if isinstance(value, list):
        value = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf")).strip()
    elif not _is_itself(value):
        value = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=float("inf")).strip()
    return f"--set {key}={shlex.quote(value)}"


def as_typed(problem: str, key: str, value: str) -> str:
    """Return the problem of an override with advice for a shell, which would remove plain quotes."""
    return _IN_QUOTES.sub(lambda _: f"(as text: {setting(key.strip(), value.strip())})", problem)


def place(document: Document, paths: Sequence[KeyPath], *, at_key: bool) -> tuple[tuple[int, int, int], str]:
    """Return the sorting order and the text for the place of a problem between the keys `paths`.

    It is the last override of one of them. Without overrides it is the first of them in the file, or the section that lacks
    them.

    Args:
        document: The document.
        paths: The keys.
        at_key: True for the place of the key, False for that of its value.
    """
    for override in reversed(document.overrides):
        if any(overlap(override.path, path) for path in paths):
            return (1, override.position, 0), _option(override.text)
    found = [_find(document.root, path, at_key=at_key) for path in paths]
    mark, _ = max(found, key=lambda item: item[1])  # the first of those that match most of their path
    line, column = (mark.line, mark.column) if mark else (0, 0)
    return (0, line, column), f"{document.origin}:{line + 1}:{column + 1}"


def overlap(a: KeyPath, b: KeyPath) -> bool:
    """Whether the keys are equal, or one is a section that holds the other."""
    depth = min(len(a), len(b))
    return a[:depth] == b[:depth]


def _find(root: yaml.Node | None, path: KeyPath, *, at_key: bool) -> tuple[yaml.Mark | None, float]:
    """Return the mark of the deepest part of `path` that exists, and the share of `path` down to it."""
    node, mark, depth = root, root.start_mark if root else None, 0
    for part in path:
        if isinstance(node, yaml.MappingNode):
            pairs = [(key, value) for key, value in node.value if key.value == part]
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            pairs = [(node.value[int(part)],) * 2]
        else:
            break
        if not pairs:
            break
        key, node = pairs[-1]  # the last one of a doubled key counts
        depth += 1
        mark = node.start_mark if depth == len(path) and not at_key else key.start_mark
    return mark, depth / len(path)


def _parse(text: str) -> tuple[yaml.Node | None, Any, list[tuple[yaml.Mark, str, str]]]:
    """Return the node tree, the value, and wrong keys as (mark, key, reason)."""
    root = _composed(check_size(text))
    odd = list(_odd_keys(root, (), frozenset(), set()))
    return root, yaml.safe_load(text) if "<<" in text else _value_of(root), odd


def _composed(events: Iterable[yaml.Event]) -> yaml.Node | None:
    """Return the node tree of events, as `yaml.compose` does of their text, which it would parse again."""
    loader: Any = yaml.SafeLoader("")
    loader.state = iter(events).__next__  # what gives PyYAML's parser its next event
    node: yaml.Node | None = loader.get_single_node()
    return node


def _value_of(root: yaml.Node | None) -> Any:
    """Return the value of a node tree. Not for trees with a merge (`<<`), which changes the tree and so the places."""
    loader: Any = yaml.SafeLoader("")
    return None if root is None else loader.construct_document(root)


def _is_itself(value: str) -> bool:
    """Whether an override with these characters sets this text."""
    try:
        root, parsed, odd = _parse(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
    return type(parsed) is str and parsed == value and not odd and _lost(value, root, parsed) is None


def _odd_keys(
    node: yaml.Node | None, path: KeyPath, above: frozenset[int], seen: set[int]
) -> Iterator[tuple[yaml.Mark, str, str]]:
    """Yield doubled keys, keys that are not text, and times. A node with several aliases is visited once."""
    if node is not None and id(node) in above:
        raise yaml.MarkedYAMLError(problem="an alias is inside its own anchor", problem_mark=node.start_mark)
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode) and ":" in node.value and is_number(node):
        text = f"expected a number in digits; found {node.value}, which YAML reads in base 60 (put text in quotes)"
        yield node.start_mark, ".".join(path), text
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    lines: dict[str, int] = {}
    for index, child in enumerate(children):
        key, value = child if isinstance(node, yaml.MappingNode) else (None, child)
        name = str(index) if key is None else str(key.value)
        dotted = ".".join((*path, name))
        if key is not None and key.tag not in _KEY_TAGS:
            yield key.start_mark, dotted, f"expected text as a key; found {key.value} (put it in quotes)"
        elif key is not None and name in lines:
            yield key.start_mark, dotted, f"expected each key once; found it again after line {lines[name]}"
        elif key is not None:
            lines[name] = key.start_mark.line + 1
        yield from _odd_keys(value, (*path, name), above | {id(node)}, seen)


def _fault(error: Exception) -> tuple[int, int, str]:
    """Return line and column, from 0, and why the YAML was refused."""
    if isinstance(error, RecursionError):
        return 0, 0, "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        return error.problem_mark.line, error.problem_mark.column, reason
    return 0, 0, str(error).partition("\n")[0]


def _apply(document: Document, position: int, text: str) -> None:
    """Apply the override `text` to the document, or add its problem to those of the document."""
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if problem := _malformed(text, path, equals):
        return _refuse(document, position, text, _key_of(path), problem)
    try:
        root, parsed, odd = _parse(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # as above
        return _refuse(document, position, text, ".".join(path), f"expected a YAML value: {_fault(error)[2]}")
    if problem := _lost(value, root, parsed):
        return _refuse(document, position, text, ".".join(path), as_typed(problem, key, value))
    for _, inner, reason in odd:
        problem = reason if inner else as_typed(reason, key, value)
        _refuse(document, position, text, ".".join(filter(None, (*path, inner))), problem)
    if problem := _put(document.values, path, parsed):
        return _refuse(document, position, text, ".".join(path), problem)
    document.overrides.append(Override(position, text, path, parsed))


def _malformed(text: str, path: KeyPath, equals: str) -> str | None:
    """Return what is wrong with an override apart from its value, or None."""
    if problem := unprintable(text):
        return f"expected text; found {problem}"
    if not equals or not all(path):
        return f"expected section.key=value; found {text}"
    return f"expected at most {DEEPEST} levels of keys; found {len(path)}" if len(path) > DEEPEST else None


def _key_of(path: KeyPath) -> str:
    """Return the key of a malformed override, for a message."""
    key = ".".join(path)
    return key if key and not unprintable(key) else "-"


def _put(values: dict[str, Any], path: KeyPath, value: Any) -> str | None:
    """Set the value of a key, or return why that cannot be done."""
    section = values
    for depth, part in enumerate(path[:-1], 1):
        inside = section.get(part)
        if inside is not None and not isinstance(inside, dict):
            return f"expected {'.'.join(path[:depth])} to be a section; found a value"
        section[part] = dict(inside or {})  # a copy: YAML aliases are one object
        section = section[part]
    if value is None and len(path) == 1 and isinstance(section.get(path[0]), dict):
        return f"expected keys with values; found null, which would drop all of {path[0]}"
    section[path[-1]] = value
    return None


def _lost(value: str, root: yaml.Node | None, parsed: Any) -> str | None:
    """Return what is wrong with an override whose value, or its end, YAML drops, or None.

    An unset variable of a shell makes such a value. The run would silently use a default or other data.
    """
    if not value.strip():
        return "expected a value after the `=`; found nothing (write null for null)"
    if parsed is None and value.strip() not in NULLS:
        return f"expected a value after the `=`; found {value.strip()}, which YAML reads as nothing (put text in quotes)"
    rest = "" if root is None else value[root.end_mark.index :].strip()
    if rest.startswith("#"):
        return f"expected a value and no more; found {rest} after it, a comment in YAML (put text in quotes)"
    return None


def _displace(document: Document, alternatives: Iterable[Sequence[str]], needs: Mapping[str, str]) -> None:
    """Remove the alternatives to overridden keys, and the keys that need them."""
    given = [override.path for override in document.overrides if override.value is not None]
    _refuse_nulls(document, alternatives, given)

    def overridden(key: str) -> bool:
        path = tuple(key.split("."))
        return any(other[: len(path)] == path for other in given)

    gone: set[str] = set()
    for keys in alternatives:
        chosen = {key for key in keys if overridden(key)}
        gone |= set(keys) - chosen if chosen else set()
    gone |= {key for key, needed in needs.items() if needed in gone and not overridden(key)}
    for key in gone:
        section, name = key.split(".")
        if isinstance(inside := document.values.get(section), dict):
            document.values[section] = {other: value for other, value in inside.items() if other != name}


def _refuse_nulls(document: Document, alternatives: Iterable[Sequence[str]], given: Sequence[KeyPath]) -> None:
    """Refuse an override that sets a source to null and names no other: the one in the file would be used."""
    groups = [[tuple(key.split(".")) for key in keys] for keys in alternatives]
    for position, text, path, value in document.overrides:
        keys: list[KeyPath] = next((keys for keys in groups if path in keys), [])
        if value is not None or any(overlap(key, other) for key in keys for other in given):
            continue
        if standing := [".".join(key) for key in keys if _standing(document.values, key)]:
            problem = (
                f"expected a value; found null, so {standing[0]} of {document.origin} would be used: leave this out for that"
            )
            _refuse(document, position, text, ".".join(path), problem)


def _standing(values: Mapping[str, Any], path: KeyPath) -> bool:
    """Whether there is a value at a key."""
    inside: Any = values
    for part in path:
        inside = inside.get(part) if isinstance(inside, dict) else None
    return inside is not None


def _in_file(origin: str, line: int, column: int, key: str, text: str) -> Problem:
    return Problem((0, line, column), f"{origin}:{line + 1}:{column + 1}", key, text)


def _refuse(document: Document, position: int, override: str, key: str, text: str) -> None:
    document.problems.append(Problem((1, position, 0), _option(override), key, text))


def _option(override: str) -> str:
    return "--set " + (override if len(override) <= _LONGEST else f"{override[: _LONGEST - 3]}...")
