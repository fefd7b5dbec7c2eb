"""Weights of a checkpoint that the model does not have: those of other tasks are ignored, missing layers are an error."""

import re
from collections.abc import Collection

from torch import nn

from recap_cli.errors import ModelError
from recap_cli.untrusted.files import some

TEXT_MAPPER = ".text_mapper."  # of OneFormer
BUFFERS = ("masked_bias", "inv_freq", "position_ids", "relative_position_index")  # the library computes these


def notes(model: nn.Module, unexpected: Collection[str], origin: str) -> list[str]:
    """Return notes that name the weights of the checkpoint that the model does not have; empty if it has all.

    Raises:
        ModelError: One of them is a trained weight in the model's blocks, or in a further block. Then config.json does not
            belong to the weights.
    """
    names = {name for name, _ in model.named_parameters()}
    names |= {name.partition(".")[2] for name in names}  # a bare encoder's names lack the first part
    blocks = {_block(name) for name in names}
    stacks = {stack for stack, _ in blocks if stack}
    inside = [name for name in sorted(unexpected) if _block(name)[0] in stacks]
    wrong = [name for name in inside if _block(name) not in blocks or not _is_buffer(name, names | set(unexpected))]
    if wrong:
        raise ModelError(
            f"{origin} does not fit its config.json, which has no {some(wrong)}",
            hint="check that weights and config.json belong together, first the number of layers",
        )
    mapper = [name for name in unexpected if TEXT_MAPPER in f".{name}"]
    others = sorted(set(unexpected).difference(mapper))
    found = [f"ignored weights that this model does not have: {some(others)}"] if others else []
    if mapper:
        found.append(f"left out the text mapper ({len(mapper)} tensors): only a loss of several tasks at once trains it")
    return found


def _block(name: str) -> tuple[str, str]:
    """Return the path of the stack of blocks that a parameter is in, and the number of its block; both empty if in none."""
    found = re.match(r"((?:.*?\.)?)(\d+)\.", name)
    return ("", "") if found is None else (found[1], found[2])


def _is_buffer(name: str, names: Collection[str]) -> bool:
    """Whether a tensor is not a weight. Earlier releases of transformers wrote masks and frequencies, one of them as `bias`."""
    path, _, last = name.rpartition(".")
    return last in BUFFERS or (last == "bias" and f"{path}.weight" not in names)
