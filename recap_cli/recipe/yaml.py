"""A recipe's YAML as values with their places: text and `--set` overrides in, one document out.

Knows YAML and the command line, and no key of the recipe by name. What is odd here (bad YAML, doubled keys, overrides
without `=`) becomes a `Problem`; `recap_cli.recipe.problems` adds what the schema finds.
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
_IN_QUOTES = re.compile(r"\(put (text|it) in quotes\)")  # what helps in a file
_LONGEST = 60  # characters of an override that a message repeats


class Problem(NamedTuple):
    """One line of the message; problems sort by place in the file, then by order on the command line."""

    order: tuple[int, int, int]
    where: str
    key: str
    text: str


class Override(NamedTuple):
    """One `--set key=value`, and its place among them."""

    round_plan: int
    text: str
    path: KeyPath
    value: Any


class Document(NamedTuple):
    """The values of a file with overrides on top, and what it takes to say where each comes from.

    `root` is None, and there are no values, where the file is no YAML mapping.
    """

    origin: str
    root: yaml.Node | None
    overrides: list[Override]
    values: dict[str, Any]
    problems: list[Problem]


def load(
    text: str, origin: str, overrides: Sequence[str], alternatives: Iterable[Sequence[str]], needs: Mapping[str, str]
) -> Document:
    """Return the document that YAML `text` and the `overrides` (each `section.key=value`) make.

    An override of one of the `alternatives` removes the others, and what `needs` them, unless overridden as well.
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
    for round_plan, override in enumerate(overrides):
        _apply(document, round_plan, override)
    _displace(document, alternatives, needs)
    return document


def setting(key: str, value: str) -> str:
    """The `--set` of a text, as it is typed: in quotes for YAML where that reads it as something else, and for the shell."""
    if not _is_itself(value):
        value = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=float("inf")).strip()
    return f"--set {key}={shlex.quote(value)}"


def as_typed(problem: str, key: str, value: str) -> str:
    """A problem of an override: quotes alone would be the shell's, and would not reach YAML."""
    return _IN_QUOTES.sub(lambda _: f"(as text: {setting(key.strip(), value.strip())})", problem)


def place(document: Document, paths: Sequence[KeyPath], *, at_key: bool) -> tuple[tuple[int, int, int], str]:
    """Return the sorting order and the words for where a problem stands that the keys `paths` have a part in.

    That is the last override of one of them, or else the first of them in the file, at the key or at its value, or else
    the section where it is missing.
    """
    for override in reversed(document.overrides):
        if any(overlap(override.path, path) for path in paths):
            return (1, override.round_plan, 0), _said(override.text)
    found = [_find(document.root, path, at_key=at_key) for path in paths]
    mark, _ = max(found, key=lambda item: item[1])  # the first of those that reach deepest
    line, column = (mark.line, mark.column) if mark else (0, 0)
    return (0, line, column), f"{document.origin}:{line + 1}:{column + 1}"


def overlap(a: KeyPath, b: KeyPath) -> bool:
    """Return whether the keys are the same, or one is a section that holds the other."""
    depth = min(len(a), len(b))
    return a[:depth] == b[:depth]


def _find(root: yaml.Node | None, path: KeyPath, *, at_key: bool) -> tuple[yaml.Mark | None, float]:
    """Return the mark of the deepest part of `path` that there is, and the share of `path` that it reaches."""
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
        key, node = pairs[-1]  # of a doubled key the last one counts
        depth += 1
        mark = node.start_mark if depth == len(path) and not at_key else key.start_mark
    return mark, depth / len(path)


def _parse(text: str) -> tuple[yaml.Node | None, Any, list[tuple[yaml.Mark, str, str]]]:
    """Return the node tree, the value, and keys that are odd in themselves, as (mark, key, what is wrong)."""
    check_size(text)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    odd = list(_odd_keys(root, (), frozenset(), set()))
    return root, yaml.safe_load(text) if "<<" in text else _value_of(root), odd


def _value_of(root: yaml.Node | None) -> Any:
    """What YAML reads a node tree as; a merge (`<<`) would change the tree, by which places are told."""
    loader: Any = yaml.SafeLoader("")
    return None if root is None else loader.construct_document(root)


