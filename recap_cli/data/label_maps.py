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
from recap_cli.errors import DataError
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
    """Return how maps are read for outputs of these names, which are values as text where the classes have no names.

    Raises:
        DataError: The classes have other names than the outputs: their file has changed.
    """
    if classes.names and classes.names != tuple(names):
        raise DataError(
            f"the classes of data.classes are now {some(classes.names)}, but those of the model are {some(names)}",
            hint="restore that file as it was when the state was made",
        )
    values = classes.ids if classes.names else [int(name) for name in names]
    lookup = np.full(LARGEST + 1, UNKNOWN, dtype=np.int16)
    lookup[list(classes.ignored)] = IGNORED
    lookup[list(values)] = range(len(values))
    return MapReading(classes, tuple(names), lookup)


def values_of(image: "Image", colours: Mapping[Colour, int] | None) -> np.ndarray[Any, Any]:
    """Return the value of each pixel, (height, width), int32.

    Where classes have colours, those of the image are looked up. If not all of them are known, the shades of a grey image,
    stored as colours or not, are its values, and so are the indices of a palette whose known colours have their value as index.

    Raises:
        MapError: The image has colours that are no class, or floats.
    """
    if image.mode.startswith("I"):
        numbers = np.asarray(image).astype(np.int64)
        if numbers.min() < 0 or numbers.max() > LARGEST:
            raise MapError(
                f"it has values from {numbers.min()} to {numbers.max()}; expected 0 to {LARGEST}",
                "save it with 8 or 16 bits for each pixel",
            )
        return numbers.astype(np.int32)
    if image.mode == "F":
        raise MapError("its pixels are floats, which are no classes", "save it with 8 or 16 bits for each pixel")
    plain = np.asarray(image) if image.mode in ("1", "L", "P") else None
    if colours is None and plain is not None:
        return plain.astype(np.int32)
    if plain is not None and image.mode != "P":  # grey: colours are looked up for each shade, not for each pixel
        return _of_shades(plain, colours or {})
    shades = np.asarray(image.convert("RGB")).astype(np.int32)  # (height, width, 3)
    if plain is None and (shades[..., :1] == shades).all():
        plain = shades[..., 0]
    values, odd = _looked_up(shades, colours or {})
    if not odd.any():
        return values
    if plain is not None and (image.mode != "P" or (plain == values)[~odd].all()):
        return plain.astype(np.int32)
    if colours is None:
        raise MapError("it is coloured, and the colours have no names", PALETTE)
    row, column = (int(at[0]) for at in np.nonzero(odd))
    colour = shades[row, column].tolist()
    raise MapError(f"it has the colour {colour} at row {row + 1}, column {column + 1}, which is no class", PALETTE)


def _of_shades(plain: np.ndarray[Any, Any], colours: Mapping[Colour, int]) -> np.ndarray[Any, Any]:
    """Return the values of a grey image, int32: those of its shades as colours if all of them are known, else the shades."""
    bright = 255 if plain.dtype == bool else 1
    shades = np.unique(plain).tolist()
    known = {int(shade): colours[(shade * bright,) * 3] for shade in shades if (shade * bright,) * 3 in colours}
    if len(known) < len(shades):
        return plain.astype(np.int32)
    table = np.zeros(256, dtype=np.int32)
    table[list(known)] = list(known.values())
    values: np.ndarray[Any, Any] = table[plain.astype(np.uint8)]
    return values


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
        ignored = ",".join(map(str, sorted({*reading.classes.ignored, int(values[row, column])})))
        raise MapError(
            f"it has the value {values[row, column]} at row {row + 1}, column {column + 1}, which is no class: they are "
            f"{some(reading.names)}",
            f"ignore it, too, with --set 'data.ignore_index=[{ignored}]', or name all classes in data.classes",
        )
    return numbers


def nearest(numbers: np.ndarray[Any, Any], size: tuple[int, int], box: tuple[float, float, float, float]) -> Tensor:
    """Return the part of a map in `box` (left, top, right, bottom, in pixels) at (height, width), by the nearest pixel."""
    import PIL.Image

    image = PIL.Image.fromarray(numbers.astype(np.int32))
    resized = np.asarray(image.resize(size[::-1], PIL.Image.Resampling.NEAREST, box=box))
    return torch.from_numpy(resized.astype(np.int16))
