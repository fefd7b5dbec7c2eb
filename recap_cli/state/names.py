"""The names of what a state folder holds, and the order of its stages."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import TypeVar

SCHEMA = 3  # of state.yaml; no other is read
NEXT_STAGE = {"init": "prune", "prune": "mask", "mask": "finetune", "finetune": "merge", "merge": "prune"}
STAGES = tuple(NEXT_STAGE)

COMMIT = "state.yaml"
RECIPE = "recipe.yaml"
RECIPES = re.compile(r"recipe(-\d{3,})?\.yaml")  # the manifest names one of them
UNDER_WAY = ".recap-init"  # marks a folder from the start of its `init` to the commit
OURS = re.compile(r"(full|round|best|teacher)-\d{3,}")

Value = TypeVar("Value")


def folder_of(kind: str, number: int) -> str:
    """Return the folder of a model of a round: `full`, `round` (the small one) or `best`."""
    return f"{kind}-{number:03d}"


def recipe_name(changes: int) -> str:
    """Return the file name of the recipe after so many changes of settings. No earlier commit had this name."""
    return f"recipe-{changes + 1:03d}.yaml" if changes else RECIPE


def is_ours(rel: str) -> bool:
    """Whether `rel` is a plain relative path inside a folder that belongs to the state."""
    parts = PurePosixPath(rel).parts
    plain = rel == "/".join(parts) and ".." not in parts and not {"\\", "\n", "\0"} & set(rel)
    return plain and len(parts) > 1 and OURS.fullmatch(parts[0]) is not None


def below(files: Mapping[str, Value], rel: str) -> dict[str, Value]:
    """Return the entry of the file `rel`, or of all files in the folder `rel`."""
    return {name: value for name, value in files.items() if name == rel or name.startswith(f"{rel}/")}
