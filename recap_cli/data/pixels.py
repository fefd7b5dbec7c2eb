"""One image as 8-bit pixels, whatever its file holds: 1 to 16 bits, colours, a palette, or floats from 0 to 1.

A picture of another range is refused, because Pillow would clip it: a 16-bit one would become white.
"""

import struct
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

# What Pillow's readers raise for files that are not whole images; they do not keep to a family of exceptions.
BROKEN = (
    *(OSError, ValueError, SyntaxError, EOFError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(struct.error, zlib.error),
)
BITS_PER_SAMPLE = 258  # a tag of TIFF
DIM = 4096  # 16-bit images without any value from here on hold 12 bits or fewer, and keep 16 shades of 256


class RangeError(ValueError):
    """Nobody can say which values of an image are black and white."""


class SizeError(ValueError):
    """An image has more pixels than Pillow takes for harmless."""


@contextmanager
def careful() -> Iterator[None]:
    """Inside, in every thread, an image with more pixels than `most_pixels` is an error, and Pillow prints no warnings.

    What it warns of otherwise are metadata that are damaged, and palettes whose transparency we do not read.
    """
    import PIL.Image

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        yield


def most_pixels() -> int:
    """How many pixels an image may have: Pillow's bound, above which it warns of files that unpack into all of the memory."""
    import PIL.Image

    return PIL.Image.MAX_IMAGE_PIXELS or 0


def decode(stored: Mapping[str, Any], peaks: list[int] | None = None) -> "Image":
    """The image of a (bytes, path) pair, upright as its EXIF says, in a mode whose values go from 0 to 255.

    The largest value of an image with 16 bits is added to `peaks`.

    Raises `RangeError` or `SizeError` for an image that is whole and cannot be used, one of `BROKEN` for another.
    """
    import PIL.Image
    import PIL.ImageOps

    try:
        with PIL.Image.open(BytesIO(_content(stored))) as image:
            image.load()
            PIL.ImageOps.exif_transpose(image, in_place=True)
            return eight_bits(image, peaks)
    except PIL.UnidentifiedImageError as error:
        raise ValueError("it is of no format that Pillow knows") from error
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        raise SizeError(f"it has more than {most_pixels():,} pixels") from error


def eight_bits(image: "Image", peaks: list[int] | None = None) -> "Image":
    """The same image with 8 bits per value, or as it is where Pillow itself converts it without loss of range.

    Of 16 bits the upper 8 stay, as Pillow has it for 16-bit colours. Floats go from 0, black, to 1, white.
    Raises `RangeError` for other floats, and for whole numbers that are signed or have 32 bits.
    """
    import PIL.Image

    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen:
        bits = 12 if getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE) == (12,) else 16
        values = np.asarray(image)
        if bits == 16 and peaks is not None:
            peaks.append(int(values.max()))
        return PIL.Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if image.mode == "I":
        raise RangeError("its pixels are whole numbers that are signed or of 32 bits: which of them is white is not known")
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # false for NaN, too
            raise RangeError(f"its pixels are floats from {values.min():g} to {values.max():g}: which is white is not known")
        return PIL.Image.fromarray(np.round(values * 255).astype(np.uint8))
    return image


def notes(peaks: Collection[int], origin: str) -> Iterator[str]:
    """What to tell of 16-bit images whose largest values are `peaks`: if all of them are dim, hardly a shade is left."""
    if peaks and (most := max(peaks)) < DIM:
        yield (
            f"{origin}: no value of its 16-bit images is above {most:,}, and of 16 bits the upper 8 are read, which keeps "
            f"{most // 256 + 1} of 256 shades; stretch their values to 0 … 65,535, or convert them to 8 bits"
        )


def _content(stored: Mapping[str, Any]) -> bytes:
    """The bytes of the file: what stands in the table, or else what is at the path, which never is an address of the net."""
    if stored["bytes"] is not None:
        return bytes(stored["bytes"])
    if not stored["path"]:
        raise ValueError("it has neither bytes nor a path")
    file = Path(stored["path"])
    if not file.is_file():
        raise ValueError("there is no such file")
    return file.read_bytes()
