"""Four known ways to let only some rows of a Linear's weight move, to compare with ours."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SHARE = 8  # one row in so many may move


def rows_of(outputs: int) -> Tensor:
    """One row in eight, scattered."""
    return torch.arange(0, outputs, SHARE)


class Masked(nn.Linear):
    """Dense gradients, multiplied by a mask before the step: the authors' code."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.register_buffer("mask", torch.zeros(outputs, inputs))
        self.mask[rows_of(outputs)] = 1.0


class IndexCopy(nn.Module):
    """The trainable rows are copied into the frozen weight in each forward: the manner of PEFT's trainable tokens."""

    rows: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs), requires_grad=False)
        self.part = nn.Parameter(torch.randn(outputs // SHARE, inputs))
        self.register_buffer("rows", rows_of(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.index_copy(0, self.rows, self.part))


class CompactCopy(IndexCopy):
    """An autograd function with a compact gradient; the trainable rows are a second copy, written back after the step."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Compact.apply(x, self.part, self.weight, self.rows)
        return out

    @torch.no_grad()
    def write_back(self) -> None:
        self.weight.index_copy_(0, self.rows, self.part)


class _Compact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, rows)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rows = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        return grad_x, grad.index_select(-1, rows).t() @ x, None, None


class RowsFirst(nn.Module):
    """The trainable rows stand first and the weight in two pieces: two products and a concatenation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.part = nn.Parameter(torch.randn(outputs // SHARE, inputs))
        self.rest = nn.Parameter(torch.randn(outputs - outputs // SHARE, inputs), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, self.part), F.linear(x, self.rest)], -1)
