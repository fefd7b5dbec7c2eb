"""`prune`: score the full model on D_s, cut it to the small model of this round (paper, sec. 3.1)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from recap_cli.core import adapter, gradual
from recap_cli.core.groups import Axis, chosen_params, counts, prunable_params
from recap_cli.core.scoring import Scores, group_scores
from recap_cli.progress import Track, silent
from recap_cli.runtime import devices, models
from recap_cli.runtime.order import seed_for
from recap_cli.stages import context as shared
from recap_cli.stages.context import Context
from recap_cli.state import State


def prune(state: State, *, track: Track = silent) -> dict[str, Any]:
    """Begin a round: write the plan and the small model, return what was kept.

    Raises `StageOrderError` if another stage is next or no round is left, `SelectionError` if the ratio cannot be met.
    """
    here = Context(state)
    with state.writing("prune") as draft:
        shared.check_rounds(here)
        recipe, axes = here.recipe, here.layout.axes
        tensors = here.full_tensors()
        model = here.model(tensors)
        torch.manual_seed(seed_for(recipe.seed, draft.round, "prune"))
        plan = gradual.prune(
            model,
            axes,
            score=_scorer(here, draft.round, devices.pick(recipe.importance.device), track),
            resize=lambda cut, sizes: adapter.resize(here.adapter, cut, sizes),
            ratio=recipe.prune.ratio,
            steps=recipe.prune.steps,
            scope=recipe.prune.scope,
            floor=recipe.prune.floor,
            uniform=recipe.prune.uniform,
            round_to=recipe.prune.round_to,
        )
        folder = f"round-{draft.round:03d}"
        small = models.tensors_of(model)
        draft.save_tensors(f"{folder}/{shared.PLAN}", shared.as_bytes(plan))
        draft.save_tensors(f"{folder}/{shared.SMALL}", small)
        draft.set_small(folder)
        names = {name for name, _ in model.named_parameters()}
        prunable, kept = prunable_params(axes, here.layout.shapes), chosen_params(axes, here.layout.shapes, plan)
        draft.facts |= {
            "params_full": sum(tensors[name].numel() for name in names),
            "params_small": sum(small[name].numel() for name in names),
            "prunable_full": prunable,
            "prunable_small": kept,
            "kept_share_of_prunable": kept / prunable,
            "kept": shared.kept_per_layer(axes, counts(plan)),
            "of": shared.kept_per_layer(axes, {axis.name: axis.size for axis in axes}),
        }
    return state.manifest.history[-1]


def _scorer(here: Context, round: int, device: torch.device, track: Track) -> Any:
    """Eq. (1), or another criterion, on a sample that is drawn anew for each gradual step; the model is cut on the CPU."""
    recipe = here.recipe
    criterion = shared.load_criterion(recipe.prune.criterion)
    train, _ = here.splits(track)
    steps = iter(range(1, recipe.prune.steps + 1))

    def score(model: nn.Module, axes: Sequence[Axis]) -> Scores:
        step = next(steps)
        losses = shared.losses_over(
            shared.forward_of(here.spec, model),
            train,
            shared.draw(recipe, train, round, f"prune {step}"),
            batch_size=shared.importance_batch_size(recipe, device),
            device=device,
            track=track,
            label=f"importance, step {step} of {recipe.prune.steps}",
        )
        with shared.on_device(model, axes, device):
            return group_scores(model, axes, criterion, losses)

    return score
