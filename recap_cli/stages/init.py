"""`init`: a pretrained model, a task head that has seen the task, and a state to begin from (paper, Step 1)."""

from functools import cache
from importlib.metadata import version
from pathlib import Path
from platform import python_version

from recap_cli.memory import budget
from recap_cli.progress import Track, silent
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.beginning import begin
from recap_cli.rounds.full_model import write_full_model
from recap_cli.rounds.merging import write_taught
from recap_cli.rounds.plans import require_extras, round_plans_for
from recap_cli.state.store import State

_version = cache(version)  # the metadata of torch are long
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
        StorageError: the disk has no room for a teacher's outputs.
    """
    require_extras(recipe)
    recipe, changes = budget.solved(recipe, track)
    round_plans = round_plans_for(recipe)  # after that: what a trainable entry holds may have changed
    with State.create(path, recipes.dump(recipe), recipes.digest(recipe)) as transaction:
        begun = begin(recipe, round_plans, path, track)
        write_full_model(transaction, FULL, begun.full)
        if begun.taught is not None:
            write_taught(transaction, begun.taught)
        transaction.plugins = {"used": begun.plugins}
        transaction.versions = {"recap": _version("recap-cli"), "python": python_version()}
        transaction.versions |= {name: _version(name) for name in LIBRARIES}
        transaction.facts |= budget.with_budget(begun.facts, recipe, changes)
    return State.open(path)
