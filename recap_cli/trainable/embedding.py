"""An embedding of which only those rows are held that are looked up, and of those only some are trainable.

A text model's table of tokens has a row for each word of every language that it was pretrained on; a task uses a part of them.
The others need not lie on the device. The trainable ones have a compact gradient and compact moments, as the rows of a
`PartialLinear` have.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recap_cli.trainable.frozen_weights import QuantizedMatrix


class PartialEmbedding(nn.Module):
    """Looks ids, (…), up in those rows of a table, (ids, width), that it holds: vectors (…, width) of `dtype`.

    Build it with `make_partial`.
    """

    weight: Tensor  # None where there is a `matrix`
    matrix: QuantizedMatrix | None
    place: Tensor

    def __init__(
        self, weight: Tensor | QuantizedMatrix, part: nn.Parameter | None, place: Tensor, *, dtype: torch.dtype
    ) -> None:
        """A table of these rows, which are not copied.

        Args:
            weight: the rows that are held, (held, width), the trainable ones first. A quantized one is of the frozen rows
                only.
            part: the trainable rows, (trainable, width), in fp32 a view of `weight`.
            place: in which row of `weight` each id stands, (ids,), int32; an id that is not held stands behind the last.
            dtype: the type of the vectors.
        """
        super().__init__()
        self.dtype = dtype
        self.matrix = weight if isinstance(weight, QuantizedMatrix) else None
        self.register_buffer("weight", weight if isinstance(weight, Tensor) else None)
        self.register_buffer("place", place)
        self.part = part

    def forward(self, ids: Tensor) -> Tensor:  # (…) → (…, width)
        at = self.place[ids].long()  # (…)
        if self.part is None or not torch.is_grad_enabled():
            return _rows(at, self._held, self.part, self.dtype)
        out: Tensor = _LookUp.apply(at, self.part, self._held, self.dtype)  # (…, width)
        return out

    @property
    def _held(self) -> Tensor | QuantizedMatrix:
        """The rows that are held, as they are."""
        return self.weight if self.matrix is None else self.matrix

    @property
    def absent(self) -> int:
        """How many entries of the whole table are not held."""
        beside = 0 if self.part is None or self.matrix is None else len(self.part)  # the matrix is of the other rows
        rows, width = self._held.shape
        return (len(self.place) - rows - beside) * width

    def extra_repr(self) -> str:
        held = len(self.place) - self.absent // self._held.shape[1]
        return f"{held} of {len(self.place)} rows, {0 if self.part is None else len(self.part)} trainable"


class _LookUp(torch.autograd.Function):
    """The rows at `at`, with a gradient for the first of them, summed up in fp32."""

    @staticmethod
    def forward(ctx: Any, at: Tensor, part: Tensor, weight: Tensor | QuantizedMatrix, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(at)
        ctx.trained = len(part)
        return _rows(at, weight, part, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[None, Tensor, None, None]:
        (at,) = ctx.saved_tensors
        # Frozen rows share one place behind the others, whose gradient is never summed up.
        trained, rows = ctx.trained, at.clamp(max=ctx.trained)  # (…)
        grad = torch.ops.aten.embedding_dense_backward(  # (trainable + 1, width)
            grad_out.float(), rows, trained + 1, trained, False
        )
        return None, grad[:trained], None, None  # (trainable, width)


def _rows(at: Tensor, weight: Tensor | QuantizedMatrix, part: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows of the table at `at`, (…): of the dense one itself, or of quantized rows and masters."""
    if isinstance(weight, Tensor):
        return F.embedding(at, weight)  # (…, width)
    trained = 0 if part is None else len(part)
    if part is not None and weight.shape[0] == 0:
        return part[at].to(dtype)  # (…, width)
    frozen = (at - trained).clamp_(min=0)  # (…)
    out = weight.rows(frozen, dtype)  # (…, width)
    if part is None:
        return out
    is_trainable = (at < trained).unsqueeze(-1)  # (…, 1)
    return torch.where(is_trainable, part[at.clamp(max=trained - 1)].to(dtype), out)  # (…, width)


def places(count: int, held: Tensor) -> Tensor:
    """The row in which each of `count` ids stands, int32, if those `held` stand one after another; others behind the last."""
    place = torch.full((count,), len(held), dtype=torch.int32)  # (ids,)
    place[held] = torch.arange(len(held), dtype=torch.int32)
    return place


def is_plain(module: nn.Module) -> bool:
    """Whether a module looks rows up and does nothing else to them."""
    return is_lookup(module) and type(module) is nn.Embedding and not module.scale_grad_by_freq


def is_lookup(module: nn.Module) -> bool:
    """Whether the forward of a module, which may be of a class of its own, looks rows up and does nothing else to them.

    Gemma's tables of tokens scale what they look up.
    """
    looks_up = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward and module.max_norm is None
    return looks_up and not is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether third-party code waits for the module's forward: another module in its place would not call it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
