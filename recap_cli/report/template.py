"""Values into a template of this folder, everything escaped, with numbers as the command line writes them."""

import math
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

from recap_cli.memory import plot_parts, plot_style

if TYPE_CHECKING:
    from jinja2 import Environment

MARK = '<meta name="generator" content="recap report'  # at the head of every page: by it we know our own
MARK_WITHIN_BYTES = 1000


def render(name: str, values: Mapping[str, Any]) -> str:
    """The text of a template with these values; a name that the values lack is an error."""
    names = {"ink": plot_style.INK, "soft": plot_style.SOFT, "line": plot_style.LINE, "page": plot_style.PAPER}
    fixed = {
        "mark": MARK,
        "recap_version": metadata.version("recap-cli"),
        "palette": {plot_style.variable(colour): (colour, dark) for colour, dark in plot_style.palette().items()},
        "neutrals": {name: plot_style.variable(colour) for name, colour in (names | {"accent": plot_style.ACCENT}).items()},
    }
    return _environment().get_template(name).render(**fixed, **values)


@cache
def _environment() -> "Environment":
    """The room of the templates, which compiles each of them once: that takes as long as drawing a picture."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    room = Environment(
        loader=PackageLoader("recap_cli.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    room.filters |= {
        "megabytes": megabytes,
        "percent": percent,
        "duration": duration,
        "milliseconds": milliseconds,
        "count": count,
        "metric": metric,
        "plain": plain,
        "utc": utc,
    }
    return room


def megabytes(value: float | None) -> str:
    """Bytes as megabytes (10⁶), and nothing for None."""
    return "" if value is None else plot_parts.megabytes(value)


def percent(share: float | None) -> str:
    """A share of one, with one decimal."""
    return "" if share is None else f"{share:.1%}"


def count(value: float | None) -> str:
    """A number of parameters: in millions, or whole where it is below 100,000."""
    if value is None:
        return ""
    return f"{value / 1e6:,.2f} M" if value >= 1e5 else f"{value:,.0f}"


def metric(value: float | None) -> str:
    """A metric with four decimals."""
    return "" if value is None else f"{value:.4f}"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: `12.3 ms`, `4.2 s`, `2 min 05 s`, `3 h 04 min`."""
    if seconds is None:
        return ""
    if seconds < 0.1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds, with three digits that count, at least: `0.213 ms`, `21.3 ms`, `2,130 ms`."""
    if seconds is None:
        return ""
    digits = 2 - math.floor(math.log10(seconds * 1e3)) if seconds > 0 else 0
    return f"{seconds * 1e3:,.{min(max(digits, 0), 9)}f} ms"


def plain(value: Any) -> str:
    """A value of a setting, of whatever kind, in one line."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "none" if value is None else str(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def utc(text: str) -> str:
    """An ISO date, to the minute."""
    return text[:16].replace("T", " ") + (" UTC" if text.endswith(("+00:00", "Z")) else "")
