"""The frozen weight that a recipe names: loaded, tried, and put beside those that hold less."""

from dataclasses import replace
from typing import cast

from recap_cli import registry
from recap_cli.core.frozen_weight import FrozenWeight, check

_tried: dict[str, tuple[FrozenWeight, FrozenWeight]] = {}  # by name: as it was loaded, and with the name


def frozen_weight_of(name: str) -> FrozenWeight:
    """The frozen weight that is registered under a name, which it is given. A process tries each once.

    Raises `PluginError` as `registry.load` does, and if it does not do what it says.
    """
    plugin = cast(FrozenWeight, registry.load("weights", name))
    if name not in _tried or _tried[name][0] is not plugin:
        weights = replace(plugin, name=name)
        check(weights)
        _tried[name] = plugin, weights
    return _tried[name][1]


def smaller_quantized(name: str) -> list[str]:
    """The names of our own that quantize and hold less than the named one does, the largest first.

    Those of other packages are not imported: whoever wants one names it.
    """
    now = frozen_weight_of(name)
    ours = (entry.name for entry in registry.entries("weights") if entry.distribution == registry.OURS)
    found = [frozen_weight_of(one) for one in ours if one != name]
    smaller = [one for one in found if one.quantizes and one.entry_bytes < now.entry_bytes]
    return [one.name for one in sorted(smaller, key=lambda one: -one.entry_bytes)]
