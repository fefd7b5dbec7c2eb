"""Linear layers of which only some entries are trainable: no gradient and no optimizer state for the rest, ever.

The forward is one matrix product with one weight, as in a dense layer. The trainable entries are a *compact* parameter that
holds only those rows (query, key, value, fc1) or columns (output matrix, fc2). The backward computes its gradient directly at
that size, from `grad_out[:, rows]ᵀ @ x` or `grad_outᵀ @ x[:, cols]`, and saves of `x` no more than that product needs. S2FT
(2412.06289) has the published relative of the idea; it cannot accumulate gradients, and masks by heads and channels only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recap_cli.trainable.activations import origin_of
from recap_cli.trainable.frozen_weights import Partition, Place, QuantizedMatrix, dense_weight

ALL_COLUMNS = Partition(1, None, None)


class PartialLinear(nn.Module):
    """A linear layer whose `weight` is frozen but for the entries that a partition names: x (…, in) → (…, out).

    Build it with `make_partial`.
    """

    weight: Tensor  # None where there is a `matrix`
    matrix: QuantizedMatrix | None
    bias: Tensor | None
    place: Tensor | None
    rest: Tensor | None

    def __init__(
        self,
        weight: Tensor | QuantizedMatrix,
        part: nn.Parameter | None,
        bias: Tensor | None,
        bias_part: nn.Parameter | None,
        partition: Partition,
    ) -> None:
        """A layer of these tensors, which are not copied.

        Args:
            weight: what the forward reads, (out, in), or (in, out) for a transposed layer. A quantized one, (out, in), is of
                the frozen entries only: each forward and backward makes the dense weight of this one layer from it and
                from `part`, and drops it again.
            part: the trainable entries in fp32, (rows, in) or (out, columns), or the transpose of that as `weight`.
            bias: (out,).
            bias_part: the trainable rows of the bias, (rows,), where these are the rows of `part`.
            partition: which entries of the weight are trainable.
        """
        super().__init__()
        self.dim, self.transposed = partition.dim, partition.transposed
        place, rest = partition.trainable, partition.frozen
        self.span, self.rest_span = (p if isinstance(p, slice) else None for p in (place, rest))
        self.register_buffer("place", place if isinstance(place, Tensor) else None, persistent=False)
        self.register_buffer("rest", rest if isinstance(rest, Tensor) else None, persistent=False)
        self.matrix = weight if isinstance(weight, QuantizedMatrix) else None
        self.register_buffer("weight", weight if isinstance(weight, Tensor) else None)
        self.part, self.bias_part = part, bias_part
        if isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:  # (…, in) → (…, out)
        weight = self.matrix if self.matrix is not None else self.weight.t() if self.transposed else self.weight  # (out, in)
        partition = Partition(self.dim, self.span or self.place, self.rest_span or self.rest, self.transposed)
        if not torch.is_grad_enabled():
            return F.linear(x, _whole(weight, self.part, partition, x.dtype), self.bias)  # (…, out)
        # A bias of which only the chosen rows are trainable is read from its buffer; its gradient goes to `bias_part`.
        out: Tensor = _Partial.apply(x, self.part, self.bias_part, weight, self.bias, partition)  # (…, out)
        return out

    def extra_repr(self) -> str:
        kind = str(self.weight.dtype).removeprefix("torch.") if self.matrix is None else self.matrix.weights.name
        if self.part is None:
            return f"{kind}, frozen"
        trainable = self.part.shape[1 - self.dim if self.transposed else self.dim]
        return f"{kind}, {trainable} {('rows', 'columns')[self.dim]} trainable"


def keep_inputs_once(model: nn.Module) -> None:
    """Let the linear layers of a model that are trained whole keep no input of which `activations` knows what it is made of."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.requires_grad and "forward" not in vars(module):
            module.forward = partial(_linear, module)  # type: ignore[method-assign]


