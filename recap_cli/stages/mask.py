"""`mask`: choose which fine groups of the small model may move (paper, sec. 3.2.1)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from recap_cli.core.axes import (
    Axis,
    Shape,
    UnitMask,
    chosen_params,
    counts,
    kept_per_layer,
    prunable_params,
    shapes_of,
    unit_params,
)
from recap_cli.core.importance import Scores, group_scores
from recap_cli.core.ranking import Limits, select
from recap_cli.data.sampling import generator_for, seed_for
from recap_cli.machine import devices
from recap_cli.progress import Track, silent
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.device_policy import importance_batch_size, on_device
from recap_cli.rounds.importance import draw, load_criterion, losses_over
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.record import MASK
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.small_model import fine_axes
from recap_cli.rounds.status import check_rounds
from recap_cli.rounds.stored import as_bytes
from recap_cli.rounds.threads import on_fitting_threads
from recap_cli.state.store import State


@on_fitting_threads
def mask(state: State, *, track: Track = silent) -> dict[str, Any]:
    """Write the update mask of this round, return how much may move.

    Raises `StageOrderError` if another stage is next.
    """
    context = Context(state)
    with state.writing("mask") as transaction:
        check_rounds(context.recipe, state)
        recipe, folder, round_plan = (
            context.recipe,
            f"round-{transaction.round:03d}",
            context.round_plans[transaction.round - 1],
        )
        plan = context.plan(folder)
        tensors = context.small(folder, plan)
        shapes = shapes_of(tensors)
        axes = fine_axes(context.layout, plan)
        model = context.model(tensors, counts(plan))
        torch.manual_seed(seed_for(recipe.seed, transaction.round, "mask"))
        if round_plan.trains != "mask" or round_plan.mask_ratio == 0.0:
            chosen = {axis.name: torch.full((axis.size,), round_plan.trains != "head") for axis in axes}
        else:
            train, _ = context.splits(track)
            device = devices.pick(recipe.importance.device)
            losses = losses_over(
                forward_of(context.spec, model),
                train,
                draw(recipe, train, transaction.round, "mask"),
                batch_size=importance_batch_size(recipe, device),
                device=device,
                track=track,
                label="importance for the mask",
            )
            criterion = load_criterion(recipe.mask.criterion)
            with on_device(model, axes, device, context.spec.model_type):
                scores = group_scores(model, axes, criterion, losses, named=recipe.mask.criterion)
            chosen = _chosen(recipe, axes, shapes, scores, 1.0 - round_plan.mask_ratio, transaction.round)
        transaction.save_tensors(f"{folder}/{MASK}", as_bytes(chosen))
        transaction.facts |= {"trains": round_plan.trains, "mask_ratio": round_plan.mask_ratio}
        if round_plan.trains != "training":  # which says itself what it trains
            trainable_entries, prunable = chosen_params(axes, shapes, chosen), prunable_params(axes, shapes)
            transaction.facts |= {
                "moving_prunable": trainable_entries,
                "trainable_share_of_prunable": trainable_entries / prunable,
                "moving_dimensions": kept_per_layer(axes, counts(chosen)),
            }
    return state.manifest.history[-1]


def _chosen(
    recipe: Recipe, axes: Sequence[Axis], shapes: Mapping[str, Shape], scores: Scores, share: float, round: int
) -> UnitMask:
    """The fine groups of the highest scores that hold a `share` of the prunable parameters, of which `mask.random` is drawn."""
    params = {axis.name: unit_params(axis, shapes) for axis in axes}
    original = {axis.name: axis.size for axis in axes}
    scope, random = recipe.mask.scope, recipe.mask.random
    choose = partial(select, axes, unit_params=params, original=original, limits=Limits(scope=scope, least=0))
    best = choose(scores, keep_share=share * (1.0 - random))
    if random == 0.0:
        return best
    generator = generator_for(recipe.seed, round, "mask at random")
    drawn = {name: kept + torch.rand(len(kept), generator=generator) for name, kept in best.items()}  # those kept are above 1
    if scope == "global":  # which ranks by score per parameter
        drawn = {name: score * params[name] for name, score in drawn.items()}
    return choose(drawn, keep_share=share)
