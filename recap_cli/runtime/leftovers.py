"""Weights of a checkpoint that the model does not have: those of other tasks are left out, half of a model is not."""

import re
from collections.abc import Collection

from torch import nn

from recap_cli.errors import ModelError
from recap_cli.runtime.foreign import some


def notes(model: nn.Module, unexpected: Collection[str], origin: str) -> list[str]:
    """A note that names the weights of the checkpoint which `model` does not have; none where it has them all.

    Raises `ModelError` if any of them belongs to the model's stack of blocks. Then config.json asks for fewer than there are,
    or for others, and the model would not be the one that was trained.
    """
    stacks = {_stack(name) for name, _ in model.named_parameters()}
    stacks |= {stack.partition(".")[2] for stack in stacks}  # a bare encoder's names lack the first part
    stacks.discard("")
    inside = sorted(name for name in unexpected if _stack(name) in stacks)
    if inside:
        raise ModelError(
            f"{origin} does not fit its config.json, which asks for no {some(inside)}",
            hint="see that weights and config.json belong together, the number of layers first",
        )
    if not unexpected:
        return []
    return [f"not used, for this model has no place for them: {some(sorted(unexpected))}"]


def _stack(name: str) -> str:
    """The path of the numbered blocks that a parameter stands in; empty if in none."""
    found = re.match(r"(.*?\.)?\d+\.", name)
    return "" if found is None else found[1] or ""
