"""Optimizer states between the rounds, in full-model coordinates (paper, sec. 3.3, eq. (5) and (6)).

They are kept as one dictionary of tensors: `PARAM/MOMENT`, shape of the parameter, and `PARAM/count`, int32, how many steps
its entries have taken: one per unit of length along the dimension that the parameter is cut along, or of which only some
rows move, or shape (1,) if it is neither. A parameter that has never moved is not in it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from recap_cli.core.axes import Shape
from recap_cli.core.surgery import IndexMap, put, take
from recap_cli.trainable.optim import Moments

COUNT = "count"


def take_moments(stored: Mapping[str, Tensor], index_map: IndexMap) -> tuple[dict[str, Moments], dict[str, Tensor]]:
    """The moments and the counts of the entries at `index_map`, by parameter name; whole where it does not name one."""
    moments: dict[str, Moments] = {}
    counts: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        name, _, moment = key.rpartition("/")
        dims = index_map.get(name, {})
        if moment == COUNT:
            counts[name] = tensor if tensor.numel() == 1 else tensor[next(iter(dims.values()), slice(None))]
        else:
            moments.setdefault(name, {})[moment] = take(tensor, dims)
    return moments, counts


def put_moments(
    stored: Mapping[str, Tensor],
    tuned: Mapping[str, Moments],
    counts: Mapping[str, Tensor],
    index_map: IndexMap,
    *,
    shapes: Mapping[str, Shape],
    along: Mapping[str, int],
    idle_decay: Mapping[str, float],
) -> dict[str, Tensor]:
    """The moments after a round, eq. (5): those of entries that moved are written back, all others age once.

    `tuned` and `counts` are compact, at `index_map` in tensors of `shapes`; `along` names the dimension that a parameter is cut
    along, or of which some rows move; `aging` the factor of each moment. Counts do not age: they say how many steps an entry
    has taken part in.
    """
    # Multiplied out of place: stored moments are mapped files, and writing to them page by page took 2 to 5 times as long.
    aged = {COUNT: 1, **idle_decay}
    after = {key: tensor * aged[key.rpartition("/")[2]] for key, tensor in stored.items()}
    for name, moments in tuned.items():
        dims = index_map.get(name, {})
        for moment, tensor in moments.items():
            full = after.setdefault(f"{name}/{moment}", torch.zeros(shapes[name]))
            put(full, tensor, dims)
        length = shapes[name][along[name]] if name in along else 1
        before = after.get(f"{name}/{COUNT}", torch.zeros(1, dtype=torch.int32))
        full = after[f"{name}/{COUNT}"] = before.expand(length).clone()  # of one number, if the whole has moved until now
        index = next(iter(dims.values()), torch.arange(length))
        full[index] = counts[name].expand(len(index)).to(torch.int32)
    return after
