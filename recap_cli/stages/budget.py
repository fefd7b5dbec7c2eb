"""Settings that fit a memory budget: found by prediction, in a stated order, never by trial and running out of memory.

First what costs nothing, then what costs time, last what costs quality: `LADDER`. Each rung is one prediction. Where it has
many values (micro-batches, ratios) it is two, at its ends, and one to check: the peak is affine in them where it is not flat.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from recap_cli import recipe as recipes
from recap_cli.errors import BudgetError
from recap_cli.progress import Track, silent
from recap_cli.recipe import Recipe
from recap_cli.stages.context import Context
from recap_cli.stages.profile import Outline, Prediction, evaluation_bytes, outline, outline_of, predict
from recap_cli.state import State

WORKSPACE_BYTES = 32 * 2**20  # what cuBLAS takes from the allocator on Hopper, 8.1 MiB before it: stated, not measured here
MOST_FROZEN, MOST_PRUNED, RATIO_STEP = 0.95, 0.75, 0.005


@dataclass(frozen=True)
class Rung:
    """A setting that may need less memory: its key, the values to try from the dearest to the cheapest, and what it costs."""

    key: str
    values: Callable[[Recipe], Sequence[Any]]
    size: Callable[[Any], float]  # what the peak is affine in
    cost: str


@dataclass(frozen=True)
class Change:
    """One setting that was changed: from what to what, and the predicted peak of a training step before and after."""

    key: str
    before: Any
    after: Any
    before_bytes: int
    after_bytes: int
    cost: str


@dataclass(frozen=True)
class Fit:
    """A recipe that fits the budget, what was changed to get there, and its prediction."""

    recipe: Recipe
    changes: tuple[Change, ...]
    prediction: Prediction


def _switch(key: str, value: Any, cost: str, can: Callable[[Recipe], bool]) -> Rung:
    return Rung(key, lambda recipe: [value] if can(recipe) else [], lambda _: 0.0, cost)


def _micro_batches(recipe: Recipe) -> list[int]:
    whole, now = recipe.finetune.batch_size, recipe.finetune.micro_batch_size or recipe.finetune.batch_size
    return [size for size in range(now - 1, 0, -1) if whole % size == 0]


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
        "finetune.resident",
        "bf16",
        "nothing but the forward's precision: masters stay fp32",
        lambda r: r.finetune.resident == "fp32",
    ),
    _switch("finetune.checkpointing", True, "time: each block runs twice", lambda r: not r.finetune.checkpointing),
    Rung("finetune.micro_batch_size", _micro_batches, float, "time: the same batch in smaller parts"),
    _switch("finetune.offload", True, "time: masters and moments are in main memory", lambda r: not r.finetune.offload),
    Rung("mask.ratio", lambda r: _ratios(r.mask.ratio, MOST_FROZEN), lambda x: 1 - x, "quality: less of the model moves"),
    Rung(
        "prune.ratio",
        lambda r: _ratios(r.prune.ratio, min(MOST_PRUNED, 1 - r.prune.floor)),
        lambda x: 1 - x,
        "quality: a smaller model",
    ),
)
SCORING = "evaluate.batch_size"
INT8 = {"finetune.resident": "int8"}  # quantized weights are for a user to choose


def fit(
    model: Outline,
    recipe: Recipe,
    budget_bytes: int,
    *,
    may_change: Callable[[str], bool] = lambda _: True,
    track: Track = silent,
) -> Fit:
    """The settings nearest to the recipe's whose prediction, with cuBLAS's workspace, fits in `budget_bytes`.

    Raises `BudgetError` with the least that the rungs can do, if that is more.
    """
    allowed = budget_bytes - WORKSPACE_BYTES
    changes: list[Change] = []
    now = predict(model, recipe, "recap")
    for rung in track([rung for rung in LADDER if may_change(rung.key)], "fit the budget"):
        if now.usage.peak_bytes <= allowed:
            continue
        after = _climb(model, now, rung, allowed)
        if after.usage.peak_bytes < now.usage.peak_bytes:
            changes.append(_change(rung.key, rung.cost, now, after))
            now = after
    if now.usage.peak_bytes > allowed:
        raise _nothing_fits(model, now, budget_bytes, may_change)
    scored = _scoring(model, now, allowed, may_change)
    if scored.recipe != now.recipe:
        changes.append(_change(SCORING, "nothing: the validation data in smaller batches", now, scored, scoring=True))
    return Fit(scored.recipe, tuple(changes), scored)


def solved(recipe: Recipe, track: Track = silent) -> tuple[Recipe, tuple[Change, ...]]:
    """A recipe with settings that fit its `finetune.memory_budget`, and what was changed; as it is, if it has none."""
    if recipe.finetune.memory_budget is None:
        return recipe, ()
    found = fit(outline(recipe), recipe, recipes.bytes_of(recipe.finetune.memory_budget), track=track)
    return found.recipe, found.changes


def told(amount: str, changes: Sequence[Change]) -> Iterator[str]:
    """What was done for a budget, a line each."""
    if not changes:
        yield f"fits the memory budget of {amount} as it is"
    for c in changes:
        before, after = (json.dumps(value).replace('"', "") for value in (c.before, c.after))
        peaks = f"{_mb(c.before_bytes)} to {_mb(c.after_bytes)} predicted"
        yield f"for the memory budget of {amount}: {c.key} from {before} to {after} ({peaks}); costs {c.cost}"


def as_solved(recipe: Recipe, state: State) -> Recipe:
    """A recipe with the values that `init` found for its memory budget, if the state was made with that same budget."""
    first = state.manifest.history[0].get("budget") or {}
    if recipe.finetune.memory_budget is None or first.get("memory_budget") != recipe.finetune.memory_budget:
        return recipe
    values = {c["key"]: c["after"] for c in first["changes"] if _current(recipe, c["key"]) == c["before"]}
    return recipes.changed(recipe, values)


def savings(here: Context) -> list[tuple[str, int]]:
    """What each setting by itself would save of the predicted peak of a state's next training step: (`key=value`, bytes)."""
    model, recipe = outline_of(here), here.recipe
    now = predict(model, recipe, "recap").usage.peak_bytes
    found = []
    for key, value in _single_changes(recipe):
        if key.endswith("ratio"):  # the state's own plan and mask are for its own ratios
            model = replace(model, mask=None, plan=None if key == "prune.ratio" else model.plan)
        peak = predict(model, recipes.changed(recipe, {key: value}), "recap").usage.peak_bytes
        found.append((f"{key}={json.dumps(value)}".replace('"', ""), now - peak))
    return [(choice, saved) for choice, saved in found if saved > 0]


