"""`mask`: choose which fine groups of the small model may move (paper, sec. 3.2.1)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from recap_cli.core.axes import (
    Axis,
    Choice,
    Shape,
    chosen_params,
    counts,
    kept_per_layer,
    prunable_params,
    shapes_of,
    unit_params,
)
from recap_cli.core.importance import Scores, group_scores
from recap_cli.core.ranking import select
from recap_cli.data.sampling import generator_for, seed_for
from recap_cli.machine import devices
from recap_cli.progress import Track, silent
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import context as shared
from recap_cli.rounds.context import Context
from recap_cli.rounds.small_model import fine_axes
from recap_cli.rounds.threads import on_fitting_threads
from recap_cli.state.store import State


@on_fitting_threads
def mask(state: State, *, track: Track = silent) -> dict[str, Any]:
    """Write the update mask of this round, return how much may move.

    Raises `StageOrderError` if another stage is next.
    """
    here = Context(state)
    with state.writing("mask") as draft:
        shared.check_rounds(here)
        recipe, folder, turn = here.recipe, f"round-{draft.round:03d}", here.turns[draft.round - 1]
        plan = here.plan(folder)
        tensors = here.small(folder, plan)
        shapes = shapes_of(tensors)
        axes = fine_axes(here.layout, plan)
        model = here.model(tensors, counts(plan))
        torch.manual_seed(seed_for(recipe.seed, draft.round, "mask"))
        if turn.moves != "mask" or turn.mask_ratio == 0.0:
            chosen = {axis.name: torch.full((axis.size,), turn.moves != "head") for axis in axes}
        else:
            train, _ = here.splits(track)
            device = devices.pick(recipe.importance.device)
            losses = shared.losses_over(
                shared.forward_of(here.spec, model),
                train,
                shared.draw(recipe, train, draft.round, "mask"),
                batch_size=shared.importance_batch_size(recipe, device),
                device=device,
                track=track,
                label="importance for the mask",
            )
            criterion = shared.load_criterion(recipe.mask.criterion)
            with shared.on_device(model, axes, device, here.spec.model_type):
                scores = group_scores(model, axes, criterion, losses, named=recipe.mask.criterion)
            chosen = _chosen(recipe, axes, shapes, scores, 1.0 - turn.mask_ratio, draft.round)
        draft.save_tensors(f"{folder}/{shared.MASK}", shared.as_bytes(chosen))
        draft.facts |= {"moves": turn.moves, "mask_ratio": turn.mask_ratio}
        if turn.moves != "training":  # which says itself what it trains
            moving, prunable = chosen_params(axes, shapes, chosen), prunable_params(axes, shapes)
            draft.facts |= {
                "moving_prunable": moving,
                "moving_share_of_prunable": moving / prunable,
                "moving_dimensions": kept_per_layer(axes, counts(chosen)),
            }
    return state.manifest.history[-1]


def _chosen(
    recipe: Recipe, axes: Sequence[Axis], shapes: Mapping[str, Shape], scores: Scores, share: float, round: int
) -> Choice:
    """The fine groups of the highest scores that hold a `share` of the prunable parameters, of which `mask.random` is drawn."""
    params = {axis.name: unit_params(axis, shapes) for axis in axes}
    original = {axis.name: axis.size for axis in axes}
    scope, random = recipe.mask.scope, recipe.mask.random
    choose = partial(select, axes, unit_params=params, original=original, scope=scope, least=0)
    best = choose(scores, keep_share=share * (1.0 - random))
    if random == 0.0:
        return best
    generator = generator_for(recipe.seed, round, "mask at random")
    drawn = {name: kept + torch.rand(len(kept), generator=generator) for name, kept in best.items()}  # those kept are above 1
    if scope == "global":  # which ranks by score per parameter
        drawn = {name: score * params[name] for name, score in drawn.items()}
    return choose(drawn, keep_share=share)
