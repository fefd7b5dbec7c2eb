"""One image as 8-bit pixels, from 1 to 16 bits, colours, a palette, or floats from 0 to 1.

An image of another range is refused, because Pillow would clip it: a 16-bit one would become white.
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

# What Pillow's readers raise for files that are not whole images. These exceptions have no common base.
BROKEN = (
    *(OSError, ValueError, SyntaxError, EOFError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(struct.error, zlib.error),
)
BITS_PER_SAMPLE = 258  # a tag of TIFF
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # a tag of EXIF, and its values that swap width and height
DIM = 4096  # 16-bit images whose values are all below this hold 12 bits or fewer, and keep at most 16 shades of 256


class RangeError(ValueError):
    """It is unknown which values of an image are black and white."""


class SizeError(ValueError):
    """An image has more pixels than Pillow considers harmless."""


@contextmanager
def careful() -> Iterator[None]:
    """Make an image of more than `most_pixels` an error inside, in every thread, and silence Pillow's other warnings.

    Those are about damaged metadata, and about transparent palettes, which are not read.
    """
    import PIL.Image

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        yield


def most_pixels() -> int:
    """Return how many pixels an image may have: Pillow's bound, above which it warns of decompression bombs."""
    import PIL.Image

    return PIL.Image.MAX_IMAGE_PIXELS or 0


def decode(stored: Mapping[str, Any], peaks: list[int] | None = None) -> "Image":
    """Decode an image and turn it upright by its EXIF, with values from 0 to 255.

    Args:
        stored: The `bytes` or the `path` of the file.
        peaks: A list to which the largest value of a 16-bit image is added.

    Raises:
        RangeError: It is unknown which values are black and white.
        SizeError: The image has too many pixels.
        Exception: One of `BROKEN`: the file is not a whole image.
    """
    import PIL.Image
    import PIL.ImageOps

    try:
        with PIL.Image.open(BytesIO(content(stored))) as image:
            image.load()
            PIL.ImageOps.exif_transpose(image, in_place=True)
            return eight_bits(image, peaks)
    except PIL.UnidentifiedImageError as error:
        raise ValueError("it is of no format that Pillow knows") from error
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        raise SizeError(f"it has more than {most_pixels():,} pixels") from error


def size_of(stored: Mapping[str, Any]) -> tuple[int, int]:
    """Return the (width, height) of an image that is turned upright, without decoding it. Raises as `decode`."""
    import PIL.Image

    try:
        alone = stored["bytes"] is None and stored["path"] and Path(stored["path"]).is_file()
        with PIL.Image.open(stored["path"] if alone else BytesIO(content(stored))) as image:  # a path is read as far as needed
            turned = image.getexif().get(ORIENTATION) in TURNED
            return image.size[::-1] if turned else image.size
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        raise SizeError(f"it has more than {most_pixels():,} pixels") from error


def eight_bits(image: "Image", peaks: list[int] | None = None) -> "Image":
    """Return the image with 8 bits per value, or unchanged if Pillow converts it without loss of range.

    Of 16 bits the upper 8 stay, as in Pillow for 16-bit colours. Floats go from 0, black, to 1, white.

    Raises:
        RangeError: Floats have another range, or whole numbers are signed or have 32 bits.
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
    """Yield a note if 16-bit images with the largest values `peaks` keep few shades, because all of them are dim."""
    if peaks and (most := max(peaks)) < DIM:
        yield (
            f"{origin}: its 16-bit images have no value above {most:,}; the upper 8 bits are read, so {most // 256 + 1} of 256 "
            "shades are kept: stretch their values to 0 … 65,535, or convert them to 8 bits"
        )


def content(stored: Mapping[str, Any]) -> bytes:
    """Return the bytes of the file, from the table or from the path. A path is never a network address."""
    if stored["bytes"] is not None:
        return bytes(stored["bytes"])
    if not stored["path"]:
        raise ValueError("it has neither bytes nor a path")
    file = Path(stored["path"])
    if not file.is_file():
        raise ValueError("there is no such file")
    return file.read_bytes()
