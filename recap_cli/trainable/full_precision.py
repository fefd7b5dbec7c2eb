"""What computes in fp32 though weights are held in another type: batch norms, and the loss that a model has of its own.

Statistics of batch norms are buffers, which keep their type; torch has no batch norm of bf16 weights with them. Losses of
models with queries match by costs, and sum over all points of a mask, which bf16 is too coarse for.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map


def compute_in_fp32(model: nn.Module) -> None:
    """Let these parts of a model read what they are given, and their weights, in fp32."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.forward = partial(_normalised, module)  # type: ignore[method-assign]
    if (loss := own_loss(model)) is not None:
        loss.register_forward_pre_hook(_in_fp32, with_kwargs=True)


def own_loss(model: nn.Module) -> nn.Module | None:
    """Return the loss that a model computes itself: the module `criterion`, as models of transformers with queries have it.

    It matches queries with the objects of a whole batch, so that the loss of a batch is no sum over its parts.
    """
    found = getattr(model, "criterion", None)
    return found if isinstance(found, nn.Module) else None


def _normalised(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Return what a batch norm makes of `x` by its running statistics, in the type of `x`."""
    weight, bias = (None if param is None else param.float() for param in (norm.weight, norm.bias))
    return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, eps=norm.eps)


def _in_fp32(_: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map(
        lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16 else leaf, (args, kwargs)
    )