def _single_changes(recipe: Recipe) -> Iterable[tuple[str, Any]]:
    """One value for each rung: the next smaller micro-batch, ratios half-way to their ends; and int8."""
    for rung in LADDER:
        values = rung.values(recipe)
        if values:
            yield rung.key, values[len(values) // 2] if rung.key.endswith("ratio") else values[0]
    if recipe.finetune.resident != "int8":
        yield from INT8.items()


def _climb(model: Outline, now: Prediction, rung: Rung, allowed: int) -> Prediction:
    """The prediction for the first value of a rung that fits, or for its last."""
    values = rung.values(now.recipe)
    if not values:
        return now

    def at(value: Any) -> Prediction:
        return predict(model, recipes.changed(now.recipe, {rung.key: value}), "recap")

    last = at(values[-1])
    if len(values) == 1 or last.usage.peak_bytes > allowed:
        return last
    for value in _from_estimate(values, rung.size, _current(now.recipe, rung.key), now, last, allowed):
        found = last if value == values[-1] else at(value)
        if found.usage.peak_bytes <= allowed:
            return found
    return last


def _from_estimate(
    values: Sequence[Any], size: Callable[[Any], float], start: Any, first: Prediction, last: Prediction, allowed: int
) -> Iterable[Any]:
    """The values from the one on that should fit, if the peak were affine in `size` between the two that are known."""
    rise = (first.usage.peak_bytes - last.usage.peak_bytes) / (size(start) - size(values[-1]))
    room = allowed - last.usage.peak_bytes
    return [value for value in values if rise * (size(value) - size(values[-1])) <= room] or [values[-1]]


def _scoring(model: Outline, now: Prediction, allowed: int, may_change: Callable[[str], bool]) -> Prediction:
    """The same with a batch size for scoring that fits, if the recipe's does not: halved until it does."""
    recipe, size, peak = now.recipe, now.recipe.evaluate.batch_size, now.evaluation_bytes
    while peak > allowed and size > 1 and may_change(SCORING):
        size //= 2
        recipe = recipes.changed(now.recipe, {SCORING: size})
        peak = evaluation_bytes(model, recipe, "recap")
    return replace(now, recipe=recipe, evaluation_bytes=peak)


def _current(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    value = getattr(getattr(recipe, section), name)
    return recipe.finetune.batch_size if key == "finetune.micro_batch_size" and value is None else value


def _change(key: str, cost: str, before: Prediction, after: Prediction, *, scoring: bool = False) -> Change:
    first, second = ((p.evaluation_bytes if scoring else p.usage.peak_bytes) for p in (before, after))
    return Change(key, _current(before.recipe, key), _current(after.recipe, key), first, second, cost)


def _nothing_fits(model: Outline, least: Prediction, budget_bytes: int, may_change: Callable[[str], bool]) -> BudgetError:
    needed = least.usage.peak_bytes + WORKSPACE_BYTES
    settings = ", ".join(f"{rung.key}={_current(least.recipe, rung.key)}" for rung in LADDER if may_change(rung.key))
    hint = f"a budget of {_mb(needed)} fits"
    if may_change("finetune.resident") and least.recipe.finetune.resident != "int8":
        smaller = predict(model, recipes.changed(least.recipe, INT8), "recap").usage.peak_bytes + WORKSPACE_BYTES
        hint += f"; with --set finetune.resident=int8, which is not chosen here, one of {_mb(smaller)}"
    return BudgetError(
        f"nothing fits in {_mb(budget_bytes)}: the least is {_mb(needed)}, with {settings} "
        f"({_mb(WORKSPACE_BYTES)} of it allowed for cuBLAS)",
        hint=hint,
    )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
