"""What of a model does not follow its weights into another type than float32 by itself: batch norms, and a loss of its own."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

OWN_LOSS = "criterion"  # what transformers calls the loss of a model that matches its queries with what an image shows


def buffer_dtype(module: nn.Module, buffer: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the type that a buffer has beside weights of a type: its own; the statistics of a batch norm have the weights'."""
    return dtype if isinstance(module, _BatchNorm) and buffer.is_floating_point() else buffer.dtype


def keep_own_loss_in_fp32(model: nn.Module) -> None:
    """Let the loss that a model computes itself see outputs in float32: its sampling and its sums are not made for others."""
    own = getattr(model, OWN_LOSS, None)
    if isinstance(own, nn.Module) and _in_fp32 not in own._forward_pre_hooks.values():
        own.register_forward_pre_hook(_in_fp32, with_kwargs=True)


def _in_fp32(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return tree_map(_float, args), tree_map(_float, kwargs)


def _float(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
