"""Random resize, crop and flip of training images and their label maps: a window for each variant of an example."""

from dataclasses import dataclass

import torch

VARIANTS = 64  # windows of each example, drawn once by its place: the same in every process
SCALES = (0.5, 2.0)  # as mmsegmentation has them, and Detectron2 for Mask2Former nearly so


@dataclass(frozen=True)
class Window:
    """What is seen of an image, and where.

    Attributes:
        box: Left, top, right and bottom of what is seen, as shares of the width and the height.
        place: Left, top, width and height of where it is put, as shares of the sides of the result; the rest is padding.
        flip: True turns the result left to right.
    """

    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    place: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    flip: bool = False


WHOLE = Window()


def window(index: int, variant: int) -> Window:
    """Return the window of a variant of the example at `index`; variant 0 is the example as it is.

    The image is scaled by `SCALES`, uniformly in the logarithm. Of a larger one a random part is seen, and a smaller one stands
    at a random place.
    """
    if variant == 0:
        return WHOLE
    generator = torch.Generator().manual_seed(index * (VARIANTS + 1) + variant)
    exponent, x, y, side = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    scale = SCALES[0] * (SCALES[1] / SCALES[0]) ** exponent
    seen, wide = min(1.0, 1 / scale), min(1.0, scale)
    left, top = x * (1 - seen), y * (1 - seen)
    return Window((left, top, left + seen, top + seen), (x * (1 - wide), y * (1 - wide), wide, wide), side < 0.5)


def in_pixels(shares: tuple[float, float, float, float], width: int, height: int) -> tuple[float, float, float, float]:
    """Return shares of the width and the height in pixels, in the same order."""
    first, second, third, fourth = shares
    return first * width, second * height, third * width, fourth * height
