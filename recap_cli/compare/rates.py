"""The learning rate at which a method is shown: of those that were tried, that of the best validation metric."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean
from typing import Any

from recap_cli.core.task import Metric

Cell = Mapping[str, Any]
Row = Mapping[str, Any]
TRIED = ("done", "failed")
FACTOR = 3.0  # to a further rate, where only one was tried


@dataclass(frozen=True)
class Chosen:
    """One method at its ratios, at its best rate.

    Attributes:
        lr: The rate; None if it is not known, or if none has a value.
        cells: The cells at this rate; all of them, if none has a value.
        rates: Each rate that was tried, by size: its mean validation value, and of how many seeds.
        edge: Whether the rate is the `lowest` or the `highest` of several; None if it is neither.
    """

    lr: float | None
    cells: Sequence[Cell]
    rates: Sequence[dict[str, Any]]
    edge: str | None


def choose(cells: Sequence[Cell], metric: Metric) -> Chosen:
    """Choose among the rates of a method at its ratios, by the mean validation metric alone.

    Only rates with the most seeds are chosen among; ties go to the lower rate.
    """
    by_rate = _by_rate(cells)
    tried = [lr for lr, mine in by_rate.items() if any(cell["status"] in TRIED for cell in mine)]
    values = {
        lr: [cell["value"] for cell in by_rate[lr] if cell["status"] == "done" and cell["value"] is not None] for lr in tried
    }
    means = {lr: fmean(found) for lr, found in values.items() if found}
    rates = [{"lr": lr, "value": means.get(lr), "n": len(values[lr])} for lr in tried]
    if not means:
        return Chosen(next(iter(by_rate)) if len(by_rate) == 1 else None, cells, rates, None)
    most = max(map(len, values.values()))
    eligible = [lr for lr in means if len(values[lr]) == most]
    best = max(eligible, key=lambda lr: metric.goodness(means[lr]))  # the first of equals, which is the lowest
    return Chosen(best, by_rate[best], rates, _edge(best, tried))


def are_varied(cells: Iterable[Cell]) -> bool:
    """Whether a comparison has learning rates of its grid, not only the recipe's."""
    return any(cell.get("lr") is not None for cell in cells)


def text(lr: float | None) -> str:
    """Return a rate for people."""
    return "the recipe's" if lr is None else f"{lr:.6g}"


def note(row: Row, name: str) -> str | None:
    """Return what to try next if the best rate of a row may lie beyond those that were tried; `name` is the row's."""
    lrs, method = [rate["lr"] for rate in row["rates"]], row["method"]
    if len(lrs) == 1 and row["value"] is not None:
        beside = [] if lrs[0] is None else [_short(lrs[0], lrs[0] / FACTOR), _short(lrs[0], lrs[0] * FACTOR)]
        return f"{name}: one rate was tried, {text(lrs[0])}; another may be better{_added(method, beside)}"
    if row["edge"] is None:
        return None
    known = [lr for lr in lrs if lr is not None]
    before, last, word = (*known[-2:], "higher") if row["edge"] == "highest" else (known[1], known[0], "lower")
    tried = f"{name}: its best rate {text(last)} is the {row['edge']} of {len(lrs)} that were tried"
    return f"{tried}; a {word} one may be better{_added(method, [_short(last, last / before * last)])}"


def _by_rate(cells: Sequence[Cell]) -> dict[float | None, list[Cell]]:
    """Return the cells by their rate, from the lowest; those without one of the grid are at the recipe's, if that is known."""
    own = next((cell["rate"] for cell in cells if cell.get("lr") is None and cell.get("rate") is not None), None)
    found: dict[float | None, list[Cell]] = {}
    for cell in cells:
        found.setdefault(own if cell.get("lr") is None else cell["lr"], []).append(cell)
    return {lr: _once(found[lr]) for lr in sorted(found, key=lambda lr: lr or 0.0)}


def _once(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells of one rate without those that another has done: one of the grid, and one at the recipe's rate."""
    done = {(cell.get("lr") is None, cell.get("seed")) for cell in cells if cell["status"] == "done"}
    return [
        cell
        for cell in cells
        if (cell.get("lr") is not None, cell.get("seed")) not in done
        or (cell.get("lr") is not None and cell["status"] == "done")
    ]


def _edge(lr: float | None, tried: Sequence[float | None]) -> str | None:
    known = [one for one in tried if one is not None]
    if lr is None or len(known) < 2:
        return None
    return {known[0]: "lowest", known[-1]: "highest"}.get(lr)


def _added(method: str, lrs: Sequence[float]) -> str:
    """Return the words to add to the command, if there are such rates."""
    told = ",".join(f"{lr:.12g}" for lr in lrs if isfinite(lr) and lr > 0)
    return f": add --lrs {shlex.quote(f'{method}:{told}')}" if told else ""


def _short(last: float, beyond: float) -> float:
    """Return a number of few digits that is as far beyond the last rate, to within a twentieth of the way."""
    rounded = (float(f"{beyond:.{digits}g}") for digits in range(1, 17))
    return next((one for one in rounded if abs(one - beyond) <= 0.05 * abs(beyond - last)), beyond)
