"""How a long loop reports progress, without knowing what shows it."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Label(str):
    """A label, with a word on how the loop goes that may change while it runs."""

    now = ""


class Track(Protocol):
    """Yields the items, and reports the label (of a `Label` its word too), the total and each item as it goes."""

    def __call__(self, items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]: ...


def silent(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """A `Track` that reports nothing."""
    return iter(items)
