"""The order of the neurons of a small model: the trainable ones stand first, and are one piece of each matrix."""

from collections.abc import Iterable

import torch
from torch import nn

from recap_cli.core.axes import Axis, UnitMask
from recap_cli.core.surgery import IndexMap


def bring_forward(model: nn.Module, axes: Iterable[Axis], mask: UnitMask, index_map: IndexMap) -> IndexMap:
    """Permute the neurons of each feedforward block, in place, so that the trainable ones come first.

    The block computes the same function, as its neurons have no order, and all that they own is permuted. The chosen ones keep
    their order among themselves, so a compact tensor means the same entries before and after. Neurons stay in their order where
    the mask's units are others than theirs.

    Args:
        model: is changed.
        axes: those of pruning; neurons are permuted.
        mask: which units of the mask are trainable.
        index_map: where their entries stand in the model as it was.

    Returns:
        Where they stand now.
    """
    permuted: IndexMap = dict(index_map)
    params = dict(model.named_parameters())
    for axis in axes:
        chosen = mask.get(axis.name)
        if axis.kind != "neurons" or chosen is None or chosen.all() or not chosen.any():
            continue
        if not all(cut.width == 1 and not cut.couple and cut.param in index_map for cut in axis.cuts):
            continue
        order = torch.cat([chosen.nonzero().flatten(), (~chosen).nonzero().flatten()])  # (axis.size,)
        for name, dim in {(cut.param, cut.dim) for cut in axis.cuts}:
            param = params[name]
            whole = torch.arange(param.shape[dim])
            for cut in axis.cuts:
                if cut.param == name:  # several where one matrix holds gate and value
                    whole[cut.offset : cut.offset + axis.size] = order + cut.offset
            with torch.no_grad():
                param.copy_(param.index_select(dim, whole))
            permuted[name] = {dim: torch.isin(whole, permuted[name][dim]).nonzero().flatten()}
    return permuted
