"""Plugins by kind and name: entry points that are listed without loading them, and loaded one at a time.

Shipped and third-party plugins register through the same groups: `recap.criteria`, `recap.adapters`, `recap.methods`,
`recap.tasks` and `recap.weights`.
"""

import os
import stat
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib import metadata
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from typing import Any, Literal, cast

from recap_cli.errors import PluginError
from recap_cli.untrusted.code import guarded

Kind = Literal["criteria", "adapters", "methods", "tasks", "weights"]
OURS = "recap-cli"
UNKNOWN, FILE = "unknown", "entry_points.txt"
MOST_BYTES = 2**20  # of an entry_points.txt; the longest known have a few thousand
KINDS: tuple[Kind, ...] = ("criteria", "adapters", "methods", "tasks", "weights")
SINGULAR: dict[Kind, str] = {
    "criteria": "criterion",
    "adapters": "adapter",
    "methods": "method",
    "tasks": "task",
    "weights": "frozen weight",
}
ADD_ADAPTER = (
    "to add one, register an Adapter in the entry-point group recap.adapters under the model type; see docs/plugins/adapter.md"
)


_read: Callable[[Distribution], Any] = cast(Any, Distribution.entry_points).fget  # what `leave_out_broken` replaces


@dataclass(frozen=True)
class Entry:
    """One plugin as its distribution declares it, not imported."""

    name: str
    kind: Kind
    distribution: str
    version: str
    target: str


@dataclass(frozen=True)
class Broken:
    """A distribution whose entry points cannot be read, and why. It need not have plugins of RECAP."""

    distribution: str
    version: str
    problem: str


def entries(kind: Kind) -> list[Entry]:
    """Return every plugin of a kind, sorted by name; a name that two distributions claim occurs twice.

    Distributions whose entry points cannot be read are left out: see `broken`.
    """
    return [entry for entry in _entries(_environment()) if entry.kind == kind]


def broken() -> list[Broken]:
    """Return all distributions of this environment whose entry points cannot be read."""
    return list(_broken(_environment()))


def leave_out_broken() -> None:
    """Hide entry points that cannot be read from this process, if there are any.

    torch and pydantic read the entry points of all distributions when they are imported, and fail on a malformed file.
    """
    if broken():
        Distribution.entry_points = property(_readable)  # type: ignore[assignment,method-assign]


def names(kind: Kind) -> list[str]:
    """Return the names of all plugins of a kind, sorted."""
    return sorted({entry.name for entry in entries(kind)})


def used(kind: Kind, name: str) -> dict[str, str]:
    """Return what the manifest records of a plugin: kind, name, distribution and version. Imports nothing.

    Raises:
        PluginError: There is no such name, or two distributions claim it.
    """
    entry = _find(kind, name)
    return {"kind": kind, "name": entry.name, "distribution": entry.distribution, "version": entry.version}


def load(kind: Kind, name: str) -> object:
    """Return a plugin: a `Criterion`, an `Adapter`, a `Method`, a `Task` or a `FrozenWeight`.

    Imports its module and no other plugin's.

    Raises:
        PluginError: There is no such name, or two distributions claim it. Or its module cannot be imported, or its type is not
            that of its kind.
    """
    entry = _find(kind, name)
    source = f"the {SINGULAR[kind]} {name!r} ({entry.target}, from {entry.distribution} {entry.version})"
    hint = f"repair or uninstall {entry.distribution}; `recap plugins` lists all plugins"
    with guarded(f"{source} cannot be loaded", hint):
        plugin = EntryPoint(name, entry.target, f"recap.{kind}").load()
    wanted = _type_of(kind)
    if not isinstance(plugin, wanted):
        raise PluginError(
            f"{source} is of type {type(plugin).__name__}, not {wanted.__name__}",
            hint=f"the entry point must name a value of type recap_cli.api.{wanted.__name__}; see docs/plugins/index.md",
        )
    return plugin


