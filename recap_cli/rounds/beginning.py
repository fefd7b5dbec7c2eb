"""What a state begins with: the data are read, the model is made and checked, its head is warmed up (paper, Step 1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recap_cli import registry
from recap_cli.core.method import RoundPlan
from recap_cli.data.split import Split
from recap_cli.machine import devices, threads
from recap_cli.progress import Track
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.examples import read_raw, splits_of
from recap_cli.rounds.frozen_weights import frozen_weight_of
from recap_cli.rounds.full_model import FullModel, fitting_threads, make_full_model, model_facts
from recap_cli.rounds.importance import load_criterion
from recap_cli.rounds.plans import METHOD_OF_TEACHER, check_steps, steps_in_round
from recap_cli.rounds.teacher import Taught, ask_teacher, teacher_notes
from recap_cli.rounds.warm_up import warm_up
from recap_cli.tasks.calls import task_named


@dataclass(frozen=True)
class Beginning:
    """What a state begins with.

    Attributes:
        full: the full model, its head warmed up.
        taught: what a teacher has left, if there is one.
        facts: what `init` notes.
        plugins: the method, the task, the frozen weight, the criteria and the adapter, and where each comes from.
    """

    full: FullModel
    taught: Taught | None
    facts: dict[str, Any]
    plugins: list[dict[str, str]]


def begin(recipe: Recipe, round_plans: Sequence[RoundPlan], path: Path, track: Track) -> Beginning:
    """Read and check all that a recipe names, ask its teacher, and warm up the head, for a state at `path`.

    Raises:
        DataError, ModelError, ConformanceError, RecipeError, PluginError: something does not fit.
        StorageError: the disk has no room for a teacher's outputs.
    """
    plugins = _plugins(recipe)
    devices.pick(recipe.finetune.device), devices.pick(recipe.importance.device)
    raw = read_raw(recipe)
    full = make_full_model(recipe, raw.label_names, round_plans)
    plugins.append(registry.used("adapters", full.spec.model_type))
    train, validation = splits_of(recipe, full.spec, full.processor, track, raw)
    check_steps(round_plans, recipe.rounds * steps_in_round(recipe, len(train)), recipe)
    count = fitting_threads(recipe, full, train)
    with threads.limited(count):
        taught = ask_teacher(recipe, full, raw, (train, validation), path, track)
        warm = warm_up(recipe, full, (train, validation), track)
        by_chance = _chance(recipe, full, validation)
    facts = {
        "method": recipe.method,
        "round_plans": [round_plan.to_json() for round_plan in round_plans],
        **model_facts(full),
        "notes": [*raw.notes, *full.notes, *teacher_notes(recipe.metric, taught, by_chance), *train.notes, *validation.notes],
        "train_examples": len(train),
        "label_places": raw.labels.from_dataset,
        "label_words": raw.labels.words,
        "threads": count,
        "metric": recipe.task.metric,
        "chance": by_chance,
        **({"teacher": taught.facts} if taught else {}),
        **warm,
    }
    return Beginning(full, taught, facts, plugins)


def _chance(recipe: Recipe, full: FullModel, validation: Split) -> dict[str, float] | None:
    """The loss and metrics of the best answer that is the same for every example; None if the task does not say."""
    constant = task_named(recipe.task.kind).constant
    return None if constant is None else constant(validation.targets, full.spec.label_names)


def _plugins(recipe: Recipe) -> list[dict[str, str]]:
    """The method, the task, the frozen weight and the criteria of a recipe, and where each comes from.

    The last two are loaded, to see that they can be.
    """
    weights = recipe.finetune.weights
    frozen_weight_of(weights)
    plugins = [
        registry.used("methods", recipe.method),
        *([registry.used("methods", METHOD_OF_TEACHER[recipe.distill.teacher or ""])] if recipe.distill.is_own else []),
        registry.used("tasks", recipe.task.kind),
        registry.used("weights", weights),
    ]
    for name in (recipe.prune.criterion, recipe.mask.criterion):
        plugins.append(registry.used("criteria", name))
        load_criterion(name)
    return plugins
