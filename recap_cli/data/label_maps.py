"""Label maps as tensors: decoded by value, palette index or colour, resized by the nearest pixel, and checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recap_cli.core.task import IGNORED
from recap_cli.data import pixels
from recap_cli.data.map_classes import LARGEST, Colour, MapClasses
from recap_cli.untrusted.files import some

if TYPE_CHECKING:
    from PIL.Image import Image

UNKNOWN = -1  # of a value that is no class
PALETTE = "say which colour is which class with --set data.classes=FILE"


class MapError(ValueError):
    """A map that does not say the class of each of its pixels; `hint` is what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class MapReading:
    """How the pixels of a map become numbers of classes.

    Attributes:
        classes: Their values and colours.
        names: Of the outputs, for messages.
        lookup: The number of each value, `IGNORED`, or `UNKNOWN`, int16, (values,).
        native: True keeps the size of a map, as an evaluation does; False resizes it as its image.
    """

    classes: MapClasses
    names: tuple[str, ...]
    lookup: np.ndarray[Any, Any]
    native: bool = False


def reading_of(classes: MapClasses, names: Sequence[str]) -> MapReading:
    """Return how maps are read for outputs of these names, which are values as text where the classes have no names."""
    values = classes.ids if classes.names else [int(name) for name in names]
    lookup = np.full(LARGEST + 1, UNKNOWN, dtype=np.int16)
    lookup[list(classes.ignored)] = IGNORED
    lookup[list(values)] = range(len(values))
    return MapReading(classes, tuple(names), lookup)


def values_of(image: "Image", colours: Mapping[Colour, int] | None) -> np.ndarray[Any, Any]:
    """Return the value of each pixel, (height, width), int32.

    Grey images have their shades. Of coloured ones the colours are looked up; shades of grey may be stored as colours. Of a
    palette its colours are looked up if all of them are known, else its indices are the values.

    Raises:
        MapError: The image has colours that are no class, or floats.
    """
    if image.mode in ("1", "L") or (image.mode == "P" and colours is None):
        return np.asarray(image).astype(np.int32)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > LARGEST:
            raise MapError(f"it has values from {values.min()} to {values.max()}", f"expected values from 0 to {LARGEST}")
        return values.astype(np.int32)
    if image.mode == "F":
        raise MapError("its pixels are floats, which are no classes", "save it with 8 or 16 bits for each pixel")
    shades = np.asarray(image.convert("RGB")).astype(np.int32)  # (height, width, 3)
    values, odd = _looked_up(shades, colours or {})
    if not odd.any():
        return values
    if image.mode == "P":
        return np.asarray(image).astype(np.int32)
    if (shades[..., :1] == shades).all():
        return shades[..., 0]
    if colours is None:
        raise MapError("it is coloured, and the colours have no names", PALETTE)
    row, column = (int(at[0]) for at in np.nonzero(odd))
    colour = shades[row, column].tolist()
    raise MapError(f"it has the colour {colour} at row {row + 1}, column {column + 1}, which is no class", PALETTE)


def _looked_up(
    shades: np.ndarray[Any, Any], colours: Mapping[Colour, int]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the value of each colour, int32, and where there is none, bool; (height, width) each, of (height, width, 3)."""
    packed = shades[..., 0] << 16 | shades[..., 1] << 8 | shades[..., 2]  # (height, width)
    if not colours:
        return packed, np.ones(packed.shape, dtype=bool)
    keys = sorted(colours)
    known = np.array([red << 16 | green << 8 | blue for red, green, blue in keys])  # (colours,), sorted as tuples are
    places = np.searchsorted(known, packed).clip(max=len(known) - 1)  # (height, width)
    return np.array([colours[key] for key in keys], dtype=np.int32)[places], known[places] != packed


def open_map(stored: Mapping[str, Any], read: "Callable[[Image], Any]") -> Any:
    """Return what `read` makes of a stored map, decoded as it stands: a palette stays one, and nothing is turned by EXIF.

    Raises:
        Exception: One of `pixels.BROKEN`: the file is not a whole image.
    """
    import PIL.Image

    try:
        with PIL.Image.open(BytesIO(pixels.content(stored))) as image:
            image.load()
            return read(image)
    except PIL.UnidentifiedImageError as error:
        raise ValueError("it is of no format that Pillow knows") from error
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        raise pixels.SizeError(f"it has more than {pixels.most_pixels():,} pixels") from error


def numbers_of(values: np.ndarray[Any, Any], reading: MapReading) -> np.ndarray[Any, Any]:
    """Return the number of the class of each pixel, or `IGNORED`, int16, (height, width). Raises `MapError` for no class."""
    numbers: np.ndarray[Any, Any] = reading.lookup[values]
    if (odd := numbers == UNKNOWN).any():
        row, column = (int(at[0]) for at in np.nonzero(odd))
        raise MapError(
            f"it has the value {values[row, column]} at row {row + 1}, column {column + 1}, which is no class: they are "
            f"{some(reading.names)}",
            f"ignore it with --set data.ignore_index={values[row, column]}, or name all classes in data.classes",
        )
    return numbers


def nearest(numbers: np.ndarray[Any, Any], size: tuple[int, int], box: tuple[float, float, float, float]) -> Tensor:
    """Return the part of a map in `box` (left, top, right, bottom, in pixels) at (height, width), by the nearest pixel."""
    left, top, right, bottom = box
    rows = np.floor(top + (np.arange(size[0]) + 0.5) * (bottom - top) / size[0]).astype(np.int64)  # (height,)
    columns = np.floor(left + (np.arange(size[1]) + 0.5) * (right - left) / size[1]).astype(np.int64)  # (width,)
    rows, columns = rows.clip(0, numbers.shape[0] - 1), columns.clip(0, numbers.shape[1] - 1)
    return torch.from_numpy(numbers[rows[:, None], columns].astype(np.int16))
