"""How large the YAML of a recipe may be: a malicious one is refused in seconds, before it fills the memory.

Each use of an alias counts like its anchor: nine levels of ten aliases are 600 bytes, and 10⁹ values.
"""

from typing import Any, NamedTuple, cast

import yaml

MOST_BYTES = 512 * 1024
MOST_VALUES = 10_000  # keys included
MOST_CHARACTERS = 64 * 1024  # of all values; with every default filled in, the YAML stays below `MOST_BYTES`
DEEPEST = 50  # levels of sections
MOST_DIGITS = 300  # of a number


class _Size(NamedTuple):
    """The size of a node with its aliases written out."""

    values: int
    characters: int
    height: int


_ONE = _Size(1, 1, 0)
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def check_size(text: str) -> list[yaml.Event]:
    """Return the events of a text, checked not to be larger or deeper than any recipe, and to have no tags.

    Raises:
        yaml.MarkedYAMLError: It is, or has; with the place.
        yaml.YAMLError: The text is not YAML, or too long.
    """
    if len(text) > MOST_BYTES:
        raise yaml.YAMLError(f"it is larger than {MOST_BYTES // 1024} KiB")
    sizes: dict[str, _Size] = {}  # by anchor
    above: list[tuple[str | None, list[_Size]]] = []  # the open collections: anchor and contents so far
    events: list[yaml.Event] = []
    values = characters = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        events.append(event)
        mark = cast(yaml.Mark, event.start_mark)
        if tag := getattr(event, "tag", None):  # PyYAML's constructors raise a bare KeyError for `!!bool maybe`
            raise yaml.MarkedYAMLError(problem=f"the tag {tag}; only plain values are allowed", problem_mark=mark)
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            above.append((anchor, []))
            added = _ONE
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, inside = above.pop()
            _put(sizes, above, anchor, _sum(inside))
            continue
        elif isinstance(event, yaml.ScalarEvent):
            _check_scalar(event, mark)
            added = _Size(1, 1 + len(event.value), 0)
            _put(sizes, above, anchor, added)
        elif isinstance(event, yaml.AliasEvent):
            added = sizes.get(anchor or "", _ONE)  # unknown or recursive aliases are refused later
            _put(sizes, above, None, added)
        else:
            continue
        values, characters = values + added.values, characters + added.characters
        if len(above) + added.height > DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"it is nested too deeply (more than {DEEPEST} levels)", problem_mark=mark)
        if values > MOST_VALUES or characters > MOST_CHARACTERS:
            most = f"{MOST_VALUES:,} values of {MOST_CHARACTERS:,} characters in total"
            problem = f"it holds more than {most}, with aliases written out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
    return events


def _put(sizes: dict[str, _Size], above: list[tuple[str | None, list[_Size]]], anchor: str | None, size: _Size) -> None:
    """Add a complete node to its collection, and to the anchors."""
    if above:
        above[-1][1].append(size)
    if anchor is not None:
        sizes[anchor] = size


def _sum(inside: list[_Size]) -> _Size:
    height = 1 + max((size.height for size in inside), default=0)
    return _Size(1 + sum(size.values for size in inside), 1 + sum(size.characters for size in inside), height)


def unprintable(text: str) -> str | None:
    """Return what a text holds that no recipe may hold, in words, or None.

    That is the character NUL, or half a surrogate pair, which a byte that is not UTF-8 becomes.
    """
    if "\0" in text:
        return "the character NUL"
    halves = [letter for letter in text if "\ud800" <= letter <= "\udfff"]
    return f"a byte or half a character that is no text ({halves[0]!a})" if halves else None


def is_number(event: yaml.ScalarEvent | yaml.ScalarNode) -> bool:
    """Whether YAML 1.1 reads a plain scalar as a number."""
    resolver: Any = yaml.SafeLoader("")
    return event.style is None and resolver.resolve(yaml.ScalarNode, event.value, (True, False)) in _NUMBERS


def _check_scalar(event: yaml.ScalarEvent, mark: yaml.Mark) -> None:
    if problem := unprintable(event.value):
        raise yaml.MarkedYAMLError(problem=f"it holds {problem}", problem_mark=mark)
    if len(event.value) > MOST_DIGITS and is_number(event):
        raise yaml.MarkedYAMLError(problem=f"a number of {len(event.value):,} digits", problem_mark=mark)
