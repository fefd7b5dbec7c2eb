"""The round of a teacher that the run finetunes itself, in a memory budget: parts as small as it needs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from recap_cli.errors import BudgetError
from recap_cli.memory import meta_model
from recap_cli.memory.changes import MICRO, SCORING, WORKSPACE_BYTES, Change, current, enough, micro_batches
from recap_cli.memory.meta_model import MetaModel
from recap_cli.memory.predict import Prediction
from recap_cli.memory.teacher import teacher_bytes, teacher_scoring_bytes
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.plans import teaches
from recap_cli.rounds.run_context import Context


def teacher_savings(context: Context) -> list[tuple[str, int]]:
    """What smaller parts would save of the predicted peak of a step of the teacher's round, (`key=value`, bytes)."""
    model, recipe = meta_model.of_state(context), context.recipe
    now, found = teacher_bytes(model, recipe), list[tuple[str, int]]()
    for size in micro_batches(recipe)[:1]:
        found.append((f"{MICRO}={size}", now - teacher_bytes(model, recipes.changed(recipe, {MICRO: size}))))
    return [(setting, saved) for setting, saved in found if saved > 0]


class _Dial(NamedTuple):
    """A setting of which smaller values need less: its key, the values to try in turn, the peak, and what it costs."""

    key: str
    sizes: Sequence[int]
    peak: Callable[[MetaModel, Recipe], int]
    cost: str


def fit_teacher(
    model: MetaModel, now: Prediction, changes: Sequence[Change], allowed: int, may_change: Callable[[str], bool]
) -> tuple[Prediction, list[Change]]:
    """The same with smaller parts, where the round of a teacher that is still to be made would not fit; and all changes.

    Raises:
        BudgetError: one example at a time is too much.
    """
    if not now.recipe.distill.is_own or (model.round_plan is not None and not teaches(model.round_plan)):  # it is made
        return now, list(changes)
    scoring = [now.recipe.evaluate.batch_size >> bits for bits in range(1, now.recipe.evaluate.batch_size.bit_length())]
    for dial in (
        _Dial(MICRO, micro_batches(now.recipe), teacher_bytes, "time: the teacher's batches in smaller parts"),
        _Dial(SCORING, scoring, teacher_scoring_bytes, "nothing: the teacher's examples in smaller batches"),
    ):
        now, changes = _lowered(model, now, changes, dial, allowed, may_change)
    return now, list(changes)


def _lowered(
    model: MetaModel,
    now: Prediction,
    changes: Sequence[Change],
    dial: _Dial,
    allowed: int,
    may_change: Callable[[str], bool],
) -> tuple[Prediction, Sequence[Change]]:
    """The same with the first size of a dial that fits; a change of the same key that was there becomes one with it."""
    recipe, first = now.recipe, dial.peak(model, now.recipe)
    peak = first
    for size in dial.sizes if may_change(dial.key) else ():
        if peak <= allowed:
            break
        recipe = recipes.changed(now.recipe, {dial.key: size})
        peak = dial.peak(model, recipe)
    if peak > allowed:
        other = "; or a teacher that is there: --set distill.teacher=DIR" if may_change("distill.teacher") else ""
        raise BudgetError(
            f"the teacher's round does not fit: the full model, a block at a time, takes {enough(peak + WORKSPACE_BYTES)}",
            hint=f"a budget of {enough(peak + WORKSPACE_BYTES)} fits{other}",
        )
    if recipe is now.recipe:
        return now, changes
    earlier = next((change for change in changes if change.key == dial.key), None)
    before = earlier.before if earlier else current(now.recipe, dial.key)
    change = Change(dial.key, before, current(recipe, dial.key), first, peak, dial.cost)
    return replace(now, recipe=recipe), [*(one for one in changes if one is not earlier), change]
