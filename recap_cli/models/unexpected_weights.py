"""Weights of a checkpoint that the model does not have: those of other tasks are left out, half of a model is not."""

import re
from collections.abc import Collection

from torch import nn

from recap_cli.errors import ModelError
from recap_cli.untrusted.files import some

BUFFERS = ("masked_bias", "inv_freq", "position_ids", "relative_position_index")  # what the library computes by itself


def notes(model: nn.Module, unexpected: Collection[str], origin: str) -> list[str]:
    """A note that names the weights of the checkpoint which `model` does not have; none where it has them all.

    Raises `ModelError` if any of them is a trained weight of the model's stack of blocks, or stands in a block more than these.
    Then config.json asks for fewer than there are, or for others, and the model would not be the one that was trained.
    """
    own = {name for name, _ in model.named_parameters()}
    own |= {name.partition(".")[2] for name in own}  # a bare encoder's names lack the first part
    blocks = {_block(name) for name in own}
    stacks = {stack for stack, _ in blocks if stack}
    inside = [name for name in sorted(unexpected) if _block(name)[0] in stacks]
    wrong = [name for name in inside if _block(name) not in blocks or not _is_buffer(name, own | set(unexpected))]
    if wrong:
        raise ModelError(
            f"{origin} does not fit its config.json, which asks for no {some(wrong)}",
            hint="see that weights and config.json belong together, the number of layers first",
        )
    if not unexpected:
        return []
    return [f"not used, for this model has no place for them: {some(sorted(unexpected))}"]


def _block(name: str) -> tuple[str, str]:
    """The path of the numbered blocks that a parameter stands in, and the number of its own; both empty if in none."""
    found = re.match(r"((?:.*?\.)?)(\d+)\.", name)
    return ("", "") if found is None else (found[1], found[2])


def _is_buffer(name: str, names: Collection[str]) -> bool:
    """Whether a tensor is no weight: older releases of transformers wrote masks and frequencies, one of them as `bias`."""
    path, _, last = name.rpartition(".")
    return last in BUFFERS or (last == "bias" and f"{path}.weight" not in names)
