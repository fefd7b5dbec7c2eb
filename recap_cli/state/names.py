"""The names of what a state folder holds, and the order of its stages."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import TypeVar

SCHEMA = 3  # of state.yaml; there is one, and no other is read
NEXT_STAGE = {"init": "prune", "prune": "mask", "mask": "finetune", "finetune": "merge", "merge": "prune"}
STAGES = tuple(NEXT_STAGE)

COMMIT = "state.yaml"
RECIPE = "recipe.yaml"
RECIPES = re.compile(r"recipe(-\d{3,})?\.yaml")  # of which the manifest names one
UNDER_WAY = ".recap-init"  # lies in a folder from the first moment of its `init` to the commit
OURS = re.compile(r"(full|round|best)-\d{3,}")

Of = TypeVar("Of")


def folder_of(kind: str, number: int) -> str:
    """The folder of a round: of its full model, its small model (`round`), or the best one if it is that."""
    return f"{kind}-{number:03d}"


def recipe_name(changes: int) -> str:
    """The file of the recipe after so many changes of settings: a name that no commit before has had."""
    return f"recipe-{changes + 1:03d}.yaml" if changes else RECIPE


def is_ours(rel: str) -> bool:
    """Whether `rel` is a plain relative place inside a folder that belongs to the state."""
    parts = PurePosixPath(rel).parts
    plain = rel == "/".join(parts) and ".." not in parts and not {"\\", "\n", "\0"} & set(rel)
    return plain and len(parts) > 1 and OURS.fullmatch(parts[0]) is not None


def below(files: Mapping[str, Of], rel: str) -> dict[str, Of]:
    """The file `rel`, or all files in the folder `rel`."""
    return {name: of for name, of in files.items() if name == rel or name.startswith(f"{rel}/")}
