"""Which groups of the full model a round keeps: by importance on D_s (paper, sec. 3.1), as before, or as they were learned."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recap_cli.core import adapter, gradual
from recap_cli.core.axes import Axis, UnitMask, chosen_params, counts, kept_per_layer, prunable_params, shapes_of, unit_params
from recap_cli.core.compensation import with_change
from recap_cli.core.importance import Scores, averaged
from recap_cli.core.ranking import ranked_together
from recap_cli.core.surgery import cut_model, gather, indices
from recap_cli.data.sampling import seed_for
from recap_cli.progress import Track
from recap_cli.rounds.compensation import Absorbed, Absorbing, absorbed_before
from recap_cli.rounds.importance import draw_sample, score_units
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.selection import choose, limits_of

Scorer = Callable[[nn.Module, Sequence[Axis], UnitMask], Scores]


@dataclass(frozen=True)
class Pruned:
    """What a round is cut by.

    Attributes:
        plan: the groups that it keeps.
        absorbed: what the weights that are left make up for (`prune.compensate`).
        importance: averaged, which the rounds after it begin from, where there is one.
    """

    plan: UnitMask
    absorbed: Absorbed = field(default_factory=Absorbed)
    importance: Scores | None = None


def prune_model(context: Context, model: nn.Module, number: int, track: Track) -> Pruned:
    """Cut the full model, in place, to the sizes of the small model of round `number`.

    What the round absorbs is in the result; the cut model has it up to rounding, or not at all (`changed`).

    Raises:
        SelectionError: the ratio cannot be met, or the inputs of a matrix that is compensated are not finite.
    """
    torch.manual_seed(seed_for(context.recipe.seed, number, "prune"))
    round_plan = context.round_plans[number - 1]
    return _PLANS[round_plan.plan](context, model, number, track)


def _by_importance(context: Context, model: nn.Module, number: int, track: Track) -> Pruned:
    """Cut the model in gradual steps, each by an importance of its own."""
    recipe, averages = context.recipe, list[Scores]()
    absorbing = None if recipe.prune.compensate is False else Absorbing(context, number, track)
    plan, change = gradual.prune(
        model,
        context.layout.axes,
        gradual.Step(
            score=_scorer(context, number, track, averages.append),
            resize=lambda cut, sizes: adapter.resize(context.adapter, cut, sizes),
            absorb=absorbing or gradual.nothing,
        ),
        keep_shares=gradual.shares_left(context.round_plans[number - 1].prune_ratio, recipe.prune.steps),
        limits=limits_of(recipe),
    )
    importance = averages[0] if averages and recipe.prune.ema > 0 else None
    return Pruned(plan, Absorbed(change, absorbing.facts if absorbing else None), importance)


def _as_before(context: Context, model: nn.Module, number: int, track: Track) -> Pruned:
    """Cut the model to the plan of the round before."""
    plan = context.plan(f"round-{number - 1:03d}")
    absorbed = Absorbed() if context.recipe.prune.compensate is False else absorbed_before(context, number, plan)
    return _cut(context, model, plan, absorbed)


def _as_learned(context: Context, model: nn.Module, number: int, track: Track) -> Pruned:
    """Cut the model to the groups whose scores, of the training in the round before, are highest.

    The training has closed the others, so that nothing is lost with them.
    """
    scores, keep_share = context.scores(f"round-{number - 1:03d}"), 1.0 - context.round_plans[number - 1].prune_ratio
    return _cut(context, model, choose(context.recipe, context.layout.axes, context.layout.shapes, scores, keep_share))


_PLANS = {"importance": _by_importance, "same": _as_before, "learned": _as_learned}


def _cut(context: Context, model: nn.Module, plan: UnitMask, absorbed: Absorbed | None = None) -> Pruned:
    cut_model(model, indices(context.layout.axes, plan, context.layout.shapes))
    adapter.resize(context.adapter, model, counts(plan))
    return Pruned(plan, absorbed or Absorbed())


def _scorer(context: Context, number: int, track: Track, on_average: Callable[[Scores], None]) -> Scorer:
    """Eq. (1), or another criterion, on a sample that is drawn anew for each gradual step; the model is cut on the CPU.

    With `prune.ema` it is averaged with the average of the rounds before, which is of the full model, at the groups that are
    left. The first step scores the full model too: `on_average` hears of that average, which the rounds after this one use.
    """
    recipe, weight, past = context.recipe, context.recipe.prune.ema, _past(context, number)
    train, _ = context.splits(track)
    steps = iter(range(1, recipe.prune.steps + 1))

    def score(model: nn.Module, axes: Sequence[Axis], plan: UnitMask) -> Scores:
        step = next(steps)
        label = f"importance, step {step} of {recipe.prune.steps}"
        sample = draw_sample(recipe, train, number, f"prune {step}", label)
        scores = score_units(context, model, axes, recipe.prune.criterion, sample, track)
        if past is not None:
            shapes = shapes_of(model.named_parameters())
            sizes = limits_of(recipe).apart({axis.name: unit_params(axis, shapes) for axis in axes})
            pools = ranked_together(axes, recipe.prune.scope, uniform=recipe.prune.uniform, sizes=sizes)
            scores = averaged(pools, scores, {name: of[plan[name]] for name, of in past.items()}, weight)
        if step == 1:
            on_average(scores)
        return scores

    return score


def _past(context: Context, number: int) -> Scores | None:
    """The averaged importance that the last of the rounds before has written: axis name → a score for each group."""
    found = (context.importance(f"round-{before:03d}") for before in range(number - 1, 0, -1))
    return next((scores for scores in found if scores is not None), None)


def changed(context: Context, full: Mapping[str, Tensor], pruned: Pruned) -> dict[str, Tensor]:
    """The tensors of the small model that have a change, as those of the `full` model and the change give them, to the bit."""
    index_map, change = indices(context.layout.axes, pruned.plan, context.layout.shapes), pruned.absorbed.change
    return with_change(gather({name: full[name] for name in change}, index_map), change)


def pruning_facts(
    context: Context, number: int, full: Mapping[str, Tensor], model: nn.Module, plan: UnitMask
) -> dict[str, Any]:
    """What a round notes of its plan: how much of the tensors of the `full` model the cut one has left."""
    axes, shapes, round_plan = context.layout.axes, context.layout.shapes, context.round_plans[number - 1]
    small = dict(model.named_parameters())
    prunable, kept = prunable_params(axes, shapes), chosen_params(axes, shapes, plan)
    return {
        "plan": round_plan.plan,
        "prune_ratio": round_plan.prune_ratio,
        "params_full": sum(full[name].numel() for name in small),
        "params_small": sum(param.numel() for param in small.values()),
        "prunable_full": prunable,
        "prunable_small": kept,
        "kept_share_of_prunable": kept / prunable,
        "kept": kept_per_layer(axes, counts(plan)),
        "of": kept_per_layer(axes, {axis.name: axis.size for axis in axes}),
    }
