"""Position embeddings for another image size, resampled once, as the library itself would at every forward call."""

from math import isqrt

import torch
from torch import Tensor, nn

from recap_cli.errors import ModelError


def resample(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """The embeddings, shape (1, prefix + height · width, hidden), of a patch grid of that height and width.

    Bicubic and without antialiasing, as `interpolate_pos_encoding` of transformers' ViT, DeiT and DINOv2. What comes before the
    largest square of positions (class and distillation token) stays as it is. Raises `ModelError` for another shape.
    """
    if positions.dim() != 3 or positions.shape[0] != 1:
        raise ModelError(
            f"position embeddings of shape {tuple(positions.shape)} cannot be resampled: (1, tokens, hidden) is wanted"
        )
    side = isqrt(positions.shape[1] - 1)  # each of these models has a class token, so one position at least is no patch
    prefix = positions.shape[1] - side * side
    if (side, side) == grid:
        return positions
    square = positions[:, prefix:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, hidden, side, side)
    new = nn.functional.interpolate(square.float(), size=grid, mode="bicubic", align_corners=False).to(positions.dtype)
    patches = new.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)  # (1, height · width, hidden)
    return torch.cat((positions[:, :prefix], patches), dim=1)
