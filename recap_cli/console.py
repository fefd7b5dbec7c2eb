"""The one place that prints: results on stdout; tables, progress, errors and hints on stderr.

A terminal gets bars and colour. A log file gets plain lines without carriage returns or escape codes, at most one every ten
seconds per loop. `NO_COLOR` and `COLUMNS` are respected.
"""

import json
import math
import operator
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TextIO

from recap_cli.printable import escaped_in_json, printable
from recap_cli.progress import Item, Label

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PIPE_WIDTH = 120
LINE_SECONDS = 10.0
SHORT_SECONDS = 1.0  # a round has some ten loops that take less

_live: list["Progress"] = []  # the bars on the screen, at most one display of them


def result(text: str) -> None:
    """Print a line of the result on stdout, unchanged, and flush: the next stage of a pipe may wait for it."""
    print(text, file=sys.stdout, flush=True)  # noqa: T201


def line(text: str) -> None:
    """Print a line of a result for people on stdout, made `printable`: it may quote anything."""
    result(printable(text))


def emit_json(value: object) -> None:
    """Print `value` as JSON on stdout. Numbers that are not finite become null: JSON has none."""
    result(escaped_in_json(json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str)))


def say(text: str) -> None:
    """Print a line for people on stderr, above any bars, made `printable`: it may quote anything."""
    _console(sys.stderr).print(printable(text), soft_wrap=True)


def error(message: str, hint: str | None = None) -> None:
    """Print an error and its hint on stderr. Lines are not wrapped, so paths stay whole."""
    from rich.text import Text

    console = _console(sys.stderr)
    console.print(Text.assemble(("error: ", "bold red"), printable(message)), soft_wrap=True)
    if hint:
        console.print(Text.assemble(("hint: ", "bold cyan"), printable(hint)), soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, is_result: bool = False) -> None:
    """Print a table, on stdout if it is the result that was asked for, else on stderr.

    A column of short cells that all begin with a digit (or are empty) is set flush right. A number is never broken: if the
    screen is too narrow, the table is wider than the screen.
    """
    from rich.box import SIMPLE_HEAD
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    cells = [[printable(str(cell)) for cell in row] for row in rows]
    columns, title = [printable(name) for name in columns], title and printable(title)
    shown = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        numbers = all(re.fullmatch(r"(-?\d.{,12})?", row[index]) for row in cells)
        justify: Literal["left", "right"] = "right" if numbers else "left"
        shown.add_column(
            Text(name),
            justify=justify,
            overflow="fold",
            min_width=max(_widest((row[index] for row in cells), numbers), *map(len, name.split()), 1),
        )
    for row in cells:
        shown.add_row(*(Text(cell) for cell in row))
    console = _console(sys.stdout if is_result else sys.stderr)
    needed = Measurement.get(console, console.options, shown).minimum
    shown.width = needed if needed > console.width else None
    console.print(shown, crop=False)
    console.file.flush()


def _widest(cells: Iterable[str], numbers: bool) -> int:
    """Return the width of the widest number, with its unit if the whole column is `numbers`; at least 1."""
    words = (word for cell in cells for word in ([cell] if numbers else cell.split()) if re.match(r"-?\d", word))
    return max(map(len, words), default=1)


