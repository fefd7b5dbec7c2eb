"""Colours, markers, dashes and hatches of every figure: one table, for figures in files and for those in pages.

The methods' colours on white keep apart for the colour-blind: at least 31 in CIE76 between any two of our methods, for the
three dichromacies of Machado et al. 2009. Markers keep apart without any colour. The kinds' colours keep at least 26 apart.
They go from dark to light: CIE L* is 18, 36, 54, 68, 80 and 93.
"""

from collections.abc import Iterable
from itertools import cycle
from typing import NamedTuple

from recap_cli.memory.tracker import Kind


class Look(NamedTuple):
    """A method's colours on white and on a dark page, and the marker as matplotlib calls it, with its size in points."""

    colour: str
    dark: str
    marker: str
    size: float = 7.0


class Fill(NamedTuple):
    """The filling of a part of a bar: its label, its colours on white and on a dark page, and its hatch."""

    label: str
    colour: str
    dark: str
    hatch: str = ""


METHODS = {
    "full-ft": Look("#000000", "#ffffff", "s"),
    "head-ft": Look("#8AC6EE", "#a9dbfa", "^", 8.0),
    "lora-ft": Look("#0A62A8", "#3f82da", "v", 8.0),
    "pre-ft": Look("#E69F00", "#f0b429", "D"),
    "post-ft": Look("#720BDA", "#b6bbb5", "X", 9.0),
    "movement": Look("#B3C08A", "#af5409", "P", 9.0),
    "recap": Look("#B8123A", "#e8426c", "o"),
}
STRANGERS = (
    Look("#6B6B6B", "#8f969f", "<", 8.0),
    Look("#2B8F80", "#35b5a0", ">", 8.0),
    Look("#9C6BB5", "#c39ad8", "p"),
    Look("#7A5230", "#b98a5f", "h"),
)
EVERY = (*METHODS.values(), *STRANGERS)

KINDS: dict[Kind, Fill] = {
    "weights": Fill("weights", "#1B1F7A", "#5b66e0"),
    "gradients": Fill("gradients", "#A5173F", "#d8315f"),
    "optimizer": Fill("optimizer state", "#2B8F80", "#35b5a0", "///"),
    "activations": Fill("activations", "#EB9130", "#f5b060"),
    "temporary": Fill("temporary", "#7FD0F5", "#d3eefb", "\\\\\\"),
    "other": Fill("other", "#F3EE9A", "#8c8a5e"),
}
STAGES = {
    "init": Fill("init", "#D9D3C0", "#77715f"),
    "prune": Fill("prune", "#E69F00", "#f0b429"),
    "mask": Fill("mask", "#5FB7E5", "#a9dbfa", "\\\\\\"),
    "finetune": Fill("finetune", "#0A62A8", "#3f82da", "///"),
    "merge": Fill("merge", "#000000", "#ffffff"),
}
DASHES = ("-", "--", ":", "-.")  # of one method's lines, where another setting differs as well

INK, SOFT, LINE, PAPER, ACCENT = "#1B1E23", "#5A616B", "#D9DCE1", "#FFFFFF", "#0A62A8"
NEUTRAL = {INK: "#e8eaed", SOFT: "#a3abb6", LINE: "#353b44", PAPER: "#15181c", ACCENT: "#3f82da"}


def palette() -> dict[str, str]:
    """Every colour of a figure, in upper case, with the one that a dark page has in its place."""
    methods = [(look.colour, look.dark) for look in EVERY]
    fills = [(fill.colour, fill.dark) for fill in (*KINDS.values(), *STAGES.values())]
    return {colour.upper(): dark for colour, dark in [*NEUTRAL.items(), *methods, *fills]}


def variable(colour: str) -> str:
    """The name of the CSS variable that has this colour of the palette in a page."""
    return f"--c{colour[1:].lower()}"


def looks_of(methods: Iterable[str]) -> dict[str, Look]:
    """The style of each method, by its name or its short one (`full` is `full-ft`); third-party ones in their order."""
    spare = cycle(STRANGERS)
    return {method: METHODS.get(method) or METHODS.get(f"{method}-ft") or next(spare) for method in dict.fromkeys(methods)}
