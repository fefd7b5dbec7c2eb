"""Settings that fit a memory budget: found by prediction, in a stated order, never by trial and running out of memory.

First what costs nothing, then what costs time, last what costs quality: `LADDER`. Each rung is one prediction. Where it has
many values (micro-batches, ratios) it is one at the far end, one where a straight line to there meets the budget, and some more
around that, as far as the peak is no straight line, until the first value that fits is known.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from recap_cli.errors import BudgetError
from recap_cli.memory import meta_model
from recap_cli.memory.changes import MICRO, SCORING, WORKSPACE_BYTES, Change, current, enough, micro_batches
from recap_cli.memory.meta_model import MetaModel, anew, with_token_rows
from recap_cli.memory.predict import Prediction, evaluation_bytes, importance_bytes, predict
from recap_cli.memory.teacher_budget import fit_teacher
from recap_cli.progress import Track, silent
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.examples import read_raw
from recap_cli.rounds.frozen_weights import frozen_weight_of, smaller_quantized
from recap_cli.rounds.run_context import Context
from recap_cli.state.store import State

MOST_FROZEN, MOST_PRUNED, RATIO_STEP = 0.95, 0.75, 0.005
LINE_TRIES = 2  # values tried around the straight line's estimate, before what is left is halved


@dataclass(frozen=True)
class Rung:
    """A setting that may need less memory: its key, the values to try from the dearest to the cheapest, and what it costs."""

    key: str
    values: Callable[[Recipe], Sequence[Any]]
    size: Callable[[Any], float]  # what the peak is affine in
    cost: str


@dataclass(frozen=True)
class Fit:
    """A recipe that fits the budget, what was changed to get there, and its prediction."""

    recipe: Recipe
    changes: tuple[Change, ...]
    prediction: Prediction


def _switch(key: str, value: Any, cost: str, can: Callable[[Recipe], bool]) -> Rung:
    return Rung(key, lambda recipe: [value] if can(recipe) else [], lambda _: 0.0, cost)


def _ratios(now: float, most: float) -> list[float]:
    steps = range(int(now / RATIO_STEP + 1e-9) + 1, int(most / RATIO_STEP + 1e-9) + 1)
    return [round(step * RATIO_STEP, 3) for step in steps]


LADDER = (
    _switch(
        "finetune.fused_backward",
        True,
        "nothing: gradients of one tensor at a time",
        lambda r: not r.finetune.fused_backward and r.finetune.max_grad_norm is None,
    ),
    _switch(
        "finetune.weights",
        "bf16",
        "nothing but the forward's precision: masters stay fp32",
        lambda r: not (weights := frozen_weight_of(r.finetune.weights)).quantizes and weights.dtype == torch.float32,
    ),
    _switch("finetune.checkpointing", True, "time: each block runs twice", lambda r: r.finetune.checkpointing is not True),
    Rung("finetune.micro_batch_size", micro_batches, float, "time: the same batch in smaller parts"),
    _switch("finetune.offload", True, "time: masters and moments are in main memory", lambda r: not r.finetune.offload),
    Rung("mask.ratio", lambda r: _ratios(r.mask.ratio, MOST_FROZEN), lambda x: 1 - x, "quality: less of the model is trained"),
    Rung(
        "prune.ratio",
        lambda r: _ratios(r.prune.ratio, min(MOST_PRUNED, 1 - r.prune.floor)),
        lambda x: 1 - x,
        "quality: a smaller model",
    ),
)
IMPORTANCE = "importance.device"
WEIGHTS = "finetune.weights"  # quantized ones are for a user to choose


def fit(
    model: MetaModel,
    recipe: Recipe,
    budget_bytes: int,
    *,
    may_change: Callable[[str], bool] = lambda _: True,
    track: Track = silent,
) -> Fit:
    """The settings nearest to the recipe's with which training, scoring and importance, if it is computed on an accelerator,
    are predicted to fit in `budget_bytes` with cuBLAS's workspace.

    Raises:
        BudgetError: the least that the rungs can do, which it names, is more.
    """
    allowed = budget_bytes - WORKSPACE_BYTES
    changes: list[Change] = []
    now, spare = (
        predict(model, recipe, recipe.method),
        list[Rung](),
    )  # spare: what did not help when it was tried, as all was held elsewhere
    for rung in track([rung for rung in LADDER if may_change(rung.key)], "fit the budget"):
        for tried in [rung, *spare]:
            if now.usage.peak_bytes <= allowed:
                break
            after = _climb(model, now, tried, allowed)
            if after.usage.peak_bytes < now.usage.peak_bytes:
                changes.append(_change(tried.key, tried.cost, now, after))
                now, spare = after, [other for other in spare if other is not tried]
            elif tried is rung:
                spare.append(rung)
                break  # nothing has changed for the others
    if now.usage.peak_bytes > allowed:
        raise _nothing_fits(model, now, budget_bytes, may_change)
    now, changes = _larger_parts(model, now, changes, recipe.finetune.micro_batch_size, allowed)
    scored = _scoring(model, now, allowed, may_change)
    if scored.recipe != now.recipe:
        changes.append(_change(SCORING, "nothing: the validation data in smaller batches", now, scored, scoring=True))
    if scored.evaluation_bytes > allowed:
        raise _nothing_fits(model, scored, budget_bytes, may_change)
    scored, changes = fit_teacher(model, scored, changes, allowed, may_change)
    if moved := _importance(model, scored.recipe, allowed, may_change):
        changes.append(moved)
        scored = replace(scored, recipe=recipes.changed(scored.recipe, {IMPORTANCE: moved.after}))
    return Fit(scored.recipe, tuple(changes), scored)


def solved(recipe: Recipe, track: Track = silent) -> tuple[Recipe, tuple[Change, ...]]:
    """A recipe with settings that fit its `finetune.memory_budget`, and what was changed; as it is, if it has none.

    Reads the data for their labels, whose number is that of the head's rows, and for their tokens.

    Raises:
        DataError: they cannot be read.
        ModelError: there is no tokenizer.
        BudgetError: nothing fits.
    """
    if recipe.finetune.memory_budget is None:
        return recipe, ()
    raw = read_raw(recipe)
    model = with_token_rows(meta_model.of_recipe(recipe, raw.label_names), recipe, raw, track)
    found = fit(model, recipe, recipes.bytes_of(recipe.finetune.memory_budget), track=track)
    return found.recipe, found.changes


def with_budget(facts: Mapping[str, Any], recipe: Recipe, changes: Sequence[Change]) -> dict[str, Any]:
    """The facts of `init`, and what was changed for a memory budget, if there is one; its notes come first."""
    amount = recipe.finetune.memory_budget
    if amount is None:
        return dict(facts)
    found = {"memory_budget": amount, "changes": [asdict(change) for change in changes]}
    return {"budget": found, **facts, "notes": [*budget_notes(amount, changes), *facts["notes"]]}


def budget_notes(amount: str, changes: Sequence[Change]) -> Iterator[str]:
    """What was done for a budget, a line each."""
    if not changes:
        yield f"fits the memory budget of {amount} as it is"
    for c in changes:
        peaks = f"{_mb(c.before_bytes)} to {_mb(c.after_bytes)} predicted"
        yield (
            f"for the memory budget of {amount}: {c.key} from {value_text(c.before)} to {value_text(c.after)} ({peaks}); "
            f"costs {c.cost}"
        )


def value_text(value: Any) -> str:
    """A value as `--set` takes it."""
    return json.dumps(value).replace('"', "")


def as_solved(recipe: Recipe, state: State, overridden: Collection[str] = ()) -> Recipe:
    """A recipe with the values that `init` found for its memory budget, if the state was made with that same budget.

    Keys that were `overridden`, on the command line, stay what they are.
    """
    first = state.manifest.history[0].get("budget") or {}
    if recipe.finetune.memory_budget is None or first.get("memory_budget") != recipe.finetune.memory_budget:
        return recipe
    values = {
        c["key"]: c["after"]
        for c in first["changes"]
        if c["key"] not in overridden and current(recipe, c["key"]) == c["before"]
    }
    return recipes.changed(recipe, values)


def savings(context: Context) -> list[tuple[str, int]]:
    """What each setting by itself would save of the predicted peak of a state's next training step: (`key=value`, bytes)."""
    model, recipe = meta_model.of_state(context), context.recipe
    even = {
        "mask.ratio": replace(model, mask=None, round_plans=()),
        "prune.ratio": anew(model),
    }  # a state's plan and mask are for its own ratios

    def peak(of: MetaModel, settings: Recipe) -> int:
        return predict(of, settings, settings.method).usage.peak_bytes

    now, found = peak(model, recipe), []
    for key, value in single_changes(recipe):
        before = peak(even[key], recipe) if key in even else now
        saved = before - peak(even.get(key, model), recipes.changed(recipe, {key: value}))
        found.append((f"{key}={value_text(value)}", saved))
    return [(setting, saved) for setting, saved in found if saved > 0]


