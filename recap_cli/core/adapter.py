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
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from recap_cli.core.axes import Axis, Cut
from recap_cli.core.surgery import channels_of
from recap_cli.core.ties import first_names


@dataclass(frozen=True)
class Heads:
    """One attention block: module names relative to `block`, a path in which `*` stands for the layer's number.

    Where several query heads share a head of key and value (grouped queries), the unit is such a group: its query heads, its
    key and its value. How many there are is read from the weights.

    Attributes:
        block: what all other names are relative to.
        out: the output layer.
        attention: the module that has the attributes below.
        head_dim: the attribute that holds the width of a head.
        q: the query layer.
        k: the key layer, of as many rows as the value layer; a divisor of those of the query layer.
        v: the value layer.
        fused: in the place of the three, one layer that holds them one after another.
        count: the attributes that hold the number of query heads, and must be made true after a cut.
        width: those that hold query heads · head_dim.
        kv_count: those that hold the number of heads of key and value.
        kv_width: those that hold that number · head_dim.
        extra: other parameters that have entries for each query head, each with its dimension (the columns of a bias table, or
            the entries of a scale); where a block has them.
        shared: True where something is common to the heads of all blocks, as T5's position bias is, so that they are cut alike:
            the heads of all blocks are one axis. The mask's units are each block's own.
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
    kv_count: tuple[str, ...] = ()
    kv_width: tuple[str, ...] = ()
    extra: tuple[tuple[str, int], ...] = ()
    shared: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """The layers whose rows are heads."""
        return (self.fused,) if self.fused else (self.q, self.k, self.v)


@dataclass(frozen=True)
class Neurons:
    """One feedforward block: `up` are the layers into the hidden dimension, `down` the layer out of it.

    `chunks` is 2 where one `up` matrix holds gate and value one after another (SwiGLU), else 1. `depthwise` are convolutions
    between them that mix no two neurons (SegFormer's Mix-FFN): a neuron owns its channel.
    """

    block: str
    up: tuple[str, ...]
    down: str
    chunks: int = 1
    depthwise: tuple[str, ...] = ()


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
            for block in _blocks(table.block, model):
                form = _form_of(table, model, block.path)
                if form is not None and (name := _heads_name(table, block)) in sizes:
                    _resize_heads(table, model.get_submodule(_join(block.path, table.attention)), sizes[name], form)


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


@dataclass(frozen=True)
class _Block:
    """A module that a table's `block` matches: its path, the number of its layer, and the path of the stack that it is in."""

    path: str
    layer: int
    stack: str


def _axes_of(table: Heads | Neurons, model: nn.Module) -> list[Axis]:
    walk = _head_axis if isinstance(table, Heads) else _neuron_axis
    axes = [walk(table, model, block) for block in _blocks(table.block, model)]  # type: ignore[arg-type]
    found = [axis for axis in axes if axis is not None]
    return _one_axis_each(found) if isinstance(table, Heads) and table.shared else found


@dataclass(frozen=True)
class _Form:
    """The sizes of an attention block: rows of the query, of key and of value, and the width of a head."""

    q_rows: int
    kv_rows: int
    head_dim: int

    @property
    def queries(self) -> int:
        """How many query heads share a head of key and value."""
        return self.q_rows // self.kv_rows


def _form_of(table: Heads, model: nn.Module, path: str) -> _Form | None:
    """The sizes of a block, which may have been cut; None if its modules or their shapes are not those of the table."""
    if not _has(model, path, table.out, table.attention, *table.inputs):
        return None
    head_dim = int(getattr(model.get_submodule(_join(path, table.attention)), table.head_dim))
    q_rows = _features(model.get_submodule(_join(path, table.out)))[1]
    rows = [_features(model.get_submodule(_join(path, name)))[0] for name in table.inputs]
    if table.fused:
        rest = rows[0] - q_rows
        rows = [q_rows, rest // 2, rest - rest // 2]
    q, k, v = rows
    if q != q_rows or k != v or k <= 0 or head_dim <= 0 or q % k != 0 or k % head_dim != 0:
        return None
    return _Form(q_rows, k, head_dim)


def _head_axis(table: Heads, model: nn.Module, block: _Block) -> Axis | None:
    path, form = block.path, _form_of(table, model, block.path)
    if form is None:
        return None
    size, wide = form.kv_rows // form.head_dim, form.queries * form.head_dim
    own = str(block.layer) if table.shared else ""  # the mask's units are those of one block
    kv = _words(own, "kv" if form.queries > 1 else "")
    q, *others = table.inputs * (3 if table.fused else 1)
    starts = (form.q_rows, form.q_rows + form.kv_rows) if table.fused else (0, 0)
    cuts = _row_cuts(model, _join(path, q), wide, 0, own)
    for name, start in zip(others, starts, strict=True):
        cuts += _row_cuts(model, _join(path, name), form.head_dim, start, kv)
    for name, dim in table.extra:
        cuts += _extra_cuts(model, _join(path, name), dim, size, _words(own, name))
    cuts.append(_column_cut(model, _join(path, table.out), wide, own))
    return Axis(_heads_name(table, block), "heads", block.layer, size, tuple(cuts))


def _words(*words: str) -> str:
    return "/".join(filter(None, words))


def _heads_name(table: Heads, block: _Block) -> str:
    return f"{block.stack if table.shared else block.path}.heads"


def _one_axis_each(axes: Sequence[Axis]) -> list[Axis]:
    """The axes, those of one name (of one stack) joined. Raises `LookupError` if these differ in size."""
    joined: dict[str, Axis] = {}
    for axis in axes:
        first = joined.setdefault(axis.name, replace(axis, cuts=()))
        if axis.size != first.size:
            raise LookupError(f"{axis.name}: blocks that share their heads have {first.size} of them, and {axis.size}")
        joined[axis.name] = replace(first, cuts=(*first.cuts, *axis.cuts))
    return list(joined.values())


def _extra_cuts(model: nn.Module, name: str, dim: int, size: int, couple: str) -> list[Cut]:
    """The cut of a parameter that has entries for each head; none where the block has no such parameter."""
    param = dict(model.named_parameters(remove_duplicate=False)).get(name)
    if param is None:
        return []
    if not 0 <= dim < param.ndim or param.shape[dim] % size != 0:
        raise LookupError(f"{name} of shape {tuple(param.shape)} has no entries for each of {size} heads along dimension {dim}")
    return [Cut(name, dim, param.shape[dim] // size, 0, couple)]


def _neuron_axis(table: Neurons, model: nn.Module, block: _Block) -> Axis | None:
    path = block.path
    if not _has(model, path, table.down, *table.up, *table.depthwise):
        return None
    size = _features(model.get_submodule(_join(path, table.down)))[1]
    if any(_features(model.get_submodule(_join(path, name)))[0] != table.chunks * size for name in table.up):
        return None
    if any(channels_of(model.get_submodule(_join(path, name))) != size for name in table.depthwise):
        return None
    cuts = [
        cut
        for name in table.up
        for chunk in range(table.chunks)
        for cut in _row_cuts(model, _join(path, name), 1, chunk * size)
    ]
    for name in table.depthwise:
        cuts += _row_cuts(model, _join(path, name), 1, 0)
    cuts.append(_column_cut(model, _join(path, table.down), 1))
    return Axis(f"{path}.neurons", "neurons", block.layer, size, tuple(cuts))


def _row_cuts(model: nn.Module, path: str, width: int, offset: int, couple: str = "") -> list[Cut]:
    layer = model.get_submodule(path)
    cuts = [Cut(f"{path}.weight", 1 if is_transposed(layer) else 0, width, offset, couple)]
    if isinstance(getattr(layer, "bias", None), Tensor):
        cuts.append(Cut(f"{path}.bias", 0, width, offset, couple))
    return cuts


def _column_cut(model: nn.Module, path: str, width: int, couple: str = "") -> Cut:
    return Cut(f"{path}.weight", 0 if is_transposed(model.get_submodule(path)) else 1, width, 0, couple)


def _features(layer: nn.Module) -> tuple[int, int]:
    """(out, in) features of a linear layer, read off its weight."""
    first, second = layer.get_parameter("weight").shape  # (out, in), or (in, out) of a Conv1D
    return (second, first) if is_transposed(layer) else (first, second)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight as (in, out), as GPT-2's Conv1D does, and not as (out, in)."""
    return not isinstance(layer, nn.Linear) and hasattr(layer, "nf")


def is_linear(layer: nn.Module) -> bool:
    """Whether a module is a linear layer, also a transposed one, that is called and computes what a linear layer does.

    The output layer of `nn.MultiheadAttention` is none: the attention reads its weight itself.
    """
    plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    return (plain and not isinstance(layer, NonDynamicallyQuantizableLinear)) or is_transposed(layer)


def _resize_heads(table: Heads, attention: nn.Module, units: int, form: _Form) -> None:
    heads = units * form.queries
    for names, value in (
        (table.count, heads),
        (table.width, heads * form.head_dim),
        (table.kv_count, units),
        (table.kv_width, units * form.head_dim),
    ):
        for name in names:
            if hasattr(attention, name):
                setattr(attention, name, value)


def _blocks(pattern: str, model: nn.Module) -> list[_Block]:
    """The modules named like `pattern`, in their order.

    The layer is the number that a `*` stands for, or 0. Where a pattern has several, as for the blocks of stages, it is the
    place in that order.
    """
    form = re.compile(re.escape(pattern).replace(r"\*\*", r"(?:[\w.]*\.)?").replace(r"\*", r"(\d+)"))
    matches = [match for path, _ in model.named_modules() if (match := form.fullmatch(path))]
    if form.groups == 0:
        return [_Block(match[0], 0, match[0]) for match in matches]
    return [
        _Block(match[0], place if form.groups > 1 else int(match[1]), match[0][: match.start(form.groups)].rstrip("."))
        for place, match in enumerate(matches)
    ]


def _has(model: nn.Module, path: str, *names: str) -> bool:
    modules = dict(model.get_submodule(path).named_modules())
    return all(name in modules for name in names)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if name else path
