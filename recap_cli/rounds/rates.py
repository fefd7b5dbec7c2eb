"""The peak learning rate of a round: the recipe's, or what `auto` stands for."""

from typing import TYPE_CHECKING

from recap_cli.core.method import RoundPlan
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.plans import for_teacher, method_of, teaches

if TYPE_CHECKING:  # so that `recap status` says rates without torch
    from recap_cli.rounds.layout import Layout

WIDTH = 384  # of the widest model that the rates of our methods were fitted on


def peak_lr(recipe: Recipe, layout: "Layout", round_plan: RoundPlan) -> float:
    """The peak learning rate of a round, the recipe's `finetune.lr`, or `distill.teacher_lr` of its teacher.

    `auto` is the rate of the method (`Method.lr`). A model wider than `WIDTH` has less in proportion, as AdamW wants of its
    hidden matrices (µP, 2203.03466).

    Args:
        recipe: of the run.
        layout: of the full model.
        round_plan: of the round.

    Raises:
        PluginError: there is no such method.
    """
    is_teacher = teaches(round_plan)
    given = recipe.distill.teacher_lr if is_teacher else recipe.finetune.lr
    if given != "auto":
        return given
    method = method_of(for_teacher(recipe) if is_teacher else recipe)
    return method.lr * min(1.0, WIDTH / width_of(layout))


def width_of(layout: "Layout") -> int:
    """The hidden size of a model, of its widest stage: how long the rows are that the first matrix of an axis cuts."""
    firsts = (next((cut for cut in axis.cuts if len(layout.shapes[cut.param]) == 2), None) for axis in layout.axes)
    return max((layout.shapes[cut.param][1 - cut.dim] for cut in firsts if cut is not None), default=WIDTH)
