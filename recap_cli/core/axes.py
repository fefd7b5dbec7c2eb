"""Groups of coupled weights: what an axis, a cut, a plan and a mask are (paper, sec. 3.1.1 and 3.2.1).

An *axis* is one prunable dimension that several tensors share, for instance the 12 heads of layer 3. Where it meets a
parameter it leaves a *cut*. A *group* is one unit of an axis with all of its coupled weights. A plan (which groups stay)
and a mask (which groups are trainable) are both a `UnitMask`: for each axis name, one boolean per unit.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
        width: entries per unit; for query, key and value the width of a head.
        offset: where the first unit begins, as in a matrix that holds query, key and value one after another.
    """

    param: str
    dim: int
    width: int = 1
    offset: int = 0


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


def refine(axis: Axis) -> Axis:
    """The fine groups of the mask (paper, sec. 3.2.1): one unit per hidden dimension.

    Dimension i of head h couples row `h·head_dim + i` of the query, key and value and the same column of the output matrix; a
    neuron is as fine as it gets.

    Raises:
        ValueError: the cuts differ in width, and no such dimension exists.
    """
    widths = {cut.width for cut in axis.cuts}
    if len(widths) != 1:
        raise ValueError(f"{axis.name}: cuts of widths {sorted(widths)} share no hidden dimension")
    (width,) = widths
    return replace(axis, size=axis.size * width, cuts=tuple(replace(cut, width=1) for cut in axis.cuts))


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

    Each cut must exist and fit, no entry may belong to two groups, and no parameter may be cut along two dimensions.
    """
    problems = [f"{axis.name}: {problem}" for axis in axes for cut in axis.cuts if (problem := _misfit(axis, cut, shapes))]
    if problems:
        return problems
    for (param, dim), owners in _cuts_by_dim(axes).items():
        ends = sorted((cut.offset, cut.offset + axis.size * cut.width, axis.name) for axis, cut in owners)
        for (_, end, first), (start, _, second) in pairwise(ends):
            if start < end:
                problems.append(f"{first} and {second} both own entries of {param} along dimension {dim}")
    dims: dict[str, set[int]] = defaultdict(set)
    for param, dim in _cuts_by_dim(axes):
        dims[param].add(dim)
    problems += [f"{param} is cut along two dimensions" for param, along in dims.items() if len(along) > 1]
    names = [axis.name for axis in axes]
    problems += [f"two axes are named {name}" for name in sorted({n for n in names if names.count(n) > 1})]
    return problems


def _misfit(axis: Axis, cut: Cut, shapes: Mapping[str, Shape]) -> str | None:
    shape = shapes.get(cut.param)
    if shape is None:
        return f"there is no parameter {cut.param}"
    if not 0 <= cut.dim < len(shape):
        return f"{cut.param} of shape {shape} has no dimension {cut.dim}"
    end = cut.offset + axis.size * cut.width
    if cut.width < 1 or cut.offset < 0 or end > shape[cut.dim]:
        return f"{cut.param} has {shape[cut.dim]} entries along dimension {cut.dim}, the axis wants {cut.offset}…{end}"
    return None


def _cuts_by_dim(axes: Iterable[Axis]) -> dict[tuple[str, int], list[tuple[Axis, Cut]]]:
    found: dict[tuple[str, int], list[tuple[Axis, Cut]]] = defaultdict(list)
    for axis in axes:
        for cut in axis.cuts:
            found[cut.param, cut.dim].append((axis, cut))
    return found
