"""`prune`: cut the full model to the small model of this round, by importance on D_s (paper, sec. 3.1) or as its turn says."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from recap_cli.core import adapter, gradual
from recap_cli.core.axes import Axis, Choice, chosen_params, counts, kept_per_layer, prunable_params
from recap_cli.core.importance import Scores, averaged, group_scores
from recap_cli.core.method import Turn
from recap_cli.core.ranking import ranked_together
from recap_cli.core.surgery import cut_model, indices
from recap_cli.data.sampling import seed_for
from recap_cli.machine import devices
from recap_cli.models import build
from recap_cli.progress import Track, silent
from recap_cli.rounds import context as shared
from recap_cli.rounds.context import Context
from recap_cli.rounds.selection import choose, limits
from recap_cli.rounds.threads import on_fitting_threads
from recap_cli.state.store import Draft, State


@on_fitting_threads
def prune(state: State, *, track: Track = silent) -> dict[str, Any]:
    """Begin a round: write the plan and the small model, return what was kept.

    Raises `StageOrderError` if another stage is next or no round is left, `SelectionError` if the ratio cannot be met.
    """
    here = Context(state)
    with state.writing("prune") as draft:
        shared.check_rounds(here)
        axes, turn = here.layout.axes, here.turns[draft.round - 1]
        tensors = here.full_tensors()
        model = here.model(tensors)
        torch.manual_seed(seed_for(here.recipe.seed, draft.round, "prune"))
        plan = _PLANS[turn.plan](here, model, turn, draft, track)
        folder = f"round-{draft.round:03d}"
        small = build.tensors_of(model)
        draft.save_tensors(f"{folder}/{shared.PLAN}", shared.as_bytes(plan))
        draft.save_tensors(f"{folder}/{shared.SMALL}", small)
        draft.set_small(folder)
        names = {name for name, _ in model.named_parameters()}
        prunable, kept = prunable_params(axes, here.layout.shapes), chosen_params(axes, here.layout.shapes, plan)
        draft.facts |= {
            "plan": turn.plan,
            "prune_ratio": turn.prune_ratio,
            "params_full": sum(tensors[name].numel() for name in names),
            "params_small": sum(small[name].numel() for name in names),
            "prunable_full": prunable,
            "prunable_small": kept,
            "kept_share_of_prunable": kept / prunable,
            "kept": kept_per_layer(axes, counts(plan)),
            "of": kept_per_layer(axes, {axis.name: axis.size for axis in axes}),
        }
    return state.manifest.history[-1]


def _by_importance(here: Context, model: nn.Module, turn: Turn, draft: Draft, track: Track) -> Choice:
    """Cut the model in gradual steps, each by an importance of its own."""
    recipe = here.recipe
    return gradual.prune(
        model,
        here.layout.axes,
        score=_scorer(here, draft, devices.pick(recipe.importance.device), track),
        resize=lambda cut, sizes: adapter.resize(here.adapter, cut, sizes),
        ratio=turn.prune_ratio,
        steps=recipe.prune.steps,
        scope=recipe.prune.scope,
        **limits(recipe),
    )


def _as_before(here: Context, model: nn.Module, turn: Turn, draft: Draft, track: Track) -> Choice:
    """Cut the model to the plan of the round before."""
    return _cut(here, model, here.plan(f"round-{draft.round - 1:03d}"))


def _as_learned(here: Context, model: nn.Module, turn: Turn, draft: Draft, track: Track) -> Choice:
    """Cut the model to the groups whose scores, of the training in the round before, are highest."""
    scores = here.scores(f"round-{draft.round - 1:03d}")
    return _cut(here, model, choose(here.recipe, here.layout.axes, here.layout.shapes, scores, 1.0 - turn.prune_ratio))


_PLANS = {"importance": _by_importance, "same": _as_before, "learned": _as_learned}


def _cut(here: Context, model: nn.Module, plan: Choice) -> Choice:
    cut_model(model, indices(here.layout.axes, plan, here.layout.shapes))
    adapter.resize(here.adapter, model, counts(plan))
    return plan


def _scorer(
    here: Context, draft: Draft, device: torch.device, track: Track
) -> Callable[[nn.Module, Sequence[Axis], Choice], Scores]:
    """Eq. (1), or another criterion, on a sample that is drawn anew for each gradual step; the model is cut on the CPU.

    With `prune.ema` it is averaged with the average of the rounds before, which is of the full model, at the groups that are
    left. The first step scores the full model too: its average is written for the rounds after this one.
    """
    recipe, weight, past = here.recipe, here.recipe.prune.ema, _past(here, draft.round)
    criterion = shared.load_criterion(recipe.prune.criterion)
    train, _ = here.splits(track)
    steps = iter(range(1, recipe.prune.steps + 1))

    def score(model: nn.Module, axes: Sequence[Axis], plan: Choice) -> Scores:
        step = next(steps)
        losses = shared.losses_over(
            shared.forward_of(here.spec, model),
            train,
            shared.draw(recipe, train, draft.round, f"prune {step}"),
            batch_size=shared.importance_batch_size(recipe, device),
            device=device,
            track=track,
            label=f"importance, step {step} of {recipe.prune.steps}",
        )
        with shared.on_device(model, axes, device, here.spec.model_type):
            scores = group_scores(model, axes, criterion, losses, named=recipe.prune.criterion)
        if past is not None:
            pools = ranked_together(axes, recipe.prune.scope, uniform=recipe.prune.uniform)
            scores = averaged(pools, scores, {name: of[plan[name]] for name, of in past.items()}, weight)
        if weight > 0 and step == 1:
            draft.save_tensors(f"round-{draft.round:03d}/{shared.IMPORTANCE}", scores)
        return scores

    return score


def _past(here: Context, round: int) -> Scores | None:
    """The averaged importance that the last of the rounds before has written: axis name → a score for each group."""
    found = (here.importance(f"round-{number:03d}") for number in range(round - 1, 0, -1))
    return next((scores for scores in found if scores is not None), None)
