"""Gradual pruning: N_p steps, each scoring the model as pruned so far (paper, sec. 3.1.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from recap_cli.core.axes import Axis, UnitMask, all_units, compose, counts, shapes_of, shrink, unit_params
from recap_cli.core.importance import Scores
from recap_cli.core.ranking import Limits, select
from recap_cli.core.surgery import IndexMap, cut_model, gather, indices


def shares_left(ratio: float, steps: int) -> list[float]:
    """The share of the prunable parameters that each of N_p `steps` leaves: `v_p^i` with `1 − v_p^{N_p} = r_p`, the `ratio`.

    They are shares of the original sizes, so rounding never adds up. There is no step for a ratio of 0.
    """
    return [(1.0 - ratio) ** (step / steps) for step in range(1, steps + 1)] if ratio else []


def nothing(model: nn.Module, axes: Sequence[Axis], index_map: IndexMap) -> dict[str, Tensor]:
    """What is absorbed of a cut that is not compensated."""
    return {}


@dataclass(frozen=True)
class Step:
    """What is done with a model in each gradual step.

    Attributes:
        score: the importance of the model's groups, given the model and the axes as cut so far, and the plan so far.
        resize: makes the counts that the model keeps as attributes agree with its sizes, axis name → units.
        absorb: what weights make up for of the cut that is about to be made, given the model and the axes as cut so far, and
            what the cut keeps: parameter → change, in the shapes after the cut. The next step scores the model that has it.
    """

    score: Callable[[nn.Module, Sequence[Axis], UnitMask], Scores]
    resize: Callable[[nn.Module, dict[str, int]], None]
    absorb: Callable[[nn.Module, Sequence[Axis], IndexMap], dict[str, Tensor]] = nothing


def prune(
    model: nn.Module, axes: Sequence[Axis], step: Step, *, keep_shares: Sequence[float], limits: Limits
) -> tuple[UnitMask, dict[str, Tensor]]:
    """Cut `model` in place, a step for each of `keep_shares`.

    Args:
        model: is cut, on the CPU, and has what it absorbs.
        axes: what is cut of it.
        step: what is done with it each time.
        keep_shares: what each step leaves of the prunable parameters, counted from the original sizes (`shares_left`).
        limits: what every plan respects; the sizes are rounded (`round_to`) in the last step only.

    Returns:
        The plan: for each axis name a bool tensor over its units, shape (size,), True being kept. And what all steps have
        absorbed: parameter → change, fp32, in the shapes of the cut model.
    """
    original = {axis.name: axis.size for axis in axes}
    plan, absorbed = all_units(axes), dict[str, Tensor]()
    for number, keep_share in enumerate(keep_shares, 1):
        shapes = shapes_of(model.named_parameters())
        kept = select(
            axes,
            step.score(model, axes, plan),
            {axis.name: unit_params(axis, shapes) for axis in axes},
            original=original,
            keep_share=keep_share,
            limits=limits if number == len(keep_shares) else replace(limits, round_to=1),
        )
        index_map = indices(axes, kept, shapes)
        change = step.absorb(model, axes, index_map)
        cut_model(model, index_map)
        step.resize(model, counts(kept))
        _add(model, change)
        absorbed = gather(absorbed, index_map)
        absorbed |= {name: absorbed[name] + tensor if name in absorbed else tensor for name, tensor in change.items()}
        axes, plan = shrink(axes, kept), compose(plan, kept)  # the plan stays (original size,) by axis
    return plan, absorbed


def _add(model: nn.Module, change: dict[str, Tensor]) -> None:
    """Change parameters, which may share their memory with the full model's: out of place."""
    for name, tensor in change.items():
        param = model.get_parameter(name)
        param.data = torch.add(param.data, tensor.to(param.dtype))
