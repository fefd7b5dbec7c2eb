"""Gather and scatter: prune takes the kept indices out of full tensors, merge writes them back. They are inverses.

The same two functions move weights, moments and masks, between the full model, the small model and its trainable entries.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from recap_cli.core.axes import Axis, Shape, UnitMask
from recap_cli.core.ties import names_of

IndexMap = dict[str, dict[int, Tensor]]  # parameter → dimension → sorted int64 indices; what is not named is whole


def indices(axes: Iterable[Axis], unit_mask: UnitMask, shapes: Mapping[str, Shape]) -> IndexMap:
    """The entries that a plan or mask selects in each cut parameter, together with those that belong to no group.

    Args:
        axes: what `unit_mask` chooses units of.
        unit_mask: for each axis name a bool tensor, (axis.size,).
        shapes: of the parameters that are cut.

    Returns:
        Parameter → dimension → sorted indices, int64, (selected,). A dimension of which all is selected is left out, so that an
        untouched tensor is never copied.
    """
    selected: dict[tuple[str, int], Tensor] = {}
    for axis in axes:
        chosen = unit_mask[axis.name]
        for cut in axis.cuts:
            key = (cut.param, cut.dim)
            along = selected.setdefault(key, torch.ones(shapes[cut.param][cut.dim], dtype=torch.bool))  # (length of dim,)
            along[cut.offset : cut.offset + axis.size * cut.width] = chosen.repeat_interleave(cut.width)  # (size · width,)
    index_map: IndexMap = {}
    for (param, dim), along in selected.items():
        if not along.all():
            index_map.setdefault(param, {})[dim] = along.nonzero().flatten()  # (selected,)
    return index_map


def compose_index_maps(outer: IndexMap, inner: IndexMap) -> IndexMap:
    """Where the entries that `inner` selects in the small tensors stand in the full ones that `outer` selects from."""
    composed: IndexMap = {param: dict(dims) for param, dims in outer.items()}
    for param, dims in inner.items():
        for dim, chosen in dims.items():
            kept = outer.get(param, {}).get(dim)
            composed.setdefault(param, {})[dim] = chosen if kept is None else kept[chosen]  # (selected by both,)
    return composed


def take(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """The entries of one tensor at `dims` (dimension → indices); the tensor itself if `dims` is empty."""
    for dim, chosen in dims.items():
        tensor = tensor.index_select(dim, chosen.to(tensor.device))  # len(chosen) along dim, else as before
    return tensor


def put(full: Tensor, small: Tensor, dims: Mapping[int, Tensor]) -> None:
    """Write `small` into `full` at `dims`, in place; every other entry keeps its bits. The inverse of `take`."""
    if not dims:
        full.copy_(small)
    elif len(dims) == 1:
        ((dim, chosen),) = dims.items()
        full.index_copy_(dim, chosen.to(full.device), small.to(full))
    else:
        grid = [dims.get(dim, torch.arange(size)).to(full.device) for dim, size in enumerate(full.shape)]
        full[torch.meshgrid(*grid, indexing="ij")] = small.to(full)  # shape of small


def gather(tensors: Mapping[str, Tensor], index_map: IndexMap) -> dict[str, Tensor]:
    """The small tensors: the entries of each full tensor that `index_map` names."""
    return {name: take(tensor, index_map.get(name, {})) for name, tensor in tensors.items()}


def scatter(full: Mapping[str, Tensor], small: Mapping[str, Tensor], index_map: IndexMap) -> None:
    """Write the small tensors back into the full ones, in place (the inverse of `gather`)."""
    for name, tensor in small.items():
        put(full[name], tensor, index_map.get(name, {}))


def cut_model(model: nn.Module, index_map: IndexMap) -> None:
    """Physically cut `model` in place: each parameter keeps the entries that `index_map` names, linear layers learn their size.

    A parameter of several names is cut once and stays one; `index_map` has its first.
    """
    called = names_of(model)
    with torch.no_grad():
        for name, dims in index_map.items():
            param = model.get_parameter(name)
            cut = nn.Parameter(take(param.detach(), dims), requires_grad=param.requires_grad)  # (kept rows, kept columns)
            for each in called[name]:
                owner, attribute = owner_of(model, each)
                setattr(owner, attribute, cut)
    state_sizes(model, [each for name in index_map for each in called[name]])


def zero_groups(model: nn.Module, axes: Sequence[Axis], plan: UnitMask) -> None:
    """Set every weight of the groups that `plan` drops to zero, in place: what cutting must be equal to (I1)."""
    params = dict(model.named_parameters())
    with torch.no_grad():
        for axis in axes:
            for cut in axis.cuts:
                gone = torch.zeros(params[cut.param].shape[cut.dim], dtype=torch.bool)  # (length of dim,)
                gone[cut.offset : cut.offset + axis.size * cut.width] = ~plan[axis.name].repeat_interleave(cut.width)
                params[cut.param].index_fill_(cut.dim, gone.nonzero().flatten().to(params[cut.param].device), 0.0)


def state_sizes(model: nn.Module, names: Iterable[str]) -> None:
    """Make the sizes of layers whose weights are named true again.

    They are the `in_features` and `out_features` of a linear layer, the `nx` and `nf` of a Conv1D, and the channels and groups
    of a depthwise convolution, whose forward reads its groups.
    """
    owners = modules_by_name(model)
    for name in names:
        path, _, attribute = name.rpartition(".")
        if attribute != "weight":
            continue
        owner = owners[path]
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape
        elif hasattr(owner, "nf") and hasattr(owner, "nx"):
            nx, nf = owner.get_parameter("weight").shape
            owner.nx, owner.nf = nx, nf  # type: ignore[assignment]
        elif isinstance(owner, _ConvNd) and channels_of(owner) is not None:
            owner.in_channels = owner.out_channels = owner.groups = len(owner.weight)


def channels_of(module: nn.Module) -> int | None:
    """The channels of a depthwise convolution, one filter for each; None of any other module."""
    is_depthwise = isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels
    return len(module.get_parameter("weight")) if is_depthwise else None


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by all of its names: to follow the names of all tensors one by one took ten times as long."""
    return dict(model.named_modules(remove_duplicate=False))


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the tensor `name`, and the attribute it holds it by."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