def records(rows: Sequence[Mapping[str, Any]], *, title: str | None = None, is_result: bool = False) -> None:
    """Print records as a table: a column per key in order of appearance, with the unit of the key (`value_text`)."""
    flat = [dict(_flat(row)) for row in rows]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    cells = [[value_text(key, row.get(key)) for key in keys] for row in flat]
    table([heading(key) for key in keys], cells, title=title, is_result=is_result)


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items and show progress, as a `recap_cli.progress.Track`: a bar on a terminal, else plain lines."""
    now = partial(_now, label) if isinstance(label, Label) else str
    label = printable(label)
    count = total if total is not None else operator.length_hint(items, -1)
    known = count if count >= 0 else None
    return (_bar if _is_terminal(sys.stderr) else _lines)(items, label, known, now)


def close() -> None:
    """Remove bars that an exception or Ctrl-C left on the screen."""
    while _live:
        _live.pop().stop()


def megabytes(count_bytes: float) -> str:
    """Return bytes as megabytes (10⁶) with one decimal."""
    return f"{count_bytes / 1e6:,.1f} MB"


def millions(count: float) -> str:
    """Return a number of parameters in millions with two decimals, or as a whole number below 100,000."""
    return f"{count / 1e6:,.2f} M" if count >= 1e5 else f"{count:,.0f}"


def percent(share: float) -> str:
    """Return a share of one as per cent with one decimal."""
    return f"{share:.1%}"


def duration(seconds: float) -> str:
    """Return seconds for people: `12 ms`, `0.4 s`, `2 min 05 s`, `3 h 04 min`."""
    if seconds < 0.1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def milliseconds(seconds: float) -> str:
    """Return seconds as milliseconds with at least three significant digits: `0.213 ms`, `21.3 ms`, `2,130 ms`."""
    digits = 2 - math.floor(math.log10(seconds * 1e3)) if seconds > 0 else 0
    return f"{seconds * 1e3:,.{min(max(digits, 0), 9)}f} ms"


# The unit of a key by one of its words. The first entry that fits counts, so that a share of the parameters is a share.
UNITS: dict[str, Callable[[float], str]] = {
    "bytes": megabytes,
    "latency": milliseconds,
    "seconds": duration,
    "share": percent,
    "ratio": percent,
    "params": millions,
    "parameters": millions,
    "entries": millions,
    "prunable": millions,
    "trainable": millions,
    "trained": millions,
    **dict.fromkeys(("metric", "loss", "accuracy", "f1", "matthews", "miou"), "{:.4f}".format),
}


def value_text(key: str, value: object) -> str:
    """Return `value` for people, in the unit that a word of `key` names (`UNITS`): `kept_share` is a share."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "" if value is None else str(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " ".join(value_text(key, item) for item in value)
    if not isinstance(value, (int, float)):
        return str(value)
    words = re.split(r"[._]", key)
    unit = next((unit for word, unit in UNITS.items() if word in words), None)
    if unit:
        return unit(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def heading(key: str) -> str:
    """Return a key as a heading, without the unit that its cells show."""
    return key.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ").replace(".", " ")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def _console(stream: TextIO) -> "Console":
    """Return the console of a stream. That of stderr draws the bars, and makes room for other lines."""
    from rich.console import Console

    if _live and stream is sys.stderr:
        return _live[-1].console
    fixed = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=stream, width=fixed, markup=False, highlight=False, emoji=False)


def _bar(items: Iterable[Item], label: str, total: int | None, now: Callable[[], str]) -> Iterator[Item]:
    """Yield the items under a bar that disappears when the loop ends. An inner loop adds its bar below."""
    outermost = not _live
    progress = _bars() if outermost else _live[-1]
    if outermost:
        _live.append(progress)
        progress.start()
    task = progress.add_task(label, total=total)
    try:
        for item in items:
            yield item
            progress.update(task, advance=1, description=f"{label}, {word}" if (word := now()) else label)
    finally:
        progress.remove_task(task)
        if outermost:
            close()


def _bars() -> "Progress":
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(compact=True),
        progress.TextColumn("left", style="dim"),
        console=_console(sys.stderr),
        transient=True,
        expand=True,
        refresh_per_second=4,
    )


def _lines(items: Iterable[Item], label: str, total: int | None, now: Callable[[], str]) -> Iterator[Item]:
    """Yield the items, with a plain line at the start, every ten seconds, and at the end of all but the shortest loops."""
    of_total = "" if total is None else f" of {total:,}"
    say(f"{label}: 0{of_total} ..." if of_total else f"{label} ...")
    start = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        at = time.monotonic()
        if at - last >= LINE_SECONDS and done != total:
            last = at
            left = "" if not total or done > total else f", {duration((at - start) / done * (total - done))} left"
            say(f"{label}: {done:,}{of_total}, {duration(at - start)}{left}{_comma(now())}")
    took = time.monotonic() - start
    if took >= SHORT_SECONDS:
        say(f"{label}: {done:,}{of_total} in {duration(took)}{_comma(now())}")


def _now(label: Label) -> str:
    return printable(label.now)


def _comma(word: str) -> str:
    return f", {word}" if word else ""
