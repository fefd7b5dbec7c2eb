"""Gradual pruning: N_p steps, each scoring the model as pruned so far (paper, sec. 3.1.2)."""

from collections.abc import Callable, Sequence

from torch import nn

from recap_cli.core.axes import Axis, UnitMask, compose, counts, everything, shapes_of, shrink, unit_params
from recap_cli.core.importance import Scores
from recap_cli.core.ranking import Scope, select
from recap_cli.core.surgery import cut_model, indices


def prune(
    model: nn.Module,
    axes: Sequence[Axis],
    *,
    score: Callable[[nn.Module, Sequence[Axis], UnitMask], Scores],
    resize: Callable[[nn.Module, dict[str, int]], None],
    ratio: float,
    steps: int,
    scope: Scope,
    floor: float,
    uniform: bool,
    round_to: int,
) -> UnitMask:
    """Cut `model` in place to a share `1 − ratio` of its prunable parameters; return the plan, over the units of `axes`.

    Step i of N_p leaves a share `v_p^i` with `1 − v_p^{N_p} = r_p`, counted from the original sizes, so rounding never adds up.
    A ratio of 0 changes nothing and scores nothing. `score` is given the model and the axes as cut so far, and the plan so far.
    """
    original = {axis.name: axis.size for axis in axes}
    plan = everything(axes)
    if ratio == 0.0:
        return plan
    for step in range(1, steps + 1):
        shapes = shapes_of(model.named_parameters())
        kept = select(
            axes,
            score(model, axes, plan),
            {axis.name: unit_params(axis, shapes) for axis in axes},
            original=original,
            keep_share=(1.0 - ratio) ** (step / steps),
            scope=scope,
            floor=floor,
            uniform=uniform,
            round_to=round_to if step == steps else 1,
        )
        cut_model(model, indices(axes, kept, shapes))
        resize(model, counts(kept))
        axes, plan = shrink(axes, kept), compose(plan, kept)
    return plan
