"""Frozen weights in int8: symmetric, one scale per output channel, made dense again one layer at a time (paper, end of sec. 3).

Only frozen entries are ever quantized. Trainable ones stay in fp32, and no merge reads a code: the full model loses nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

Place = slice | Tensor  # indices along one dimension: a slice where they stand side by side
LARGEST = 127  # of the codes; -128 is left out, so that they are symmetric


@dataclass(frozen=True)
class Partition:
    """Which entries of a linear layer's weight, (out, in), are trainable.

    Attributes:
        dim: the dimension of (out, in) along which they are chosen: 0 for rows, 1 for columns.
        trainable: their indices along it; None where all entries are frozen.
        frozen: the indices of the others; None where the frozen weight is dense, and nothing needs them.
        transposed: True for a layer that keeps its weight as (in, out), as GPT-2's Conv1D does.
    """

    dim: int = 0
    trainable: Place | None = None
    frozen: Place | None = None
    transposed: bool = False


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8, (out, in), and a scale per row, fp32, (out, 1): `codes · scale` is `weight` to within half a scale."""
    largest = weight.detach().float().abs().amax(1, keepdim=True)  # (out, 1)
    scale = largest.div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    return (weight.detach() / scale).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scale


@torch.no_grad()
def dequantize(
    codes: Tensor, scale: Tensor, part: Tensor | None = None, partition: Partition = Partition(), *, dtype: torch.dtype
) -> Tensor:
    """The dense weight of a layer, made of its int8 codes and its fp32 masters.

    Args:
        codes: int8, the frozen entries: (frozen, in) for `partition.dim` 0, (out, frozen) for 1.
        scale: fp32, one per row of the codes.
        part: fp32, the trainable entries, as `codes` have them; without them the codes are the whole weight.
        partition: where these stand.
        dtype: the type of the result.

    Returns:
        The weight, (out, in).
    """
    dim, place, rest = partition.dim, partition.trainable, partition.frozen
    if part is None or place is None or rest is None:
        return codes.to(dtype).mul_(scale)
    shape = list(codes.shape)
    shape[dim] += part.shape[dim]
    dense = torch.empty(shape, dtype=dtype, device=codes.device)  # (out, in)
    if isinstance(place, slice):
        _narrow(dense, dim, place).copy_(part)
    else:
        dense.index_copy_(dim, place, part.to(dtype))
    if isinstance(rest, slice):
        torch.mul(codes, scale, out=_narrow(dense, dim, rest))
    else:
        dense.index_copy_(dim, rest, codes.to(dtype).mul_(scale))
    return dense


def place_of(index: Tensor, device: torch.device | str) -> Place:
    """Sorted indices as a slice where they stand side by side (or are none), else on the device."""
    if len(index) == 0:
        return slice(0, 0)
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index.to(device)


def rest_of(index: Tensor, length: int) -> Tensor:
    """The indices below `length` that `index` does not name."""
    return torch.ones(length, dtype=torch.bool).index_fill_(0, index, False).nonzero().flatten()  # (length − chosen,)


class QuantizedEmbedding(nn.Module):
    """A frozen embedding whose rows are int8 codes with a scale each: ids (…) → vectors (…, width) of `dtype`."""

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:  # (…) → (…, width)
        return self.codes[ids].to(self.dtype).mul_(self.scale[ids])  # (…, width)


def _narrow(dense: Tensor, dim: int, place: slice) -> Tensor:
    """The view of a weight at a slice along one dimension."""
    return dense.narrow(dim, place.start, place.stop - place.start)  # (rows, in) or (out, columns)
