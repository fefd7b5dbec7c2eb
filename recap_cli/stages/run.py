"""`run`: the same stages in a loop, from wherever the state stands."""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from recap_cli.memory.budget import as_solved
from recap_cli.progress import Track, silent
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import record
from recap_cli.rounds.plans import require_extras
from recap_cli.rounds.settings import OnChange, adopt, ignore
from recap_cli.rounds.status import next_stage
from recap_cli.stages.finetune import finetune
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.merge import merge
from recap_cli.stages.prune import prune
from recap_cli.state.lock import plain
from recap_cli.state.manifest import COMMIT
from recap_cli.state.store import State

STAGES = {"prune": prune, "mask": mask, "finetune": finetune, "merge": merge}


def run(
    recipe: Recipe,
    path: Path,
    *,
    track: Track = silent,
    on_stage: Callable[[dict[str, Any]], None] = lambda _: None,
    on_change: OnChange = ignore,
    overridden: Collection[str] | None = (),
) -> State:
    """Run every stage that is left of `recipe` in the state at `path`, which is made if it is not there.

    A state that was stopped goes on after its last committed stage. `on_stage` hears of each finished stage. Where the recipe
    differs from the state's in execution settings only (`settings.EXECUTION`), the state takes them over; `on_change` hears.
    `overridden` are the keys that a user has set beside the recipe, which a memory budget does not solve once more; None says
    that the recipe is the state's.

    At the end the product is what was committed, and nothing is left of a run that was stopped.

    Raises:
        StateError: the state there was made from a recipe that differs in more.
        MissingExtraError: stages are left, and the method needs an extra that is not installed.
        CorruptStateError: the product was altered.
        RecapError: whatever a stage raises.
    """
    path = plain(path)
    if os.path.lexists(path / COMMIT):
        state = State.open(path)
        record.check(state)
        if next_stage(recipe, state) is not None:
            require_extras(recipe)  # now, not when `finetune` is reached
        adopt(state, recipe if overridden is None else as_solved(recipe, state, overridden), on_change=on_change)
    else:
        state = init(recipe, path, track=track)
        on_stage(state.manifest.history[-1])
    while stage := next_stage(recipe, state):
        on_stage(STAGES[stage](state, track=track))
    state.tidy()
    if state.manifest.best is not None:
        state.verified(state.manifest.best["folder"])
    return state
