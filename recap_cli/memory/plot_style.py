"""The colour and the marker of every method: one table, for pictures as files and for those in pages.

The colours on white keep apart for the colour-blind: at least 31 in CIE76 between any two of our methods, for the three
dichromacies of Machado et al. 2009. Markers keep apart without any colour.
"""

from collections.abc import Iterable
from itertools import cycle
from typing import NamedTuple


class Look(NamedTuple):
    """Colours on white and on a dark page, the marker as matplotlib calls it, and the class in a page's style sheet."""

    colour: str
    dark: str
    marker: str
    css: str


METHODS = {
    "full-ft": Look("#000000", "#ffffff", "s", "m-full"),
    "head-ft": Look("#8AC6EE", "#a9dbfa", "^", "m-head"),
    "lora-ft": Look("#0A62A8", "#3f82da", "v", "m-lora"),
    "pre-ft": Look("#E69F00", "#f0b429", "D", "m-pre"),
    "post-ft": Look("#720BDA", "#b6bbb5", "X", "m-post"),
    "movement": Look("#B3C08A", "#af5409", "P", "m-movement"),
    "recap": Look("#B8123A", "#e8426c", "o", "m-recap"),
}
STRANGERS = (
    Look("#6B6B6B", "#8f969f", "<", "m-spare1"),
    Look("#2B8F80", "#35b5a0", ">", "m-spare2"),
    Look("#9C6BB5", "#c39ad8", "p", "m-spare3"),
    Look("#7A5230", "#b98a5f", "h", "m-spare4"),
)
EVERY = (*METHODS.values(), *STRANGERS)


def looks_of(methods: Iterable[str]) -> dict[str, Look]:
    """The look of each method, by its name or its short one (`full` is `full-ft`); strangers' in the order they come in."""
    spare = cycle(STRANGERS)
    return {method: METHODS.get(method) or METHODS.get(f"{method}-ft") or next(spare) for method in dict.fromkeys(methods)}
