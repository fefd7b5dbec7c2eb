"""Frozen matrices as int8 codes: symmetric, one scale per output channel, that is per row (paper, end of sec. 3)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from recap_cli.api import FrozenWeight

LARGEST = 127  # of the codes; -128 is left out, so that they are symmetric


def quantize(matrix: Tensor) -> dict[str, Tensor]:
    """Return codes, int8, (out, in), and a scale per row, fp32, (out, 1): `codes · scale` is within half a scale."""
    largest = matrix.detach().float().abs().amax(1, keepdim=True)  # (out, 1)
    scale = largest.div_(LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    codes = (matrix.detach() / scale).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)  # (out, in)
    return {"codes": codes, "scale": scale}


def dense(parts: Mapping[str, Tensor], out: Tensor) -> None:
    """Write codes · scale, rounded once."""
    torch.mul(parts["codes"], parts["scale"], out=out)  # (out, in)


def rows(parts: Mapping[str, Tensor], ids: Tensor, out: Tensor) -> None:
    """Write the same of some rows."""
    torch.mul(parts["codes"][ids], parts["scale"][ids], out=out)  # (count, in)


def nbytes(shape: tuple[int, int]) -> int:
    """A byte per entry, and four per row."""
    return shape[0] * shape[1] + 4 * shape[0]


INT8 = FrozenWeight(dtype=torch.bfloat16, quantize=quantize, dense=dense, rows=rows, nbytes=nbytes)
