"""Layer norms that keep their output for the backward pass, which the next layer keeps too, and not their input besides.

The normalised input is (y - bias) / weight. "Memory-sharing backpropagation" (Yang et al., ICML 2024, 2406.16282) has the idea
with the affine part merged into the next layer. Here the norm stays what it is, and its kernels are torch's own.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PLAIN = {("torch.nn.modules.normalization", "LayerNorm"), ("timm.layers.norm", "LayerNorm")}
SMALLEST = 1e-6  # of a weight that is divided by
FAR = {torch.float32: 64.0}  # how many times a bias may be as large as its weight: so many roundings are in the quotient
FAR_ELSE = 1.0  # of bf16
FAINT = 0.05  # of a norm's median weight: one below that may come near to 0 in training, where bf16 has no digits left
MOST_FAR = 0.25  # of a norm's features: beyond that it keeps its input


def keep_outputs(model: nn.Module) -> None:
    """Let the layer norms of a model, over one dimension, keep their output in place of their input.

    A feature whose weight is tiny beside its bias cannot be had back from the output. Its normalised input is kept besides;
    weights are looked at now, and move little while they are trained. A norm with many such features stays as it is.
    """
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and _is_plain(module):
            far = _far(module)
            if far is None or len(far) <= MOST_FAR * module.normalized_shape[0]:
                module.forward = partial(_normalised, module, far)  # type: ignore[method-assign]


def _is_plain(module: nn.LayerNorm) -> bool:
    kind = type(module)
    return (kind.__module__, kind.__name__) in PLAIN and len(module.normalized_shape) == 1 and "forward" not in vars(module)


def _far(module: nn.LayerNorm) -> Tensor | None:
    """The features whose normalised input the output does not tell, (features,); None for none, or no values."""
    weight, bias = module.weight, module.bias
    if weight is None or type(weight.detach()) is not Tensor or weight.is_meta:
        return None
    own = weight.detach().abs().float()
    size = torch.zeros_like(own) if bias is None else bias.detach().abs().float()
    found = (size > FAR.get(weight.dtype, FAR_ELSE) * own) | (own < SMALLEST)
    if weight.dtype not in FAR:
        found |= own < FAINT * own.median()
    return found.nonzero().flatten() if found.any() else None


def _normalised(module: nn.LayerNorm, far: Tensor | None, input: Tensor) -> Tensor:  # (…, features) → (…, features)
    if not torch.is_grad_enabled():
        return nn.functional.layer_norm(input, module.normalized_shape, module.weight, module.bias, module.eps)
    out: Tensor = _Norm.apply(input, module.weight, module.bias, module.eps, far)
    return out


class _Norm(torch.autograd.Function):
    """A layer norm over the last dimension, whose backward is torch's on the input that its output tells."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, far: Tensor | None) -> Tensor:
        out, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)  # (…, features), (…, 1), (…, 1)
        kept = None if far is None else (x.index_select(-1, far) - mean.to(x.dtype)) * rstd.to(x.dtype)  # (…, far)
        ctx.save_for_backward(out, rstd, weight, bias, far, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        out, rstd, weight, bias, far, kept = ctx.saved_tensors
        x = out.clone() if bias is None else out - bias  # (…, features)
        if weight is not None:
            x /= weight.masked_fill(weight.abs() < SMALLEST, SMALLEST)
        if far is not None:
            x.index_copy_(-1, far, kept)
        x /= rstd  # of mean 0 and the deviation of the input: the kernel makes the normalised one of it
        mask = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.native_layer_norm_backward(
            grad_out, x, x.shape[-1:], torch.zeros_like(rstd), rstd, weight, bias, mask
        )
        return *grads, None, None
