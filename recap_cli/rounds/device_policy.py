"""How the full model runs on a device that need not have room for it: a block at a time, and few examples at a time."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from recap_cli.core.axes import Axis
from recap_cli.core.blocks import block_paths
from recap_cli.core.streaming import streamed
from recap_cli.errors import PluginError
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.frozen_weights import frozen_weight_of


def on_device(model: nn.Module, axes: Sequence[Axis], device: torch.device, adapter: str) -> AbstractContextManager[None]:
    """Inside, a model on the CPU runs on `device`, a block at a time; on the CPU it runs as it is, and is not touched.

    Raises:
        PluginError: the adapter, which is named, has axes that do not say what the blocks are.
    """
    return nullcontext() if device.type == "cpu" else streamed(model, blocks_of(model, axes, adapter), device)


def blocks_of(model: nn.Module, axes: Sequence[Axis], adapter: str) -> list[str]:
    """The paths of the model's blocks, of which one at a time is on a device. Raises `PluginError` if they cannot be found."""
    try:
        return block_paths(model, axes)
    except LookupError as error:
        raise PluginError(
            f"the adapter {adapter!r} does not say which blocks can go to a device one at a time: {error}",
            hint="let its function `axes` name them PATH.KIND, PATH being a block's; or --set importance.device=cpu, "
            "and with a teacher that the run makes --set finetune.device=cpu",
        ) from error


def importance_batch_size(recipe: Recipe, device: torch.device) -> int:
    """Examples at a time; on an accelerator so many that importance fits into the memory that finetuning takes there.

    Importance is computed in fp32, and each of its blocks holds all of its activations: half as many examples where finetuning
    has bf16 activations, and half again where it has checkpoints.
    """
    if device.type == "cpu":
        return recipe.importance.batch_size
    tune = recipe.finetune
    is_half = frozen_weight_of(tune.weights).dtype.itemsize < torch.float32.itemsize
    size = (tune.micro_batch_size or tune.batch_size) // (1 + is_half) // (1 + bool(tune.checkpointing))
    return min(recipe.importance.batch_size, max(1, size))
