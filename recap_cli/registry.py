"""Plugins by kind and name: entry points, listed without loading anything, loaded one at a time.

Ours register through the same groups as a stranger's: `recap.criteria`, `recap.adapters` and `recap.methods`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Literal

from recap_cli.errors import PluginError

Kind = Literal["criteria", "adapters", "methods"]
KINDS: tuple[Kind, ...] = ("criteria", "adapters", "methods")
SINGULAR: dict[Kind, str] = {"criteria": "criterion", "adapters": "adapter", "methods": "method"}
ADD_ADAPTER = (
    "to add one, register an Adapter in the entry-point group recap.adapters under the model type; see docs/plugins.md"
)


@dataclass(frozen=True)
class Entry:
    """One plugin as its distribution declares it: nothing of it has been imported."""

    name: str
    kind: Kind
    distribution: str
    version: str
    target: str


def entries(kind: Kind) -> list[Entry]:
    """Every plugin of a kind, by name; a name that two distributions claim is there twice."""
    found = {_entry(kind, point) for point in entry_points(group=f"recap.{kind}")}
    return sorted(found, key=lambda entry: (entry.name, entry.distribution))


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
    try:
        plugin = EntryPoint(name, entry.target, f"recap.{kind}").load()
    except (Exception, SystemExit) as error:  # a plugin is a stranger's code: importing it may raise anything
        raise PluginError(
            f"{source} cannot be loaded: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
            hint=f"repair or uninstall {entry.distribution}; `recap plugins` lists what there is",
        ) from error
    wanted = _type_of(kind)
    if not isinstance(plugin, wanted):
        raise PluginError(
            f"{source} is of type {type(plugin).__name__}, not {wanted.__name__}",
            hint=f"the entry point must name a value of type recap_cli.api.{wanted.__name__}; see docs/plugins.md",
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


def _find(kind: Kind, name: str) -> Entry:
    claims = [entry for entry in entries(kind) if entry.name == name]
    if not claims:
        message, hint = unknown(kind, name, names(kind))
        raise PluginError(message, hint=hint)
    if len(claims) > 1:
        owners = " and ".join(f"{entry.distribution} {entry.version}" for entry in claims)
        raise PluginError(f"the {SINGULAR[kind]} {name!r} is claimed by {owners}", hint="uninstall one of them")
    return claims[0]


def _entry(kind: Kind, point: EntryPoint) -> Entry:
    distribution, version = (point.dist.name, point.dist.version) if point.dist else ("unknown", "unknown")
    return Entry(point.name, kind, distribution, version, point.value)


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
