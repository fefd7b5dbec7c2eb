"""What is made again in the backward pass (Chen et al., 2016), because it is large, and quick to make."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from recap_cli.trainable.activations import forget_origins

SAMPLING = "scaledeformableattention"  # in the names of classes, in small letters


def recompute(module: nn.Module) -> None:
    """Let a module keep its inputs alone, and run again in the backward pass."""
    module.forward = partial(_recomputed, module.forward)


def recompute_samples(model: nn.Module) -> None:
    """Let deformable attention (Zhu et al., ICLR 2021), where a model has it, sample its values again.

    Without a kernel of its own it holds, for each query, its samples of every level before they are weighted: as much as a
    dozen feedforward blocks of its width. What makes them is a look-up.
    """
    for module in model.modules():
        if SAMPLING in type(module).__name__.lower():
            recompute(module)


def _recomputed(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return plain(*args, **kwargs)
    forget_origins((args, kwargs))
    out = checkpoint(plain, *args, use_reentrant=False, **kwargs)
    forget_origins(out)
    return out
