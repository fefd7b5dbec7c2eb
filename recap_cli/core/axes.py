"""Groups of coupled weights: what an axis, a cut, a plan and a mask are (paper, sec. 3.1.1 and 3.2.1).

An *axis* is one prunable dimension that several tensors share, for instance the 12 heads of layer 3. Where it meets a
parameter it leaves a *cut*. A *group* is one unit of an axis with all of its coupled weights. A plan (which groups stay)
and a mask (which groups are trainable) are both a `UnitMask`: for each axis name, one boolean per unit.

A plan has the axes of pruning. A mask cuts nothing, so it has axes of its own (`mask_axes`): their units are hidden
dimensions, and they leave out parameters that are trained or frozen whole.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

USUAL = ("heads", "neurons")  # the kinds that the tables of an adapter give; its own functions may give any
Shape = tuple[int, ...]
UnitMask = dict[str, Tensor]  # axis name → bool tensor, shape (axis.size,)


@dataclass(frozen=True)
class Cut:
    """Where an axis meets one parameter: unit i owns `offset + i·width … offset + (i+1)·width − 1` along `dim`.

    Attributes:
        param: the parameter's name.
        dim: the dimension that is cut.
        width: entries per unit; for query, key and value the width of a head. It may differ between the cuts of an axis: of
            grouped queries a unit owns several query heads, and one head of key and value.
        offset: where the first unit begins, as in a matrix that holds query, key and value one after another.
        couple: a word; the cuts of an axis that have the same one share the units of the mask. Where no word is given, those
            of the same width do.
    """

    param: str
    dim: int
    width: int = 1
    offset: int = 0
    couple: str = ""


@dataclass(frozen=True)
class Axis:
    """One prunable dimension: `size` units, each of which owns a slice of every cut.

    Attributes:
        name: unlike that of any other axis.
        kind: what the units are, in the plural: `heads`, `neurons`, or any other word.
        layer: the number of the layer.
        size: the number of units.
        cuts: where it meets the parameters.
    """

    name: str
    kind: str
    layer: int
    size: int
    cuts: tuple[Cut, ...]


def kinds_of(axes: Iterable[Axis]) -> list[str]:
    """The kinds there are: heads and neurons first, the others in the order of their first axis."""
    found = dict.fromkeys(axis.kind for axis in axes)
    return sorted(found, key=lambda kind: USUAL.index(kind) if kind in USUAL else len(USUAL))


def kept_per_layer(axes: Sequence[Axis], sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """How many units of each kind there are, heads or neurons or others, in each layer, in the order of the layers."""
    return {kind: [sizes[axis.name] for axis in axes if axis.kind == kind] for kind in kinds_of(axes)}


def dimensions_per_layer(axes: Sequence[Axis], sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """As `kept_per_layer`, for axes of a mask; under `KIND/COUPLE` those that are not coupled to the first of their axis."""
    found: dict[str, list[int]] = {}
    for kind in kinds_of(axes):
        for axis in axes:
            if axis.kind == kind:
                word = axis.cuts[0].couple
                found.setdefault(f"{kind}/{word}" if word else kind, []).append(sizes[axis.name])
    return found


def shapes_of(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, Shape]:
    """The shape of each named tensor."""
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    return {name: tuple(tensor.shape) for name, tensor in items}


def unit_params(axis: Axis, shapes: Mapping[str, Shape]) -> int:
    """How many parameters one unit of `axis` owns over all of its cuts."""
    return sum(cut.width * prod(shapes[cut.param]) // shapes[cut.param][cut.dim] for cut in axis.cuts)


def prunable_params(axes: Iterable[Axis], shapes: Mapping[str, Shape]) -> int:
    """How many parameters belong to some group: what the ratios r_p and r_f are shares of."""
    return sum(axis.size * unit_params(axis, shapes) for axis in axes)


def chosen_params(axes: Iterable[Axis], shapes: Mapping[str, Shape], unit_mask: UnitMask) -> int:
    """How many parameters belong to the chosen groups."""
    return sum(int(unit_mask[axis.name].sum()) * unit_params(axis, shapes) for axis in axes)


def all_units(axes: Iterable[Axis]) -> UnitMask:
    """A plan or mask of every group: nothing pruned, or nothing frozen."""
    return {axis.name: torch.ones(axis.size, dtype=torch.bool) for axis in axes}  # (axis.size,)


def counts(unit_mask: UnitMask) -> dict[str, int]:
    """How many units of each axis are chosen."""
    return {name: int(chosen.sum()) for name, chosen in unit_mask.items()}


def mask_axes(axes: Iterable[Axis], whole: Collection[str] = ()) -> list[Axis]:
    """The axes of the mask (paper, sec. 3.2.1): one unit per hidden dimension, for the cuts that are coupled.

    Dimension i of head h couples row `h·head_dim + i` of the query, key and value and the same column of the output matrix; a
    neuron is as fine as it gets. Cuts of another width, or with a word of their own (`Cut.couple`), share no hidden dimension
    with these: they are an axis by themselves, named `AXIS/WORD` or `AXIS/WIDTH-wide`.

    Args:
        axes: those of pruning.
        whole: parameters that are trained or frozen whole; no unit owns any of their entries.

    Returns:
        The axes, in the order of `axes` and of their cuts. Every cut has width 1, and says the word that is in its axis' name.
    """
    return [
        replace(
            axis,
            name=_mask_name(axis, word),
            size=axis.size * cuts[0].width,
            cuts=tuple(replace(cut, width=1, couple=word) for cut in cuts),
        )
        for axis in axes
        for word, cuts in _coupled(axis, whole).items()
    ]


def in_mask_units(axes: Iterable[Axis], plan: UnitMask, whole: Collection[str] = ()) -> UnitMask:
    """A plan said in units of the mask: which hidden dimensions the groups that stay have, by the names of `mask_axes`."""
    return {
        _mask_name(axis, word): plan[axis.name].repeat_interleave(cuts[0].width)  # (size · width,)
        for axis in axes
        for word, cuts in _coupled(axis, whole).items()
    }


def _coupled(axis: Axis, whole: Collection[str] = ()) -> dict[str, list[Cut]]:
    """The cuts of an axis that share units of the mask, by their word; it is empty for those that are coupled by default."""
    cuts = [cut for cut in axis.cuts if cut.param not in whole]
    default_width = next((cut.width for cut in cuts if not cut.couple), None)
    found: dict[str, list[Cut]] = {}
    for cut in cuts:
        found.setdefault(cut.couple or ("" if cut.width == default_width else f"{cut.width}-wide"), []).append(cut)
    return found


def _mask_name(axis: Axis, word: str) -> str:
    return f"{axis.name}/{word}" if word else axis.name


def shrink(axes: Sequence[Axis], plan: UnitMask) -> list[Axis]:
    """The axes of the small model that `plan` leaves: fewer units, and offsets moved up by what was cut before them."""
    removed = {axis.name: axis.size - int(plan[axis.name].sum()) for axis in axes}
    cuts_of = _cuts_by_dim(axes)

    def shifted(cut: Cut) -> Cut:
        before = sum(removed[a.name] * c.width for a, c in cuts_of[cut.param, cut.dim] if c.offset < cut.offset)
        return replace(cut, offset=cut.offset - before)

    return [replace(axis, size=axis.size - removed[axis.name], cuts=tuple(shifted(cut) for cut in axis.cuts)) for axis in axes]


def compose(outer: UnitMask, inner: UnitMask) -> UnitMask:
    """One plan for two prune steps: `inner` chooses among the units that `outer` kept."""
    composed: UnitMask = {}
    for name, kept in outer.items():
        both = kept.clone()  # (units before both steps,)
        both[kept] = inner[name]  # (units that `outer` kept,)
        composed[name] = both
    return composed


def check_axes(axes: Sequence[Axis], shapes: Mapping[str, Shape]) -> list[str]:
    """Every way in which `axes` do not fit tensors of these `shapes`; an empty list if they do.

    Each cut must exist and fit, no entry may belong to two groups, no parameter may be cut along two dimensions, and cuts that
    are coupled must have the same width.
    """
    problems = [f"{axis.name}: it has no units, or no cuts" for axis in axes if not _is_count(axis.size, 1) or not axis.cuts]
    problems = problems or [
        f"{axis.name}: {problem}" for axis in axes for cut in axis.cuts if (problem := _misfit(axis, cut, shapes))
    ]
    if problems:
        return problems
    for axis in axes:
        for word, cuts in _coupled(axis).items():
            if len(widths := {cut.width for cut in cuts}) > 1:
                problems.append(
                    f"{axis.name}: the cuts of {word!r} have widths {sorted(widths)}, and share no hidden dimension"
                )
    for (param, dim), owners in _cuts_by_dim(axes).items():
        ends = sorted((cut.offset, cut.offset + axis.size * cut.width, axis.name) for axis, cut in owners)
        for (_, end, first), (start, _, second) in pairwise(ends):
            if start < end:
                problems.append(f"{first} and {second} both own entries of {param} along dimension {dim}")
    dims: dict[str, set[int]] = defaultdict(set)
    for param, dim in _cuts_by_dim(axes):
        dims[param].add(dim)
    problems += [f"{param} is cut along two dimensions" for param, along in dims.items() if len(along) > 1]
    names = [name for axis in axes for name in {axis.name, *(_mask_name(axis, word) for word in _coupled(axis))}]
    problems += [f"two axes are named {name}" for name in sorted({n for n in names if names.count(n) > 1})]
    return problems


def _misfit(axis: Axis, cut: Cut, shapes: Mapping[str, Shape]) -> str | None:
    shape = shapes.get(cut.param)
    if shape is None:
        return f"there is no parameter {cut.param}"
    if not _is_count(cut.dim, 0) or cut.dim >= len(shape):
        return f"{cut.param} of shape {shape} has no dimension {cut.dim}"
    if not _is_count(cut.width, 1) or not _is_count(cut.offset, 0):
        return f"the cut of {cut.param} has width {cut.width} and offset {cut.offset}"
    end = cut.offset + axis.size * cut.width
    if end > shape[cut.dim]:
        return f"{cut.param} has {shape[cut.dim]} entries along dimension {cut.dim}, the axis wants {cut.offset}…{end}"
    return None


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and value >= least


def _cuts_by_dim(axes: Iterable[Axis]) -> dict[tuple[str, int], list[tuple[Axis, Cut]]]:
    found: dict[tuple[str, int], list[tuple[Axis, Cut]]] = defaultdict(list)
    for axis in axes:
        for cut in axis.cuts:
            found[cut.param, cut.dim].append((axis, cut))
    return found