def _is_itself(value: str) -> bool:
    """Whether an override of these characters sets this text."""
    try:
        root, parsed, odd = _parse(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
    return type(parsed) is str and parsed == value and not odd and _lost(value, root, parsed) is None


def _odd_keys(
    node: yaml.Node | None, path: KeyPath, above: frozenset[int], seen: set[int]
) -> Iterator[tuple[yaml.Mark, str, str]]:
    """Yield doubled keys, keys that are no text, and times; a node that several aliases share is looked at once."""
    if node is not None and id(node) in above:
        raise yaml.MarkedYAMLError(problem="an alias stands within its own anchor", problem_mark=node.start_mark)
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode) and ":" in node.value and is_number(node):
        text = f"expected a number in digits; found {node.value}, which YAML reads to base 60 (put text in quotes)"
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
    """Return line and column, from 0, and the reason why YAML was refused."""
    if isinstance(error, RecursionError):
        return 0, 0, "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        return error.problem_mark.line, error.problem_mark.column, reason
    return 0, 0, str(error).partition("\n")[0]


def _apply(document: Document, round_plan: int, text: str) -> None:
    """Set in the document what the override `text` says, or add what is wrong with it to the problems."""
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if problem := _malformed(text, path, equals):
        return _refuse(document, round_plan, text, _key_of(path), problem)
    try:
        root, parsed, odd = _parse(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # as above
        return _refuse(document, round_plan, text, ".".join(path), f"expected a YAML value: {_fault(error)[2]}")
    if problem := _lost(value, root, parsed):
        return _refuse(document, round_plan, text, ".".join(path), as_typed(problem, key, value))
    for _, inner, reason in odd:
        told = reason if inner else as_typed(reason, key, value)
        _refuse(document, round_plan, text, ".".join(filter(None, (*path, inner))), told)
    if problem := _put(document.values, path, parsed):
        return _refuse(document, round_plan, text, ".".join(path), problem)
    document.overrides.append(Override(round_plan, text, path, parsed))


def _malformed(text: str, path: KeyPath, equals: str) -> str | None:
    """What is wrong with an override before its value is looked at."""
    if problem := unprintable(text):
        return f"expected text; found {problem}"
    if not equals or not all(path):
        return f"expected section.key=value; found {text}"
    return f"expected at most {DEEPEST} keys in each other; found {len(path)}" if len(path) > DEEPEST else None


def _key_of(path: KeyPath) -> str:
    """The key of an override that makes no sense, for a message."""
    key = ".".join(path)
    return key if key and not unprintable(key) else "-"


def _put(values: dict[str, Any], path: KeyPath, value: Any) -> str | None:
    """Set the value at a key, or return why it cannot be there."""
    section = values
    for depth, part in enumerate(path[:-1], 1):
        inside = section.get(part)
        if inside is not None and not isinstance(inside, dict):
            return f"expected {'.'.join(path[:depth])} to be a section; found a value"
        section[part] = dict(inside or {})  # a copy: YAML aliases share what they stand for
        section = section[part]
    if value is None and len(path) == 1 and isinstance(section.get(path[0]), dict):
        return f"expected keys with values; found null, which would drop all of {path[0]}"
    section[path[-1]] = value
    return None


def _lost(value: str, root: yaml.Node | None, parsed: Any) -> str | None:
    """What is wrong with an override whose value YAML drops, all of it or its end, as an unset variable of a shell makes one.

    It would fall back on a default, or on other data, without a word.
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
    """Remove the alternatives to what is overridden, and what needs them."""
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
    """Refuse an override that sets a source to null and names no other: what the file names would stand in for it."""
    groups = [[tuple(key.split(".")) for key in keys] for keys in alternatives]
    for round_plan, text, path, value in document.overrides:
        keys: list[KeyPath] = next((keys for keys in groups if path in keys), [])
        if value is not None or any(overlap(key, other) for key in keys for other in given):
            continue
        if standing := [".".join(key) for key in keys if _standing(document.values, key)]:
            problem = (
                f"expected a value; found null, so {standing[0]} of {document.origin} would be used: leave this out for that"
            )
            _refuse(document, round_plan, text, ".".join(path), problem)


def _standing(values: Mapping[str, Any], path: KeyPath) -> bool:
    """Whether there is a value at a key."""
    inside: Any = values
    for part in path:
        inside = inside.get(part) if isinstance(inside, dict) else None
    return inside is not None


def _in_file(origin: str, line: int, column: int, key: str, text: str) -> Problem:
    return Problem((0, line, column), f"{origin}:{line + 1}:{column + 1}", key, text)


def _refuse(document: Document, round_plan: int, override: str, key: str, text: str) -> None:
    document.problems.append(Problem((1, round_plan, 0), _said(override), key, text))


def _said(override: str) -> str:
    return "--set " + (override if len(override) <= _LONGEST else f"{override[: _LONGEST - 3]}...")