def unknown(kind: Kind, name: str, known: Iterable[str]) -> tuple[str, str]:
    """Return message and hint for a name without a plugin: all names, names that are near, and how to add one."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3)
    message = f"there is no {SINGULAR[kind]} named {name!r}; there are: {', '.join(known) or 'none'}"
    hints = [f"did you mean {' or '.join(near)}?"] if near else []
    hints += [ADD_ADAPTER] if kind == "adapters" else []
    return message, " ".join(hints) or "`recap plugins` lists all plugins"


def _environment() -> tuple[object, ...]:
    """Return what the set of distributions depends on: the places searched, and when each last changed."""
    return (*map(id, sys.meta_path), *((place, _changed(place)) for place in map(os.path.abspath, sys.path)))


def _changed(place: str) -> int | None:
    try:
        return os.stat(place).st_mtime_ns
    except OSError:
        return None


@lru_cache(maxsize=1)
def _entries(environment: tuple[object, ...]) -> tuple[Entry, ...]:
    """Return every plugin of every kind. Cached by `environment`: every stage asks, and all metadata must be read."""
    found = {
        Entry(point.name, kind, *owner, point.value)
        for distribution in _with_plugins()
        for owner in [_name_of(distribution)]
        for point in _readable(distribution)
        for kind in KINDS
        if point.group == f"recap.{kind}"
    }
    return tuple(sorted(found, key=lambda entry: (entry.name, entry.distribution)))


@lru_cache(maxsize=1)
def _broken(environment: tuple[object, ...]) -> tuple[Broken, ...]:
    found = {
        Broken(*_name_of(distribution), problem)
        for distribution in metadata.distributions()
        if (problem := _problem(distribution)) is not None
    }
    return tuple(sorted(found, key=lambda one: (one.distribution, one.version)))


def _find(kind: Kind, name: str) -> Entry:
    claims = [entry for entry in entries(kind) if entry.name == name]
    if not claims:
        message, hint = unknown(kind, name, names(kind))
        raise PluginError(message, hint=hint)
    if len(claims) > 1:
        owners = " and ".join(f"{entry.distribution} {entry.version}" for entry in claims)
        raise PluginError(f"the {SINGULAR[kind]} {name!r} is claimed by {owners}", hint="uninstall one of them")
    return claims[0]


def _with_plugins() -> list[Distribution]:
    """Return the distributions with plugins of RECAP. Of two with one name, the first on the path counts, as with imports."""
    all_of_them = metadata.distributions()
    with_plugins = [one for one in all_of_them if any(point.group.startswith("recap.") for point in _readable(one))]
    by_name = {_name_of(one)[0]: one for one in reversed(with_plugins)}
    return [one if name == UNKNOWN else metadata.distribution(name) for name, one in by_name.items()]


def _readable(distribution: Distribution) -> Any:
    """Return the entry points of a distribution; none if they cannot be read (see `broken`)."""
    return metadata.EntryPoints() if _problem(distribution) else _read(distribution)


def _problem(distribution: Distribution) -> str | None:
    """Return why the entry points of a distribution cannot be read, or None."""
    place = getattr(distribution, "_path", None)  # a folder, or a place within a zip file
    if isinstance(place, Path) and (odd := _oddity(place / FILE)):
        return f"its {FILE} {odd}"
    try:
        list(_read(distribution))
    except Exception as error:  # noqa: BLE001  (a foreign file; every failure is a finding)
        lines = [
            line.strip() for line in ((not isinstance(error, UnicodeError) and distribution.read_text(FILE)) or "").splitlines()
        ]
        bare = (n for n, line in enumerate(lines, 1) if line and line[0] not in "#[" and "=" not in line)
        if number := next(bare, None):
            return f"line {number} of its {FILE} has no '='"
        return f"its {FILE} cannot be read: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _oddity(file: Path) -> str | None:
    """Return why a file must not be opened, or None: reading a pipe would block, and a huge file would fill the memory."""
    try:
        status = file.stat()
    except OSError:  # missing or unreadable: opening it gives the error
        return None
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        return "is no ordinary file"
    return f"has {status.st_size:,} bytes" if status.st_size > MOST_BYTES and stat.S_ISREG(status.st_mode) else None


def _name_of(distribution: Distribution) -> tuple[str, str]:
    """Return the name and the version of a distribution, each "unknown" if its metadata lack it."""
    try:
        fields = distribution.metadata
        name, version = (next(iter(fields.get_all(key) or [UNKNOWN])) for key in ("Name", "Version"))
    except Exception:  # noqa: BLE001  (as in _problem)
        return UNKNOWN, UNKNOWN
    return str(name), str(version)


def _type_of(kind: Kind) -> type:
    """Return the type that a plugin of a kind must have. Importing it imports torch, but for methods and tasks."""
    if kind == "criteria":
        from recap_cli.core.criterion import Criterion

        return Criterion
    if kind == "methods":
        from recap_cli.core.method import Method

        return Method
    if kind == "tasks":
        from recap_cli.core.task import Task

        return Task
    if kind == "weights":
        from recap_cli.core.frozen_weight import FrozenWeight

        return FrozenWeight
    from recap_cli.core.adapter import Adapter

    return Adapter
