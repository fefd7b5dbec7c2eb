"""Optimizer states between the rounds, in full-model coordinates (paper, sec. 3.3, eq. (5) and (6)).

They are kept as one dictionary of tensors. `PARAM/MOMENT` has the shape of the parameter. `PARAM/count`, int32, says how many
steps its entries have taken: one number per index along the dimension that the parameter is cut along, or of which only some
rows are trainable, and shape (1,) for any other. A parameter that was never trained is not in it.
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
    moments, counts = by_parameter(stored)
    for name, full in moments.items():
        moments[name] = {moment: take(tensor, index_map.get(name, {})) for moment, tensor in full.items()}
    for name, count in counts.items():
        if count.numel() > 1:
            counts[name] = count[next(iter(index_map.get(name, {}).values()), slice(None))]  # (rows,) or (columns,)
    return moments, counts


def by_parameter(stored: Mapping[str, Tensor]) -> tuple[dict[str, Moments], dict[str, Tensor]]:
    """The moments, by parameter and moment name, and the counts, by parameter, of a dictionary as a state keeps it."""
    moments: dict[str, Moments] = {}
    counts: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        name, _, moment = key.rpartition("/")
        if moment == COUNT:
            counts[name] = tensor
        else:
            moments.setdefault(name, {})[moment] = tensor
    return moments, counts


def put_moments(
    stored: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    index_map: IndexMap,
    *,
    shapes: Mapping[str, Shape],
    along: Mapping[str, int],
    idle_decay: Mapping[str, float],
) -> dict[str, Tensor]:
    """The moments after a round, eq. (5): those of trained entries are written back, all others decay once.

    Counts do not decay: they say how many steps an entry has taken part in.

    Args:
        stored: moments and counts before the round, `PARAM/MOMENT` and `PARAM/count`, of the full model.
        tuned: those of the trained entries after it, under the same names, compact.
        index_map: where the trained entries stand in the full tensors; what it does not name was trained whole.
        shapes: the full tensors' shapes.
        along: the dimension that a parameter is cut along, or of which some rows are trainable.
        idle_decay: the factor of each moment.

    Returns:
        What `stored` is after the round.
    """
    tuned_moments, counts = by_parameter(tuned)
    # Multiplied out of place: stored moments are mapped files, and writing to them page by page took 2 to 5 times as long.
    aged = {COUNT: 1, **idle_decay}
    after = {key: tensor * aged[key.rpartition("/")[2]] for key, tensor in stored.items()}
    for name, moments in tuned_moments.items():
        dims = index_map.get(name, {})
        for moment, tensor in moments.items():
            full = after.setdefault(f"{name}/{moment}", torch.zeros(shapes[name]))
            put(full, tensor, dims)
        length = shapes[name][along[name]] if name in along else 1
        before = after.get(f"{name}/{COUNT}", torch.zeros(1, dtype=torch.int32))
        full = after[f"{name}/{COUNT}"] = before.expand(length).clone()  # (length,); of one number, if it was trained whole
        index = next(iter(dims.values()), torch.arange(length))
        full[index] = counts[name].expand(len(index)).to(torch.int32)  # (rows,) or (columns,)
    return after
