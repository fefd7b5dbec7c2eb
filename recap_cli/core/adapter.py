"""What an architecture adapter is: a table of names, and the walk that turns it into axes (paper, sec. 3.1.1).

A table names, for each attention block, its query, key, value and output layers, and for each feedforward block its layers into
and out of the hidden dimension. Several tables may be given where a library renamed its modules; the walk says which one it
found.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from recap_cli.core.axes import Axis, Cut
from recap_cli.core.ties import first_names, names_of


@dataclass(frozen=True)
class Heads:
    """One attention block: module names relative to `block`, a path in which `*` stands for the layer's number.

    Give `q`, `k`, `v`, or `fused` where one matrix holds all three one after another. `head_dim` names the attribute that
    holds the width of a head, on the module `attention`; `count` the attributes that hold the number of heads and `width`
    those that hold heads · head_dim, which a cut must make true again.
    """

    block: str
    out: str
    attention: str
    head_dim: str
    q: str = ""
    k: str = ""
    v: str = ""
    fused: str = ""
    count: tuple[str, ...] = ()
    width: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[tuple[str, int], ...]:
        """The layers whose rows are heads, each with its section number in a fused matrix."""
        return ((self.fused, 0), (self.fused, 1), (self.fused, 2)) if self.fused else ((self.q, 0), (self.k, 0), (self.v, 0))


@dataclass(frozen=True)
class Neurons:
    """One feedforward block: `up` are the layers into the hidden dimension, `down` the layer out of it.

    `chunks` is 2 where one `up` matrix holds gate and value one after another (SwiGLU), else 1.
    """

    block: str
    up: tuple[str, ...]
    down: str
    chunks: int = 1


@dataclass(frozen=True)
class Adapter:
    """A family of architectures that RECAP can prune.

    Attributes:
        tables: all the layouts that are known; what no table matches is not pruned, and `init` reports it.
        embeddings: patterns of parameter names (`*` matches anything): what is frozen by default.
        head: likewise: what is new for a task.
        axes: for an architecture that no table can say: the axes of a model.
        resize: likewise: makes counts that a model keeps as attributes agree with its sizes, axis name → units.
    """

    tables: tuple[Heads | Neurons, ...]
    embeddings: tuple[str, ...]
    head: tuple[str, ...]
    axes: Callable[[nn.Module], list[Axis]] | None = None
    resize: Callable[[nn.Module, dict[str, int]], None] | None = None


def find_axes(adapter: Adapter, model: nn.Module) -> list[Axis]:
    """The axes of `model`, heads before neurons in each layer, in the order of the layers.

    Cuts have the first name of each parameter, whichever of them an adapter gives. Of an adapter with tables of one kind only,
    the model has that kind only.

    Raises:
        LookupError: no table of a kind matches; the message names what was looked for.
    """
    if adapter.axes is not None:
        return _by_first_names(model, adapter.axes(model))
    found = [axis for table in adapter.tables for axis in _axes_of(table, model)]
    for kind, form in (("heads", Heads), ("neurons", Neurons)):
        looked = ", ".join(table.block for table in adapter.tables if isinstance(table, form))
        if looked and not any(axis.kind == kind for axis in found):
            raise LookupError(f"no {kind} found: no module is named like {looked}")
    return _by_first_names(model, sorted(found, key=lambda axis: (axis.layer, axis.kind)))


def resize(adapter: Adapter, model: nn.Module, sizes: dict[str, int]) -> None:
    """Make the counts that `model` keeps as attributes (timm's `num_heads`) agree with `sizes`, axis name → units."""
    if adapter.resize is not None:
        adapter.resize(model, sizes)
        return
    for table in adapter.tables:
        if isinstance(table, Heads):
            for path, _ in _blocks(table.block, model):
                known = _has(model, path, table.out, *(name for name, _ in table.inputs))
                if known and (name := f"{path}.heads") in sizes:
                    _resize_heads(table, model.get_submodule(_join(path, table.attention)), sizes[name])


def block_paths(model: nn.Module, axes: Sequence[Axis]) -> list[str]:
    """The paths of the blocks that hold all that `axes` cut, the outermost only, in their order.

    A table names its axes `<block>.heads` and `<block>.neurons`. The functions of an adapter may choose any names: where they
    say no block, it is the smallest entry of a list of modules (`ModuleList`, `Sequential`, `ModuleDict`) that holds every cut
    of the axis.

    Raises:
        LookupError: no entry holds an axis.
    """
    names, modules = names_of(model), dict(model.named_modules())

    def holds(path: str, axis: Axis) -> bool:
        return all(any(name.startswith(f"{path}.") for name in names.get(cut.param, [cut.param])) for cut in axis.cuts)

    entries = sorted(_entries(model), key=lambda path: path.count("."), reverse=True)
    paths = []
    for axis in axes:
        path = axis.name.rpartition(".")[0]
        is_block = path in modules and _is_called(modules[path]) and holds(path, axis)
        paths.append(path if is_block else _smallest(axis, entries, holds))
    paths = list(dict.fromkeys(paths))
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def _smallest(axis: Axis, entries: Sequence[str], holds: Callable[[str, Axis], bool]) -> str:
    """The first of `entries`, the deepest before the others, that holds all that an axis cuts."""
    found = next((path for path in entries if holds(path, axis)), None)
    if found is None:
        cut = sorted({cut.param for cut in axis.cuts})
        more = f" and {len(cut) - 2} more" if len(cut) > 2 else ""
        raise LookupError(
            f"the name of the axis {axis.name!r} is no module's, and no entry of a ModuleList holds all that it cuts "
            f"({', '.join(cut[:2])}{more})"
        )
    return found


def _entries(model: nn.Module) -> list[str]:
    """The paths of the modules that stand in a list of modules and have a forward."""
    lists = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    inside = ((path, module) for path, module in model.named_modules() if isinstance(module, lists))
    return [
        _join(path, name) if path else name for path, of in inside for name, entry in of.named_children() if _is_called(entry)
    ]


def _is_called(module: nn.Module) -> bool:
    """Whether a module has a forward; a ModuleList has none."""
    return type(module).forward is not nn.Module.forward


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter's name is like one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def names_found(axes: Sequence[Axis]) -> list[str]:
    """The layouts that were found, one line a kind: the cut parameters of the first layer of each distinct form."""
    lines: dict[str, str] = {}
    for axis in axes:
        form = ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", cut.param) for cut in axis.cuts if cut.param.endswith("weight")}))
        lines.setdefault(form, f"{axis.kind}: {form}")
    return list(lines.values())


def _by_first_names(model: nn.Module, axes: Sequence[Axis]) -> list[Axis]:
    """The same axes, in which a parameter of several names is cut once, by its first."""
    first = first_names(model)
    return [
        replace(axis, cuts=tuple(dict.fromkeys(replace(cut, param=first.get(cut.param, cut.param)) for cut in axis.cuts)))
        for axis in axes
    ]


def _axes_of(table: Heads | Neurons, model: nn.Module) -> list[Axis]:
    walk = _head_axis if isinstance(table, Heads) else _neuron_axis
    axes = [walk(table, model, path, layer) for path, layer in _blocks(table.block, model)]  # type: ignore[arg-type]
    return [axis for axis in axes if axis is not None]


def _head_axis(table: Heads, model: nn.Module, path: str, layer: int) -> Axis | None:
    if not _has(model, path, table.out, table.attention, *(name for name, _ in table.inputs)):
        return None
    out = model.get_submodule(_join(path, table.out))
    head_dim = int(getattr(model.get_submodule(_join(path, table.attention)), table.head_dim))
    features = _features(out)[1]
    sections = 3 if table.fused else 1
    if any(_features(model.get_submodule(_join(path, name)))[0] != sections * features for name, _ in table.inputs):
        return None
    cuts = []
    for name, section in table.inputs:
        cuts += _row_cuts(model, _join(path, name), head_dim, section * features)
    cuts.append(_column_cut(model, _join(path, table.out), head_dim))
    return Axis(f"{path}.heads", "heads", layer, features // head_dim, tuple(cuts))


def _neuron_axis(table: Neurons, model: nn.Module, path: str, layer: int) -> Axis | None:
    if not _has(model, path, table.down, *table.up):
        return None
    size = _features(model.get_submodule(_join(path, table.down)))[1]
    if any(_features(model.get_submodule(_join(path, name)))[0] != table.chunks * size for name in table.up):
        return None
    cuts = [
        cut
        for name in table.up
        for chunk in range(table.chunks)
        for cut in _row_cuts(model, _join(path, name), 1, chunk * size)
    ]
    cuts.append(_column_cut(model, _join(path, table.down), 1))
    return Axis(f"{path}.neurons", "neurons", layer, size, tuple(cuts))


def _row_cuts(model: nn.Module, path: str, width: int, offset: int) -> list[Cut]:
    layer = model.get_submodule(path)
    cuts = [Cut(f"{path}.weight", 1 if is_transposed(layer) else 0, width, offset)]
    if isinstance(getattr(layer, "bias", None), Tensor):
        cuts.append(Cut(f"{path}.bias", 0, width, offset))
    return cuts


def _column_cut(model: nn.Module, path: str, width: int) -> Cut:
    return Cut(f"{path}.weight", 0 if is_transposed(model.get_submodule(path)) else 1, width)


def _features(layer: nn.Module) -> tuple[int, int]:
    """(out, in) features of a linear layer, read off its weight."""
    first, second = layer.get_parameter("weight").shape  # (out, in), or (in, out) of a Conv1D
    return (second, first) if is_transposed(layer) else (first, second)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight as (in, out), as GPT-2's Conv1D does, and not as (out, in)."""
    return not isinstance(layer, nn.Linear) and hasattr(layer, "nf")


def _resize_heads(table: Heads, attention: nn.Module, heads: int) -> None:
    for name in table.count:
        if hasattr(attention, name):
            setattr(attention, name, heads)
    for name in table.width:
        if hasattr(attention, name):
            setattr(attention, name, heads * int(getattr(attention, table.head_dim)))


def _blocks(pattern: str, model: nn.Module) -> list[tuple[str, int]]:
    """The paths of the modules named like `pattern`, each with the number its (last) `*` stands for, or 0."""
    form = re.compile(re.escape(pattern).replace(r"\*\*", r"(?:[\w.]*\.)?").replace(r"\*", r"(\d+)"))
    found = ((path, form.fullmatch(path)) for path, _ in model.named_modules())
    return [(path, int(match[match.lastindex]) if match.lastindex else 0) for path, match in found if match]


def _has(model: nn.Module, path: str, *names: str) -> bool:
    modules = dict(model.get_submodule(path).named_modules())
    return all(name in modules for name in names)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if name else path
