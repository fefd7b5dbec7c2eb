"""Position embeddings for another image size, resampled once, as the library does at every forward."""

from math import isqrt

import torch
from torch import Tensor, nn

from recap_cli.errors import ModelError


def resample(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample position embeddings to a patch grid.

    Bicubic without antialiasing, as `interpolate_pos_encoding` of transformers' ViT, DeiT and DINOv2.

    Args:
        positions: Shape (1, prefix + side · side, hidden). The prefix (class and distillation token) does not change. There is
            none where the positions are a square, as of Swin.
        grid: The new (height, width).

    Returns:
        Shape (1, prefix + height · width, hidden).

    Raises:
        ModelError: The embeddings have another shape.
    """
    if positions.dim() != 3 or positions.shape[0] != 1:
        raise ModelError(
            f"position embeddings of shape {tuple(positions.shape)} cannot be resampled: expected (1, tokens, hidden)"
        )
    side = isqrt(positions.shape[1])
    prefix = positions.shape[1] - side * side
    if (side, side) == grid:
        return positions
    square = positions[:, prefix:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, hidden, side, side)
    new = nn.functional.interpolate(square.float(), size=grid, mode="bicubic", align_corners=False).to(positions.dtype)
    patches = new.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)  # (1, height · width, hidden)
    return torch.cat((positions[:, :prefix], patches), dim=1)
