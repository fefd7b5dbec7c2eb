"""Which fine groups of the small model a round trains (paper, sec. 3.2.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from recap_cli.core.axes import (
    Axis,
    Shape,
    UnitMask,
    chosen_params,
    counts,
    dimensions_per_layer,
    prunable_params,
    shapes_of,
    unit_params,
)
from recap_cli.core.importance import Scores
from recap_cli.core.ranking import Limits, select
from recap_cli.data.sampling import generator_for, seed_for
from recap_cli.progress import Track
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.importance import draw_sample, score_units
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.small_model import fine_axes


def choose_mask(context: Context, number: int, plan: UnitMask, track: Track) -> UnitMask:
    """The fine groups of the small model of round `number` that are trainable, by their importance on D_s."""
    recipe, round_plan, tensors = context.recipe, context.round_plans[number - 1], context.small(f"round-{number:03d}", plan)
    axes, shapes, model = fine_axes(context.layout, plan), shapes_of(tensors), context.model(tensors, counts(plan))
    torch.manual_seed(seed_for(recipe.seed, number, "mask"))
    if round_plan.trains != "mask" or round_plan.mask_ratio == 0.0:
        return {axis.name: torch.full((axis.size,), round_plan.trains != "head") for axis in axes}
    train, _ = context.splits(track)
    sample = draw_sample(recipe, train, number, "mask", "importance for the mask")
    scores = score_units(context, model, axes, recipe.mask.criterion, sample, track)
    return choose_fine_units(recipe, axes, shapes, scores, 1.0 - round_plan.mask_ratio, number)


def choose_fine_units(
    recipe: Recipe, axes: Sequence[Axis], shapes: Mapping[str, Shape], scores: Scores, share: float, round: int
) -> UnitMask:
    """The fine groups of the highest scores that hold a `share` of the prunable parameters, of which a share
    `mask.random` is drawn."""
    params = {axis.name: unit_params(axis, shapes) for axis in axes}
    original = {axis.name: axis.size for axis in axes}
    random, limits = recipe.mask.random, Limits(scope=recipe.mask.scope, rank_by=recipe.mask.rank_by, least=0)
    choose = partial(select, axes, unit_params=params, original=original)
    best = choose(scores, keep_share=share * (1.0 - random), limits=limits)
    if random == 0.0:
        return best
    generator = generator_for(recipe.seed, round, "mask at random")
    drawn = {name: kept + torch.rand(len(kept), generator=generator) for name, kept in best.items()}  # those kept are above 1
    if limits.scope == "global":  # which ranks by score per parameter
        drawn = {name: score * params[name] for name, score in drawn.items()}
    return choose(drawn, keep_share=share, limits=replace(limits, rank_by="sum"))


def mask_facts(context: Context, number: int, plan: UnitMask, mask: UnitMask) -> dict[str, Any]:
    """What a round notes of its mask: how much of the small model is trainable."""
    round_plan, axes, shapes = context.round_plans[number - 1], fine_axes(context.layout, plan), context.small_shapes(plan)
    facts = {"trains": round_plan.trains, "mask_ratio": round_plan.mask_ratio}
    if round_plan.trains in ("training", "teacher"):  # which says itself what it trains
        return facts
    trainable, prunable = chosen_params(axes, shapes, mask), prunable_params(axes, shapes)
    return facts | {
        "trainable_prunable": trainable,
        "trainable_share_of_prunable": trainable / prunable,
        "trainable_dimensions": dimensions_per_layer(axes, counts(mask)),
    }
