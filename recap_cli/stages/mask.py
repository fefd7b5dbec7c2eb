"""`mask`: choose which fine groups of the small model may move (paper, sec. 3.2.1)."""

from typing import Any

import torch

from recap_cli.core.groups import chosen_params, counts, prunable_params, refine, shapes_of, shrink, unit_params
from recap_cli.core.scoring import group_scores
from recap_cli.core.selection import select
from recap_cli.progress import Track, silent
from recap_cli.runtime import devices
from recap_cli.runtime.order import seed_for
from recap_cli.stages import context as shared
from recap_cli.stages.context import Context
from recap_cli.state import State


def mask(state: State, *, track: Track = silent) -> dict[str, Any]:
    """Write the update mask of this round, return how much may move.

    Raises `StageOrderError` if another stage is next.
    """
    here = Context(state)
    with state.writing("mask") as draft:
        shared.check_rounds(here)
        recipe, folder, turn = here.recipe, f"round-{draft.round:03d}", here.turns[draft.round - 1]
        plan = here.plan(folder)
        tensors = state.load_tensors(f"{folder}/{shared.SMALL}")
        shapes = shapes_of(tensors)
        axes = [refine(axis) for axis in shrink(here.layout.axes, plan)]
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
            with shared.on_device(model, axes, device):
                scores = group_scores(model, axes, shared.load_criterion(recipe.mask.criterion), losses)
            chosen = select(
                axes,
                scores,
                {axis.name: unit_params(axis, shapes) for axis in axes},
                original={axis.name: axis.size for axis in axes},
                keep_share=1.0 - turn.mask_ratio,
                scope=recipe.mask.scope,
                least=0,
            )
        draft.save_tensors(f"{folder}/{shared.MASK}", shared.as_bytes(chosen))
        moving, prunable = chosen_params(axes, shapes, chosen), prunable_params(axes, shapes)
        draft.facts |= {"moves": turn.moves, "mask_ratio": turn.mask_ratio}
        if turn.moves != "training":  # which says itself what it trains
            moving, prunable = chosen_params(axes, shapes, chosen), prunable_params(axes, shapes)
            draft.facts |= {
                "moving_prunable": moving,
                "moving_share_of_prunable": moving / prunable,
                "moving_dimensions": shared.kept_per_layer(axes, counts(chosen)),
            }
    return state.manifest.history[-1]
