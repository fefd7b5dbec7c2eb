"""`prune`: cut the full model to the small model of this round, by importance on D_s (paper, sec. 3.1) or as its round says."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from recap_cli.core import adapter, gradual
from recap_cli.core.axes import Axis, UnitMask, chosen_params, counts, kept_per_layer, prunable_params
from recap_cli.core.importance import Scores, averaged, group_scores
from recap_cli.core.method import RoundPlan
from recap_cli.core.ranking import ranked_together
from recap_cli.core.surgery import cut_model, indices
from recap_cli.data.sampling import seed_for
from recap_cli.machine import devices
from recap_cli.models import build
from recap_cli.progress import Track, silent
from recap_cli.rounds.device_policy import importance_batch_size, on_device
from recap_cli.rounds.importance import draw, load_criterion, losses_over
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.record import IMPORTANCE, PLAN, SMALL
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.selection import choose, limits_of
from recap_cli.rounds.status import check_rounds
from recap_cli.rounds.stored import as_bytes
from recap_cli.rounds.threads import on_fitting_threads
from recap_cli.state.store import State, Transaction


@on_fitting_threads
def prune(state: State, *, track: Track = silent) -> dict[str, Any]:
    """Begin a round: write the plan and the small model, return what was kept.

    Raises `StageOrderError` if another stage is next or no round is left, `SelectionError` if the ratio cannot be met.
    """
    context = Context(state)
    with state.writing("prune") as transaction:
        check_rounds(context.recipe, state)
        axes, round_plan = context.layout.axes, context.round_plans[transaction.round - 1]
        tensors = context.full_tensors()
        model = context.model(tensors)
        torch.manual_seed(seed_for(context.recipe.seed, transaction.round, "prune"))
        plan = _PLANS[round_plan.plan](context, model, round_plan, transaction, track)
        folder = f"round-{transaction.round:03d}"
        small = build.tensors_of(model)
        transaction.save_tensors(f"{folder}/{PLAN}", as_bytes(plan))
        transaction.save_tensors(f"{folder}/{SMALL}", small)
        transaction.set_small(folder)
        names = {name for name, _ in model.named_parameters()}
        prunable, kept = prunable_params(axes, context.layout.shapes), chosen_params(axes, context.layout.shapes, plan)
        transaction.facts |= {
            "plan": round_plan.plan,
            "prune_ratio": round_plan.prune_ratio,
            "params_full": sum(tensors[name].numel() for name in names),
            "params_small": sum(small[name].numel() for name in names),
            "prunable_full": prunable,
            "prunable_small": kept,
            "kept_share_of_prunable": kept / prunable,
            "kept": kept_per_layer(axes, counts(plan)),
            "of": kept_per_layer(axes, {axis.name: axis.size for axis in axes}),
        }
    return state.manifest.history[-1]


def _by_importance(
    context: Context, model: nn.Module, round_plan: RoundPlan, transaction: Transaction, track: Track
) -> UnitMask:
    """Cut the model in gradual steps, each by an importance of its own."""
    recipe = context.recipe
    return gradual.prune(
        model,
        context.layout.axes,
        score=_scorer(context, transaction, devices.pick(recipe.importance.device), track),
        resize=lambda cut, sizes: adapter.resize(context.adapter, cut, sizes),
        keep_shares=gradual.shares_left(round_plan.prune_ratio, recipe.prune.steps),
        limits=limits_of(recipe),
    )


def _as_before(context: Context, model: nn.Module, round_plan: RoundPlan, transaction: Transaction, track: Track) -> UnitMask:
    """Cut the model to the plan of the round before."""
    return _cut(context, model, context.plan(f"round-{transaction.round - 1:03d}"))


def _as_learned(context: Context, model: nn.Module, round_plan: RoundPlan, transaction: Transaction, track: Track) -> UnitMask:
    """Cut the model to the groups whose scores, of the training in the round before, are highest."""
    scores = context.scores(f"round-{transaction.round - 1:03d}")
    return _cut(
        context, model, choose(context.recipe, context.layout.axes, context.layout.shapes, scores, 1.0 - round_plan.prune_ratio)
    )


_PLANS = {"importance": _by_importance, "same": _as_before, "learned": _as_learned}


def _cut(context: Context, model: nn.Module, plan: UnitMask) -> UnitMask:
    cut_model(model, indices(context.layout.axes, plan, context.layout.shapes))
    adapter.resize(context.adapter, model, counts(plan))
    return plan


def _scorer(
    context: Context, transaction: Transaction, device: torch.device, track: Track
) -> Callable[[nn.Module, Sequence[Axis], UnitMask], Scores]:
    """Eq. (1), or another criterion, on a sample that is drawn anew for each gradual step; the model is cut on the CPU.

    With `prune.ema` it is averaged with the average of the rounds before, which is of the full model, at the groups that are
    left. The first step scores the full model too: its average is written for the rounds after this one.
    """
    recipe, weight, past = context.recipe, context.recipe.prune.ema, _past(context, transaction.round)
    criterion = load_criterion(recipe.prune.criterion)
    train, _ = context.splits(track)
    steps = iter(range(1, recipe.prune.steps + 1))

    def score(model: nn.Module, axes: Sequence[Axis], plan: UnitMask) -> Scores:
        step = next(steps)
        losses = losses_over(
            forward_of(context.spec, model),
            train,
            draw(recipe, train, transaction.round, f"prune {step}"),
            batch_size=importance_batch_size(recipe, device),
            device=device,
            track=track,
            label=f"importance, step {step} of {recipe.prune.steps}",
        )
        with on_device(model, axes, device, context.spec.model_type):
            scores = group_scores(model, axes, criterion, losses, named=recipe.prune.criterion)
        if past is not None:
            pools = ranked_together(axes, recipe.prune.scope, uniform=recipe.prune.uniform)
            scores = averaged(pools, scores, {name: of[plan[name]] for name, of in past.items()}, weight)
        if weight > 0 and step == 1:
            transaction.save_tensors(f"round-{transaction.round:03d}/{IMPORTANCE}", scores)
        return scores

    return score


def _past(context: Context, round: int) -> Scores | None:
    """The averaged importance that the last of the rounds before has written: axis name → a score for each group."""
    found = (context.importance(f"round-{number:03d}") for number in range(round - 1, 0, -1))
    return next((scores for scores in found if scores is not None), None)
