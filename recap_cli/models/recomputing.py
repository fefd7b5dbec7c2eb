"""Activations that are recomputed in the backward pass instead of being kept (Chen et al., 2016), by a library or by block."""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

from torch import nn

from recap_cli.core.adapter import is_linear, is_transposed
from recap_cli.core.axes import Axis
from recap_cli.core.surgery import owner_of
from recap_cli.errors import ModelError
from recap_cli.trainable.recomputed import recompute


def enable_checkpointing(model: nn.Module, blocks: Callable[[], Sequence[str]] = tuple) -> None:
    """Recompute each block's activations in the backward pass instead of keeping them.

    Where a model refuses that as a whole, as Mask2Former does, the models inside it that do not refuse recompute theirs: its
    backbone, say. Of the `blocks`, which are asked for only then, those that are in none of these are recomputed one by one.

    Raises:
        ModelError: Neither the model nor any part of it can, and there are no blocks.
    """
    able = list(_recomputing(model, ""))
    if "" in able:
        return
    left = [path for path in blocks() if not any(path == part or path.startswith(f"{part}.") for part in able)]
    for path in left:
        recompute(model.get_submodule(path))
    if not able and not left:
        raise ModelError(f"{type(model).__name__} cannot recompute its activations", hint="--set finetune.checkpointing=false")


def recompute_attention(model: nn.Module, axes: Sequence[Axis]) -> None:
    """Recompute the attention of each block that has heads to prune, from its input to what its last matrix reads or gives.

    It is the module that holds query, key and value: with the library's fused kernels these are most of what attention keeps.

    Raises:
        ModelError: No module holds these and no neurons besides.
    """
    others = [cut.param for axis in axes if axis.kind != "heads" for cut in axis.cuts]
    found = set[str]()
    for axis in axes:
        if axis.kind == "heads" and (path := _holder(model, axis)):
            found.add(path)
    able = [path for path in sorted(found) if not any(param.startswith(f"{path}.") for param in others)]
    if not able:
        raise ModelError(
            f"no module of {type(model).__name__} is the attention of a block", hint="--set finetune.checkpointing=true"
        )
    for path in able:
        recompute(model.get_submodule(path))


def _holder(model: nn.Module, axis: Axis) -> str:
    """The path of the innermost module that holds all matrices of which the heads are rows; "" if that is the model itself."""
    rows = []
    for cut in axis.cuts:
        layer, attribute = owner_of(model, cut.param)
        if attribute == "weight" and is_linear(layer) and cut.dim == (1 if is_transposed(layer) else 0):
            rows.append(cut.param.split(".")[:-2])
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*rows, strict=False)))


def _recomputing(module: nn.Module, path: str) -> Iterator[str]:
    """Make a module recompute its activations, or else all of its parts that can; yields the paths of those that do."""
    switches: Any = module
    how = {"use_reentrant": False}
    try:
        if hasattr(module, "activation_checkpointing_enable"):
            switches.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
        elif hasattr(module, "gradient_checkpointing_enable"):  # its name in earlier releases of transformers 5
            switches.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        else:
            switches.set_grad_checkpointing(True)
        if hasattr(module, "disable_input_require_grads"):
            # transformers makes the output of the embeddings require a gradient; the backward would run through frozen layers
            switches.disable_input_require_grads()
        if hasattr(getattr(module, "config", None), "use_cache"):
            switches.config.use_cache = False  # with checkpointing transformers warns of it at every forward
    except (AttributeError, ValueError):  # of the library: the module has no such switch, or does not support it
        for name, part in module.named_children():
            yield from _recomputing(part, f"{path}.{name}" if path else name)
        return
    yield path
