"""Frozen weights in int8: symmetric, one scale per output channel, made dense again one layer at a time (paper, end of sec. 3).

Only what does not move is ever quantized. What moves stays in fp32, and no merge reads a code: the full model loses nothing.
"""

import torch
from torch import Tensor, nn

Place = slice | Tensor  # indices along one dimension: a slice where they stand side by side
LARGEST = 127  # of the codes; -128 is left out, so that they are symmetric


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int8, (out, in), and a scale per row, fp32, (out, 1): `codes · scale` is `weight` to within half a scale."""
    scale = weight.detach().float().abs().amax(1, keepdim=True).div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    return (weight.detach() / scale).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scale


@torch.no_grad()
def dequantize(
    codes: Tensor, scale: Tensor, part: Tensor | None, dim: int, place: Place | None, rest: Place | None, *, dtype: torch.dtype
) -> Tensor:
    """A dense weight, (out, in), of `dtype`: the codes, at `rest` along `dim`, and the fp32 entries of `part` at `place`.

    Without a `part` the codes are the whole weight.
    """
    if part is None or place is None or rest is None:
        return codes.to(dtype).mul_(scale)
    shape = list(codes.shape)
    shape[dim] += part.shape[dim]
    dense = torch.empty(shape, dtype=dtype, device=codes.device)
    if isinstance(place, slice):
        _span(dense, dim, place).copy_(part)
    else:
        dense.index_copy_(dim, place, part.to(dtype))
    if isinstance(rest, slice):
        torch.mul(codes, scale, out=_span(dense, dim, rest))
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
    return torch.ones(length, dtype=torch.bool).index_fill_(0, index, False).nonzero().flatten()


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
        return self.codes[ids].to(self.dtype).mul_(self.scale[ids])


def _span(dense: Tensor, dim: int, place: slice) -> Tensor:
    return dense.narrow(dim, place.start, place.stop - place.start)