def _linear(layer: nn.Linear, input: Tensor) -> Tensor:  # (…, in) → (…, out)
    if origin_of(input) is None or not torch.is_grad_enabled():
        return F.linear(input, layer.weight, layer.bias)
    out: Tensor = _Partial.apply(input, layer.weight, None, layer.weight.detach(), layer.bias, ALL_COLUMNS)
    return out


class _Partial(torch.autograd.Function):
    """`x @ weightᵀ + bias` with gradients for x, for the chosen rows or columns of the weight, and for its bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        part: Tensor | None,
        bias_part: Tensor | None,
        weight: Tensor | QuantizedMatrix,
        bias: Tensor | None,
        partition: Partition,
    ) -> Tensor:
        saved, ctx.again = None, None
        if ctx.needs_input_grad[1]:
            saved, ctx.again = _input(x, partition)  # (…, in) or (…, columns)
        matrix = weight if isinstance(weight, QuantizedMatrix) else None
        dense, masters = (weight, None) if matrix is None else (None, part)
        if not ctx.needs_input_grad[0]:
            matrix, dense, masters = None, None, None
        ctx.save_for_backward(saved, dense, masters)
        ctx.matrix, ctx.partition = matrix, partition  # the parts of a matrix are never written to
        return F.linear(x, _whole(weight, part, partition, x.dtype), bias)  # (…, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, dense, part = ctx.saved_tensors  # (…, in) or (…, columns)
        weight = dense if ctx.matrix is None else ctx.matrix
        needs_part, needs_rows, needs_bias = (ctx.needs_input_grad[i] for i in (1, 2, 4))
        partition = ctx.partition
        flat = grad_out.reshape(-1, grad_out.shape[-1])  # (tokens, out)
        rows = flat  # (tokens, rows), which are all rows where columns are trainable
        if partition.dim == 0 and (needs_part or needs_rows):
            rows = _at(flat, partition.trainable, keep=True)
        grad_part, grad_x = None, None
        if needs_part:
            if ctx.again is not None:
                x = ctx.again(_at(x, partition.trainable, keep=True))  # (…, columns)
            grad_part = _product(rows, x.reshape(-1, x.shape[-1]), partition.transposed)  # (rows, in) or (out, columns)
        grad_rows = rows.sum(0).float() if needs_rows else None  # (rows,)
        grad_bias = flat.sum(0) if needs_bias else None  # (out,)
        if weight is not None:
            grad_x = grad_out @ _whole(weight, part, partition, grad_out.dtype)  # (…, in)
        return grad_x, grad_part, grad_rows, None, grad_bias, None


def _input(x: Tensor, partition: Partition) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """What is kept of the input, and what makes the trainable columns of that in the backward pass, if these are not it."""
    if partition.dim == 0:
        return x, None  # (…, in)
    origin = origin_of(x)
    if origin is not None:
        return origin.kept, origin.again  # (…, in)
    return _at(x, partition.trainable, keep=False), None  # (…, columns)


def _product(rows: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """The gradient of a compact parameter in its own layout, so that autograd takes it as it is.

    Args:
        rows: the gradient of the output, (tokens, rows).
        x: the input, (tokens, columns).
        transposed: True for a parameter of (columns, rows).
    """
    return (x.t() @ rows if transposed else rows.t() @ x).float()  # (columns, rows) or (rows, columns)


def _whole(weight: Tensor | QuantizedMatrix, part: Tensor | None, partition: Partition, dtype: torch.dtype) -> Tensor:
    """The whole weight, (out, in): the dense one itself, or a new tensor made of quantized entries and masters."""
    if isinstance(weight, Tensor):
        return weight
    upright = part.t() if partition.transposed and part is not None else part  # (rows, in) or (out, columns)
    return dense_weight(weight, upright, partition, dtype=dtype)


def _at(x: Tensor, place: Place | None, *, keep: bool) -> Tensor:
    """The features of `x` at `place` (None: all); a copy unless `keep` says that `x` lives on anyway."""
    if place is None:
        return x
    if isinstance(place, slice):
        part = x[..., place]  # (…, chosen)
        return part if keep else part.contiguous()
    return x.index_select(-1, place)  # (…, chosen)