def single_changes(recipe: Recipe) -> Iterable[tuple[str, Any]]:
    """One value for each rung: the next smaller micro-batch, ratios half-way to their ends; and quantized weights."""
    for rung in LADDER:
        values = rung.values(recipe)
        if values:
            yield rung.key, values[len(values) // 2] if rung.key.endswith("ratio") else values[0]
    for name in smaller_quantized(recipe.finetune.weights):
        yield WEIGHTS, name


def _climb(model: MetaModel, now: Prediction, rung: Rung, allowed: int) -> Prediction:
    """The prediction for the first value of a rung that fits, or for its last."""
    values = rung.values(now.recipe)
    if not values:
        return now

    def at(value: Any) -> Prediction:
        return predict(model, recipes.changed(now.recipe, {rung.key: value}), now.recipe.method)

    found = at(values[-1])
    if len(values) == 1 or found.usage.peak_bytes > allowed:
        return found
    sizes = [rung.size(value) for value in values]
    low, high = -1, len(values) - 1  # the one does not fit, the other does
    guess, tries = _estimate(sizes, rung.size(current(now.recipe, rung.key)), now, found, allowed), 0
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        tried, tries = at(values[guess]), tries + 1
        if fits := tried.usage.peak_bytes <= allowed:
            high, found = guess, tried
        else:
            low = guess
        near = guess - 1 if fits else guess + 1
        guess = near if tries < LINE_TRIES else (low + high) // 2
    return found


def _larger_parts(
    model: MetaModel, now: Prediction, changes: Sequence[Change], first: int | None, allowed: int
) -> tuple[Prediction, list[Change]]:
    """Micro-batches once more, where switches after them made room: no smaller than they must be now; and all changes."""
    at = next((at for at, change in enumerate(changes) if change.key == MICRO), len(changes))
    later = changes[at + 1 :]
    if not later or any(change.key.endswith("ratio") for change in later):
        return now, list(changes)
    whole, peak = now, changes[at].before_bytes
    recipe = recipes.changed(now.recipe, {MICRO: first, **{change.key: change.before for change in later}})
    redone = list(changes[:at])
    for change in later:
        recipe = recipes.changed(recipe, {change.key: change.after})
        whole = predict(model, recipe, recipe.method)
        redone.append(replace(change, before_bytes=peak, after_bytes=whole.usage.peak_bytes))
        peak = whole.usage.peak_bytes
    if peak <= allowed:
        return whole, redone
    again = _climb(model, whole, next(rung for rung in LADDER if rung.key == MICRO), allowed)
    return again, [*redone, _change(MICRO, changes[at].cost, whole, again)]


def _estimate(sizes: Sequence[float], start: float, first: Prediction, last: Prediction, allowed: int) -> int:
    """The place of the first value that should fit, if the peak were affine in the size between the two that are known."""
    rise = (first.usage.peak_bytes - last.usage.peak_bytes) / (start - sizes[-1])
    room = allowed - last.usage.peak_bytes
    return next((at for at, size in enumerate(sizes) if rise * (size - sizes[-1]) <= room), len(sizes) - 1)


def _scoring(model: MetaModel, now: Prediction, allowed: int, may_change: Callable[[str], bool]) -> Prediction:
    """The same with a batch size for scoring that fits, if the recipe's does not: halved until it does."""
    recipe, size, peak = now.recipe, now.recipe.evaluate.batch_size, now.evaluation_bytes
    while peak > allowed and size > 1 and may_change(SCORING):
        size //= 2
        recipe = recipes.changed(now.recipe, {SCORING: size})
        peak = evaluation_bytes(model, recipe, recipe.method)
    return replace(now, recipe=recipe, evaluation_bytes=peak)


def _importance(model: MetaModel, recipe: Recipe, allowed: int, may_change: Callable[[str], bool]) -> Change | None:
    """Importance back to the CPU, if an accelerator is to compute it (`auto` may mean one) and has not the memory."""
    device = recipe.importance.device
    if device == "cpu" or not may_change(IMPORTANCE) or (peak := importance_bytes(model, recipe)) <= allowed:
        return None
    return Change(IMPORTANCE, device, "cpu", peak, 0, "time: importance is computed on the CPU")


def _change(key: str, cost: str, before: Prediction, after: Prediction, *, scoring: bool = False) -> Change:
    first, second = ((p.evaluation_bytes if scoring else p.usage.peak_bytes) for p in (before, after))
    return Change(key, current(before.recipe, key), current(after.recipe, key), first, second, cost)


def _nothing_fits(model: MetaModel, least: Prediction, budget_bytes: int, may_change: Callable[[str], bool]) -> BudgetError:
    def least_bytes(recipe: Recipe) -> int:
        training = least.usage if recipe is least.recipe else predict(model, recipe, recipe.method).usage
        size = 1 if may_change(SCORING) else recipe.evaluate.batch_size
        scoring = evaluation_bytes(model, recipes.changed(recipe, {SCORING: size}), recipe.method)
        return max(training.peak_bytes, scoring) + WORKSPACE_BYTES

    needed = least_bytes(least.recipe)
    keys = [rung.key for rung in LADDER if may_change(rung.key)]
    settings = ", ".join(f"{key}={value_text(current(least.recipe, key))}" for key in keys)
    hint = f"a budget of {enough(needed)} fits"
    for name in smaller_quantized(least.recipe.finetune.weights) if may_change(WEIGHTS) else ():
        quantized = least_bytes(recipes.changed(least.recipe, {WEIGHTS: name}))
        if quantized <= needed - 1e5:
            hint += f"; with --set {WEIGHTS}={name}, which is not chosen here, one of {enough(quantized)}"
    if fixed := [rung.key for rung in LADDER if not may_change(rung.key)]:
        hint += f"; a new state may have another {' and '.join(fixed)}, too: ask with its recipe"
    return BudgetError(
        f"nothing fits in {budget_bytes // 10**5 / 10:.1f}MB: the least is {enough(needed)}, with {settings} "
        f"({_mb(WORKSPACE_BYTES)} of it allowed for cuBLAS)",
        hint=hint,
    )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
