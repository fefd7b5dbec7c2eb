"""How a long loop reports progress, without knowing what shows it."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Track(Protocol):
    """Yields the items, and reports the label, the total and each item as it goes."""

    def __call__(self, items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]: ...


def silent(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """A `Track` that reports nothing."""
    return iter(items)
