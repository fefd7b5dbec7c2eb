"""The settings of a state that may be changed after it was made: how it is computed, not what. Reads no tensor.

A change is a commit of its own (`State.amend`), so that what ran out of memory goes on in the same state with less.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recap_cli import registry
from recap_cli.errors import StateError
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.frozen_weights import frozen_weight_of
from recap_cli.state.manifest import quoted
from recap_cli.state.store import State

WEIGHTS = "finetune.weights"
Change = Mapping[str, Any]
OnChange = Callable[[Change], None]
# They change memory, time and rounding, and nothing that a result is said to be a result of.
EXECUTION = (
    "data.workers",
    "importance.device",
    "finetune.micro_batch_size",
    WEIGHTS,
    "finetune.checkpointing",
    "finetune.fused_backward",
    "finetune.offload",
    "finetune.log_every",
    "finetune.device",
    "evaluate.batch_size",
)


def ignore(_: Change) -> None:
    """Tell nobody of a change."""


def recipe_of(state: State, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a state as it is now, with `overrides` (each `section.key=value`) on top.

    Raises:
        RecipeError: an override does not fit.
    """
    return recipes.parse(state.recipe_text, str(state.path / state.manifest.recipe), overrides)


def adopt(state: State, recipe: Recipe, *, on_change: OnChange = ignore) -> None:
    """Make `recipe` that of the state, where it differs in execution settings only; `on_change` hears of the difference.

    Raises:
        StateError: anything else differs; nothing is changed then.
        PluginError: the frozen weight of the recipe is not there.
    """
    now = recipe_of(state)
    if not (keys := recipes.differences(now, recipe)):
        return
    if fixed := [key for key in keys if key not in EXECUTION]:
        raise StateError(
            f"{state.path} was made from another recipe: {', '.join(fixed)} differ; in a state only {', '.join(EXECUTION)} "
            "may be changed",
            hint=f"name another folder, or go on with the state's own recipe: recap run --state {quoted(state.path)}",
        )
    before, after = ({key: _value(of, key) for key in keys} for of in (now, recipe))
    plugins = _plugins_with(state, recipe.finetune.weights) if WEIGHTS in keys else None
    state.amend(recipes.dump(recipe), recipes.digest(recipe), before, after, plugins)
    on_change(state.manifest.changes[-1])


def _plugins_with(state: State, weights: str) -> dict[str, Any]:
    """The state's record of plugins with another frozen weight."""
    frozen_weight_of(weights)
    others = [plugin for plugin in state.manifest.plugins["used"] if plugin["kind"] != "weights"]
    return {"used": [*others, registry.used("weights", weights)]}


def _value(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return recipe.model_dump(mode="json")[section][name]
