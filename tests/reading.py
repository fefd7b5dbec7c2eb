"""Examples as a recipe's section `data` names them, for tests that have a few keys of it to say."""

from pathlib import Path
from typing import Any

from recap_cli.data import sources
from recap_cli.recipe.schema import Data
from recap_cli.tasks.calls import task_named


def read_splits(kind: str, *, seed: int = 0, **data: Any) -> sources.Raw:
    """Read the examples of a task; keys of `data` that are not given have the recipe's defaults."""
    given = {key: str(value) if isinstance(value, Path) else value for key, value in data.items()}
    return sources.read_splits(task_named(kind), Data(**given).model_dump(), seed=seed)
