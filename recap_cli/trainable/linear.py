"""Linear layers of which only some entries may move: no gradient and no optimizer state for the rest, ever.

The forward is one matrix product on one resident weight, as in a dense layer. What may move is a *compact* parameter that
holds only those rows (query, key, value, fc1) or columns (output matrix, fc2); the backward computes its gradient directly at
that size, from `grad_out[:, rows]ᵀ @ x` or `grad_outᵀ @ x[:, cols]`, and saves of `x` no more than that product needs. S2FT
(2412.06289) has the published relative of the idea; it cannot accumulate gradients, and masks by heads and channels only.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recap_cli.trainable.frozen_weights import Place, dequantize


class PartialLinear(nn.Module):
    """A linear layer whose `weight` is resident and frozen but for the entries at `place` along `dim` of (out, in).

    `x` is (…, in), the result (…, out). `part` has shape (rows, in) for dim 0 and (out, columns) for dim 1, in fp32; a
    transposed layer (GPT-2's Conv1D) keeps weight and part as (in, out). With a `scale`, (out, 1), `weight` holds int8 codes,
    (out, in), of the frozen entries only: each forward and backward makes the dense weight of this one layer from them and from
    `part`, and drops it again. Build it with `make_partial`.
    """

    weight: Tensor
    bias: Tensor | None
    place: Tensor | None
    scale: Tensor | None
    rest: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        part: nn.Parameter | None,
        bias: Tensor | None,
        bias_part: nn.Parameter | None,
        *,
        dim: int,
        place: Place | None,
        transposed: bool = False,
        scale: Tensor | None = None,
        rest: Place | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.transposed = dim, transposed
        self.span, self.rest_span = (p if isinstance(p, slice) else None for p in (place, rest))
        self.register_buffer("place", place if isinstance(place, Tensor) else None, persistent=False)
        self.register_buffer("rest", rest if isinstance(rest, Tensor) else None, persistent=False)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.part, self.bias_part = part, bias_part
        if isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:  # (…, in) → (…, out)
        weight = self.weight.t() if self.transposed and self.scale is None else self.weight
        index_map = (self.dim, self.span or self.place, self.rest_span or self.rest, self.transposed)
        if not torch.is_grad_enabled():
            return F.linear(x, _whole(weight, self.scale, self.part, index_map, x.dtype), self.bias)
        # A bias of which only the chosen rows move is read from its resident buffer; its gradient goes to `bias_part`.
        out: Tensor = _Partial.apply(x, self.part, self.bias_part, weight, self.scale, self.bias, index_map)
        return out

    def extra_repr(self) -> str:
        kind = "int8" if self.scale is not None else str(self.weight.dtype).removeprefix("torch.")
        if self.part is None:
            return f"{kind}, nothing moves"
        moving = self.part.shape[1 - self.dim if self.transposed else self.dim]
        return f"{kind}, {moving} {('rows', 'columns')[self.dim]} move"


# The dimension of (out, in); what moves along it; what does not; whether `part` is (in, out).
Places = tuple[int, Place | None, Place | None, bool]


class _Partial(torch.autograd.Function):
    """`x @ weightᵀ + bias` with gradients for x, for the chosen rows or columns of the weight, and for its bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        part: Tensor | None,
        bias_part: Tensor | None,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        index_map: Places,
    ) -> Tensor:
        dim, place, _, _ = index_map
        saved = (x if dim == 0 else _at(x, place, keep=False)) if ctx.needs_input_grad[1] else None
        kept = (weight, scale, part if scale is not None else None) if ctx.needs_input_grad[0] else (None, None, None)
        ctx.save_for_backward(saved, *kept)
        ctx.index_map = index_map
        return F.linear(x, _whole(weight, scale, part, index_map, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, part = ctx.saved_tensors
        needs_part, needs_rows, needs_bias = (ctx.needs_input_grad[i] for i in (1, 2, 5))
        dim, place, _, transposed = ctx.index_map
        flat = grad_out.reshape(-1, grad_out.shape[-1])  # (tokens, out)
        rows = _at(flat, place, keep=True) if dim == 0 and (needs_part or needs_rows) else flat
        grad_part = _product(rows, x.reshape(-1, x.shape[-1]), transposed) if needs_part else None
        grad_rows = rows.sum(0).float() if needs_rows else None
        grad_bias = flat.sum(0) if needs_bias else None
        grad_x = None if weight is None else grad_out @ _whole(weight, scale, part, ctx.index_map, grad_out.dtype)
        return grad_x, grad_part, grad_rows, None, None, grad_bias, None


def _product(rows: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """The gradient of a compact parameter in its own layout, so that autograd takes it as it is."""
    return (x.t() @ rows if transposed else rows.t() @ x).float()


def _whole(weight: Tensor, scale: Tensor | None, part: Tensor | None, index_map: Places, dtype: torch.dtype) -> Tensor:
    """The whole weight, (out, in): the resident itself, or a new tensor made of int8 codes and masters."""
    if scale is None:
        return weight
    dim, place, rest, transposed = index_map
    return dequantize(weight, scale, part.t() if transposed and part is not None else part, dim, place, rest, dtype=dtype)


def _at(x: Tensor, place: Place | None, *, keep: bool) -> Tensor:
    """The features of `x` at `place` (None: all); a copy unless `keep` says that `x` lives on anyway."""
    if place is None:
        return x
    if isinstance(place, slice):
        part = x[..., place]
        return part if keep else part.contiguous()
    return x.index_select(-1, place)
