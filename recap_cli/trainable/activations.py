"""What a layer need not keep for its backward pass, because the operation before it keeps that in one form or another.

Attention keeps its output, and so does ReLU. GELU and its like keep their input, of which the output is made again for the
columns that are trainable.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

ATTENTION = "ScaledDotProduct"  # in the names of the nodes that torch's fused attentions have in the graph
KEEP_OUTPUT = {"ReLU", "Sigmoid", "Tanh"}
KEEP_INPUT = {
    *("CELU", "ELU", "GELU", "Hardswish", "LeakyReLU", "LogSigmoid", "Mish", "ReLU6", "SELU", "SiLU", "Softplus"),
    *("AccurateGELUActivation", "ClippedGELUActivation", "FastGELUActivation", "GELUActivation", "GELUTanh"),
    *("MishActivation", "NewGELUActivation", "QuickGELUActivation", "SiLUActivation"),
}
LIBRARIES = ("torch.nn.modules.activation", "transformers.activations")
ORIGIN = "_recap_origin"  # an attribute of a tensor: of what an activation function returns, or False where nothing is known


@dataclass(frozen=True)
class Origin:
    """What a tensor is made of, which autograd keeps anyway.

    Attributes:
        kept: of the tensor's shape.
        again: makes the tensor, or any columns of it, of `kept` or of the same columns of that.
        version: of the tensor; a later one has been written to since.
    """

    kept: Tensor
    again: Callable[[Tensor], Tensor]
    version: int


def note_origins(model: nn.Module) -> None:
    """Let what the activation functions of a model return say what it is made of (`origin_of`)."""
    for module in model.modules():
        kind = type(module)
        if kind.__module__ in LIBRARIES and kind.__name__ in KEEP_OUTPUT:
            module.register_forward_hook(_output_is_kept)
        elif kind.__module__ in LIBRARIES and kind.__name__ in KEEP_INPUT and not getattr(module, "inplace", False):
            module.register_forward_hook(_input_is_kept)


def origin_of(x: Tensor) -> Origin | None:
    """What autograd keeps of a tensor whoever else needs it, or None if that is not known."""
    if not x.requires_grad:
        return None
    found: Origin | bool | None = getattr(x, ORIGIN, None)
    base = x._base if x._is_view() else x
    if found is not False and base is not None and ATTENTION in type(base.grad_fn).__name__:
        return Origin(x.detach(), _itself, x._version)
    return found if isinstance(found, Origin) and found.version == x._version else None


def forget_origins(values: Any) -> None:
    """Let tensors in `values`, of any structure, say nothing of what they are made of.

    Nobody keeps what is on the other side of a region that is recomputed; and the region must find the same in each run.
    """
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            setattr(leaf, ORIGIN, False)


def _itself(x: Tensor) -> Tensor:
    return x


def _output_is_kept(_: nn.Module, args: Any, out: Tensor) -> None:
    if torch.is_grad_enabled() and out.requires_grad:
        setattr(out, ORIGIN, Origin(out.detach(), _itself, out._version))


def _input_is_kept(module: nn.Module, args: Any, out: Tensor) -> None:
    if torch.is_grad_enabled() and out.requires_grad and args:
        setattr(out, ORIGIN, Origin(args[0].detach(), module.forward, out._version))
