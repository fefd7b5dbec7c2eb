"""`init`: a pretrained model, a task head that has seen the task, and a state to begin from (paper, Step 1)."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from platform import python_version

from recap_cli import registry
from recap_cli.machine import devices, threads
from recap_cli.memory import budget
from recap_cli.progress import Track, silent
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.examples import read_raw, splits_of
from recap_cli.rounds.frozen_weights import frozen_weight_of
from recap_cli.rounds.full_model import fitting_threads, make_full_model, model_facts, write_full_model
from recap_cli.rounds.importance import load_criterion
from recap_cli.rounds.plans import check_steps, require_extra, round_plans_for, steps_in_round
from recap_cli.rounds.warm_up import warm_up
from recap_cli.state.store import State, Transaction
from recap_cli.training.evaluation import chance

LIBRARIES = ("torch", "transformers", "timm", "safetensors")
FULL = "full-000"


def init(recipe: Recipe, path: Path, *, track: Track = silent) -> State:
    """Make the state of `recipe` at `path`: data and model are read and checked, the head is warmed up, the full model is
    written.

    With a `finetune.memory_budget` the settings that fit are found first, and the state is made with them.

    Raises:
        MissingExtraError: the method needs an extra that is not installed; before all else.
        DataError, ModelError, ConformanceError, RecipeError, PluginError: something does not fit; nothing is written then that
            would stay.
        BudgetError: nothing fits the memory budget.
        StateError: there is a state already.
    """
    require_extra(recipe.method)
    recipe, changes = budget.solved(recipe, track)
    round_plans = round_plans_for(recipe)  # after that: what a trainable entry holds may have changed
    with State.create(path, recipes.dump(recipe), recipes.digest(recipe)) as transaction, ExitStack() as stack:
        _note_budget(transaction, recipe, changes)
        _note_plugins(transaction, recipe)
        devices.pick(recipe.finetune.device), devices.pick(recipe.importance.device)
        raw = read_raw(recipe)
        full = make_full_model(recipe, raw.label_names, round_plans)
        transaction.plugins["used"].append(registry.used("adapters", full.spec.model_type))
        split, validation = splits_of(recipe, full.spec, full.processor, track, raw)
        check_steps(round_plans, recipe.rounds * steps_in_round(recipe, len(split)), recipe)
        count = fitting_threads(recipe, full, split)
        stack.enter_context(threads.limited(count))
        warm = warm_up(recipe, full, (split, validation), track)
        write_full_model(transaction, FULL, full)
        transaction.versions = {"recap": version("recap-cli"), "python": python_version(), **{n: version(n) for n in LIBRARIES}}
        transaction.facts |= {
            "method": recipe.method,
            "round_plans": [round_plan.to_json() for round_plan in round_plans],
            **model_facts(full),
            "notes": [*transaction.facts.get("notes", ()), *raw.notes, *full.notes, *split.notes, *validation.notes],
            "train_examples": len(split),
            "label_places": raw.labels.from_dataset,
            "label_words": raw.labels.words,
            "threads": count,
            "metric": recipe.task.metric,
            "chance": chance(validation.labels, full.spec.num_labels),
            **warm,
        }
    return State.open(path)


def _note_budget(transaction: Transaction, recipe: Recipe, changes: Sequence[budget.Change]) -> None:
    """Note what was changed for a memory budget, if there is one."""
    if (amount := recipe.finetune.memory_budget) is not None:
        transaction.facts["budget"] = {"memory_budget": amount, "changes": [asdict(change) for change in changes]}
        transaction.facts["notes"] = list(budget.budget_notes(amount, changes))


def _note_plugins(transaction: Transaction, recipe: Recipe) -> None:
    """Note the method, the frozen weight and the criteria. Raises `PluginError` for one that cannot be loaded."""
    weights = recipe.finetune.weights
    frozen_weight_of(weights)
    transaction.plugins = {"used": [registry.used("methods", recipe.method), registry.used("weights", weights)]}
    for name in (recipe.prune.criterion, recipe.mask.criterion):
        transaction.plugins["used"].append(registry.used("criteria", name))
        load_criterion(name)
