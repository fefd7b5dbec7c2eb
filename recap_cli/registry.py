"""Plugins by kind and name: entry points, listed without loading anything, loaded one at a time.

Ours register through the same groups as a stranger's: `recap.criteria`, `recap.adapters` and `recap.methods`.
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

Kind = Literal["criteria", "adapters", "methods"]
OURS = "recap-cli"
UNKNOWN, FILE = "unknown", "entry_points.txt"
MOST_BYTES = 2**20  # of such a file; the longest known have some thousand
KINDS: tuple[Kind, ...] = ("criteria", "adapters", "methods")
SINGULAR: dict[Kind, str] = {"criteria": "criterion", "adapters": "adapter", "methods": "method"}
ADD_ADAPTER = (
    "to add one, register an Adapter in the entry-point group recap.adapters under the model type; see docs/plugins/adapter.md"
)


_read: Callable[[Distribution], Any] = cast(Any, Distribution.entry_points).fget  # as it is without `leave_out_broken`


@dataclass(frozen=True)
class Entry:
    """One plugin as its distribution declares it: nothing of it has been imported."""

    name: str
    kind: Kind
    distribution: str
    version: str
    target: str


@dataclass(frozen=True)
class Broken:
    """A distribution, of any kind, whose entry points cannot be read, and why."""

    distribution: str
    version: str
    problem: str


def entries(kind: Kind) -> list[Entry]:
    """Every plugin of a kind, by name; a name that two distributions claim is there twice.

    A distribution whose entry points cannot be read is left out: see `broken`.
    """
    return [entry for entry in _entries(_environment()) if entry.kind == kind]


def broken() -> list[Broken]:
    """The distributions in this environment whose entry points cannot be read, ours or anybody's."""
    return list(_broken(_environment()))


def leave_out_broken() -> None:
    """Let this process see no entry points where they cannot be read; nothing is changed where all can be.

    torch and pydantic read those of all distributions when they are imported, and one that is malformed would end them.
    """
    if broken():
        Distribution.entry_points = property(_readable)  # type: ignore[assignment,method-assign]


def names(kind: Kind) -> list[str]:
    """The names of a kind, sorted."""
    return sorted({entry.name for entry in entries(kind)})


def used(kind: Kind, name: str) -> dict[str, str]:
    """What the manifest records of a plugin: kind, name, distribution and version. Raises `PluginError` as `load` does."""
    entry = _find(kind, name)
    return {"kind": kind, "name": entry.name, "distribution": entry.distribution, "version": entry.version}


def load(kind: Kind, name: str) -> object:
    """The plugin itself (a `Criterion`, an `Adapter` or a `Method`); imports its module and no other plugin's.

    Raises `PluginError` if there is no such name, two distributions claim it, its module cannot be imported, or it is something
    else than its kind asks for.
    """
    entry = _find(kind, name)
    source = f"the {SINGULAR[kind]} {name!r} ({entry.target}, from {entry.distribution} {entry.version})"
    hint = f"repair or uninstall {entry.distribution}; `recap plugins` lists what there is"
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
    """The message and the hint for a name that nothing is registered under: near names, all names, how to add one."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3)
    message = f"there is no {SINGULAR[kind]} named {name!r}; there are: {', '.join(known) or 'none'}"
    hints = [f"did you mean {' or '.join(near)}?"] if near else []
    hints += [ADD_ADAPTER] if kind == "adapters" else []
    return message, " ".join(hints) or "`recap plugins` lists what there is"


def _environment() -> tuple[object, ...]:
    """What the distributions of this process hang on: where they are looked for, and when those folders last changed."""
    return (*map(id, sys.meta_path), *((place, _changed(place)) for place in map(os.path.abspath, sys.path)))


def _changed(place: str) -> int | None:
    try:
        return os.stat(place).st_mtime_ns
    except OSError:
        return None


@lru_cache(maxsize=1)
def _entries(environment: tuple[object, ...]) -> tuple[Entry, ...]:
    """Every plugin of every kind, kept for as long as the `environment` stays: every stage asks, and all metadata are read."""
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
    """The distributions that register anything here; of two with one name the first on the path, as with imports."""
    found = [each for each in metadata.distributions() if any(point.group.startswith("recap.") for point in _readable(each))]
    named = {_name_of(each)[0]: each for each in reversed(found)}
    return [each if name == UNKNOWN else metadata.distribution(name) for name, each in named.items()]


def _readable(distribution: Distribution) -> Any:
    """The entry points of a distribution; none where they cannot be read, as `broken` says."""
    return metadata.EntryPoints() if _problem(distribution) else _read(distribution)


def _problem(distribution: Distribution) -> str | None:
    """Why the entry points of a distribution cannot be read, or None where they can."""
    place = getattr(distribution, "_path", None)  # a folder, or a place within a zip file
    if isinstance(place, Path) and (odd := _oddity(place / FILE)):
        return f"its {FILE} {odd}"
    try:
        list(_read(distribution))
    except Exception as error:  # noqa: BLE001  (a stranger's file, asked in order to know)
        lines = [
            line.strip() for line in ((not isinstance(error, UnicodeError) and distribution.read_text(FILE)) or "").splitlines()
        ]
        bare = (n for n, line in enumerate(lines, 1) if line and line[0] not in "#[" and "=" not in line)
        if number := next(bare, None):
            return f"line {number} of its {FILE} has no '='"
        return f"its {FILE} cannot be read: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _oddity(file: Path) -> str | None:
    """What is wrong with a file that must not even be opened: a pipe would be waited for, and a huge one fill the memory."""
    try:
        found = file.stat()
    except OSError:  # there is none, or it cannot be read, as whoever opens it says
        return None
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        return "is no ordinary file"
    return f"has {found.st_size:,} bytes" if found.st_size > MOST_BYTES and stat.S_ISREG(found.st_mode) else None


def _name_of(distribution: Distribution) -> tuple[str, str]:
    """The name and the version of a distribution, where its metadata say them."""
    try:
        said = distribution.metadata
        name, version = (next(iter(said.get_all(key) or [UNKNOWN])) for key in ("Name", "Version"))
    except Exception:  # noqa: BLE001  (as in _problem)
        return UNKNOWN, UNKNOWN
    return str(name), str(version)


def _type_of(kind: Kind) -> type:
    """The type a plugin must have; imported here, for it brings torch."""
    if kind == "criteria":
        from recap_cli.core.criterion import Criterion

        return Criterion
    if kind == "methods":
        from recap_cli.core.method import Method

        return Method
    from recap_cli.core.adapter import Adapter

    return Adapter
