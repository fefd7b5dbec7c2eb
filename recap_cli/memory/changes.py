"""A setting that was changed to fit a memory budget, and what budgets are counted by."""

from dataclasses import dataclass
from math import ceil
from typing import Any

from recap_cli.recipe.recipe import Recipe

# Stated, not measured here: what cuBLAS takes from the allocator on Hopper (8.1 MiB before it), on each of two threads, as the
# backward runs on one of its own.
WORKSPACE_BYTES = 2 * 32 * 2**20
SCORING = "evaluate.batch_size"
MICRO = "finetune.micro_batch_size"


@dataclass(frozen=True)
class Change:
    """One setting that was changed: from what to what, and the predicted peak of a training step before and after."""

    key: str
    before: Any
    after: Any
    before_bytes: int
    after_bytes: int
    cost: str


def micro_batches(recipe: Recipe) -> list[int]:
    """The sizes below a recipe's that its batches can be divided into, the largest first."""
    whole, now = recipe.finetune.batch_size, recipe.finetune.micro_batch_size or recipe.finetune.batch_size
    return [size for size in range(now - 1, 0, -1) if whole % size == 0]


def current(recipe: Recipe, key: str) -> Any:
    """The value of a key; of micro-batches that are not set, that of the batch."""
    section, name = key.split(".")
    value = getattr(getattr(recipe, section), name)
    return recipe.finetune.batch_size if key == "finetune.micro_batch_size" and value is None else value


def enough(count: int) -> str:
    """A budget that is no less than `count` bytes, as `--budget` takes it."""
    return f"{ceil(count / 1e5) / 10:.1f}MB"
