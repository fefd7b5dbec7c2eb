"""Which groups scores choose by the scope and the limits of a recipe: for a plan, and for a training that learns scores."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from recap_cli.core.axes import Axis, Shape, UnitMask, unit_params
from recap_cli.core.ranking import Limits, select
from recap_cli.recipe.recipe import Recipe


def choose(
    recipe: Recipe, axes: Sequence[Axis], shapes: Mapping[str, Shape], scores: Mapping[str, Tensor], keep_share: float
) -> UnitMask:
    """The groups of the highest scores that hold a share of the prunable parameters, by the recipe's scope and limits."""
    return select(
        axes,
        scores,
        {axis.name: unit_params(axis, shapes) for axis in axes},
        original={axis.name: axis.size for axis in axes},
        keep_share=keep_share,
        limits=limits_of(recipe),
    )


def limits_of(recipe: Recipe) -> Limits:
    """What a plan must respect, whatever its ratio."""
    return Limits(
        scope=recipe.prune.scope,
        rank_by=recipe.prune.rank_by,
        floor=recipe.prune.floor,
        uniform=recipe.prune.uniform,
        round_to=recipe.prune.round_to,
    )
