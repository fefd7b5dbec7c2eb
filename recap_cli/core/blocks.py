"""Which modules are the blocks of a model: what of it goes to a device at a time."""

from collections.abc import Callable, Sequence

from torch import nn

from recap_cli.core.axes import Axis, Cut
from recap_cli.core.ties import names_of


def block_paths(model: nn.Module, axes: Sequence[Axis]) -> list[str]:
    """The paths of the blocks that hold all that `axes` cut, the outermost only, in their order.

    A table names its axes `<block>.heads` and `<block>.neurons`. The functions of an adapter may choose any names: where they
    say no block, it is the smallest entry of a list of modules (`ModuleList`, `Sequential`, `ModuleDict`) that holds every cut
    of the axis. Of an axis that no entry holds, as one of all layers, it is that of each cut by itself; a cut that stands in no
    list, as a table that all layers share, is in no block. Raises `LookupError` for an axis of which no cut stands in one.
    """
    names, modules = names_of(model), dict(model.named_modules())
    entries = sorted(_entries(model), key=lambda path: path.count("."), reverse=True)

    def holds(path: str, cuts: Sequence[Cut]) -> bool:
        return all(any(name.startswith(f"{path}.") for name in names.get(cut.param, [cut.param])) for cut in cuts)

    def smallest(cuts: Sequence[Cut]) -> str | None:
        return next((path for path in entries if holds(path, cuts)), None)

    found: list[str] = []
    for axis in axes:
        path = axis.name.rpartition(".")[0]
        if path in modules and _is_called(modules[path]) and holds(path, axis.cuts):
            found.append(path)
        elif (entry := smallest(axis.cuts)) is not None:
            found.append(entry)
        else:
            found += _block_of_each(axis, smallest)
    paths = list(dict.fromkeys(found))
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def _block_of_each(axis: Axis, smallest: Callable[[Sequence[Cut]], str | None]) -> list[str]:
    """The smallest entry of a list that holds each cut of an axis. Raises `LookupError` if there is none for any of them."""
    blocks = {cut.param: smallest([cut]) for cut in axis.cuts}
    if not any(blocks.values()):
        lacking = sorted(blocks)
        more = f" and {len(lacking) - 2} more" if len(lacking) > 2 else ""
        raise LookupError(
            f"the name of the axis {axis.name!r} is no module's, and no entry of a ModuleList holds what it cuts "
            f"({', '.join(lacking[:2])}{more})"
        )
    return [block for block in blocks.values() if block is not None]


def _entries(model: nn.Module) -> list[str]:
    """The paths of the modules that stand in a list of modules and have a forward."""
    lists = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    inside = ((path, module) for path, module in model.named_modules() if isinstance(module, lists))
    return [
        f"{path}.{name}" if path else name for path, of in inside for name, entry in of.named_children() if _is_called(entry)
    ]


def _is_called(module: nn.Module) -> bool:
    """Whether a module has a forward; a ModuleList has none."""
    return type(module).forward is not nn.Module.forward
