"""Label maps as pictures: a colour for each class, and files small enough to stand in a page."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import product
from typing import Any

import numpy as np

from recap_cli.core.task import IGNORED
from recap_cli.data.map_classes import Colour, MapClasses

Array = np.ndarray[Any, Any]

VOC_BITS = 8  # of each channel
VOIDS: tuple[Colour, ...] = ((0, 0, 0), (64, 64, 64), (224, 224, 192))  # black, dark grey, and what PASCAL VOC has for "void"
APART = 64.0  # of two colours that the eye tells apart, by their distance in RGB
PHOTO_QUALITY = 85  # of JPEG: a tenth of the bytes of a PNG


def voc_colour(number: int) -> Colour:
    """Return the colour that the development kit of PASCAL VOC gives to a class (Everingham et al., 2010, `VOClabelcolormap`).

    The bits of the number go to red, green and blue in turn, the lowest ones first and to the highest bits of a channel.
    """
    channels = [0, 0, 0]
    for place in range(VOC_BITS):
        for channel in range(3):
            channels[channel] |= (number >> (3 * place + channel) & 1) << (VOC_BITS - 1 - place)
    return channels[0], channels[1], channels[2]


def class_colours(classes: MapClasses, count: int) -> list[Colour]:
    """Return a colour for each of `count` classes: those of the classes file, else those of PASCAL VOC."""
    given = {value: colour for colour, value in (classes.colours or {}).items()}
    if given and len(classes.ids) == count:
        return [given[value] for value in classes.ids]
    return [voc_colour(number) for number in range(count)]


def void_colour(colours: Sequence[Colour]) -> Colour:
    """Return a colour for pixels that are not counted, which no class has: the first of `VOIDS` that is apart from all."""
    known = np.array(colours, dtype=float).reshape(-1, 3)  # (classes, 3)

    def gap(colour: Colour) -> float:
        return float(np.linalg.norm(known - colour, axis=1).min(initial=np.inf))

    if (found := next((colour for colour in VOIDS if gap(colour) >= APART), None)) is not None:
        return found
    steps = range(0, 256, 51)
    return max(((red, green, blue) for red, green, blue in product(steps, repeat=3)), key=gap)


def painted(numbers: Array, colours: Sequence[Colour], void: Colour) -> Array:
    """Return a map as a picture, (height, width, 3), uint8, of numbers of classes or `IGNORED`, (height, width)."""
    palette = np.array([*colours, void], dtype=np.uint8)  # (classes + 1, 3)
    return palette[np.where(numbers == IGNORED, len(colours), numbers)]


def png_uri(pixels: Array) -> str:
    """Return a picture, (height, width, 3), uint8, as the address of a PNG that stands in the address itself."""
    return _uri(pixels, "png", {"optimize": True})


def jpeg_uri(pixels: Array) -> str:
    """Return a photo likewise, as a JPEG."""
    return _uri(pixels, "jpeg", {"quality": PHOTO_QUALITY})


def _uri(pixels: Array, kind: str, how: Mapping[str, Any]) -> str:
    import PIL.Image

    file = BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind, **how)
    return f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"
