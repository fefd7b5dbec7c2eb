"""Gradual pruning: N_p steps, each scoring the model as pruned so far (paper, sec. 3.1.2)."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from recap_cli.core.axes import Axis, UnitMask, all_units, compose, counts, shapes_of, shrink, unit_params
from recap_cli.core.importance import Scores
from recap_cli.core.ranking import Limits, select
from recap_cli.core.surgery import cut_model, indices


def shares_left(ratio: float, steps: int) -> list[float]:
    """The share of the prunable parameters that each of N_p `steps` leaves: `v_p^i` with `1 − v_p^{N_p} = r_p`, the `ratio`.

    They are shares of the original sizes, so rounding never adds up. There is no step for a ratio of 0.
    """
    return [(1.0 - ratio) ** (step / steps) for step in range(1, steps + 1)] if ratio else []


def prune(
    model: nn.Module,
    axes: Sequence[Axis],
    *,
    score: Callable[[nn.Module, Sequence[Axis], UnitMask], Scores],
    resize: Callable[[nn.Module, dict[str, int]], None],
    keep_shares: Sequence[float],
    limits: Limits,
) -> UnitMask:
    """Cut `model` in place, a step for each of `keep_shares`.

    Args:
        model: is cut, on the CPU.
        axes: what is cut of it.
        score: the importance of the model's groups, given the model and the axes as cut so far, and the plan so far.
        resize: makes the counts that the model keeps as attributes agree with its sizes, axis name → units.
        keep_shares: what each step leaves of the prunable parameters, counted from the original sizes (`shares_left`).
        limits: what every plan respects; the sizes are rounded (`round_to`) in the last step only.

    Returns:
        The plan: for each axis name a bool tensor over its units, shape (size,), True being kept.
    """
    original = {axis.name: axis.size for axis in axes}
    plan = all_units(axes)
    for step, keep_share in enumerate(keep_shares, 1):
        shapes = shapes_of(model.named_parameters())
        kept = select(
            axes,
            score(model, axes, plan),
            {axis.name: unit_params(axis, shapes) for axis in axes},
            original=original,
            keep_share=keep_share,
            limits=limits if step == len(keep_shares) else replace(limits, round_to=1),
        )
        cut_model(model, indices(axes, kept, shapes))
        resize(model, counts(kept))
        axes, plan = shrink(axes, kept), compose(plan, kept)  # the plan stays (original size,) by axis
    return plan
