"""Images as tensors: decoded and resized once where they fit into main memory, normalised and augmented when they are used."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from recap_cli.data import crops, pixels
from recap_cli.data.crops import WHOLE, Window, in_pixels
from recap_cli.data.label_maps import MapReading
from recap_cli.data.split import Split, chunks, targets_of
from recap_cli.errors import DataError, ModelError
from recap_cli.progress import Track, silent

if TYPE_CHECKING:
    from datasets import Dataset

RAM_BYTES = 2 * 1024**3  # images of a split that fit into this are decoded once, others at each use
LOOKED_AT = 64  # images, spread over a split that does not fit, whose range is checked in advance


@dataclass(frozen=True)
class ImageInputs:
    """How an image becomes a tensor.

    Attributes:
        size: (height, width) in pixels.
        channels: 1 or 3.
        mean: Per channel, of values from 0 to 1.
        std: Per channel, of values from 0 to 1.
        interpolation: nearest, box, bilinear, hamming, bicubic or lanczos, as in Pillow.
        augment: The random change of training images.
        maps: How the label maps of images are read; None where labels are no maps.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    augment: Literal["none", "flip", "crop"] = "none"
    maps: MapReading | None = None


def image_split(
    dataset: "Dataset",
    inputs: ImageInputs,
    *,
    origin: str,
    workers: int = 0,
    ram_bytes: int = RAM_BYTES,
    track: Track = silent,
) -> Split:
    """Decode and resize the column `image`. A batch has `pixel_values`, (batch, channels, height, width), float32.

    Pixels are kept as uint8 if all of them fit into `ram_bytes`. Otherwise each batch decodes its images, with the same result.
    With `augment="flip"` each has a second variant, flipped left to right. With `"crop"` it has those of `crops.window`, which
    are made of the whole image, so that each batch decodes. `workers` threads decode. Targets are the column `label`.

    Raises:
        ModelError: The channels are not 1 or 3 with a mean and a std each.
        DataError: An image cannot be decoded. A split that does not fit raises this when a batch is made.
    """
    _check_channels(inputs)
    mean = torch.tensor(inputs.mean).view(-1, 1, 1)  # (channels, 1, 1)
    std = torch.tensor(inputs.std).view(-1, 1, 1)
    decoded = _decoder(dataset, inputs, origin, workers)
    peaks: list[int] = []
    pixels_at: Callable[[Tensor], Tensor]
    is_cropped = inputs.augment == "crop"
    content: Callable[[], Iterable[bytes | memoryview]]
    if not is_cropped and len(dataset) * inputs.channels * inputs.size[0] * inputs.size[1] <= ram_bytes:
        held = torch.empty((len(dataset), inputs.channels, *inputs.size), dtype=torch.uint8)
        for chunk in chunks(len(dataset), track, f"decode {origin}"):
            held[chunk.start : chunk.stop] = decoded(torch.arange(chunk.start, chunk.stop), peaks)
        pixels_at = held.__getitem__
        content = lambda: (image.numpy().data.cast("B") for image in held)  # noqa: E731
    else:
        decoded(torch.arange(0, len(dataset), -(-len(dataset) // LOOKED_AT)), peaks)
        pixels_at = decoded
        content = partial(_encoded, dataset)

    def fetch(indices: Tensor, variants: Tensor | None) -> dict[str, Tensor]:
        values = decoded(indices, variants=variants) if is_cropped else pixels_at(indices)
        if variants is not None and not is_cropped:
            values = torch.where((variants == 1).view(-1, 1, 1, 1), values.flip(-1), values)
        return {"pixel_values": values.to(torch.float32).div_(255).sub_(mean).div_(std)}

    variants = {"none": 1, "flip": 2, "crop": 1 + crops.VARIANTS}[inputs.augment]
    targets = torch.zeros(len(dataset)) if inputs.maps else targets_of(dataset)
    return Split(origin, targets, fetch, notes=tuple(pixels.notes(peaks, origin)), content=content, variants=variants)


def largest_image(dataset: "Dataset") -> tuple[int, int] | None:
    """Return the greatest height and width of the images of a split, which are not decoded; None if none can be read."""
    import datasets

    found = []
    for image in dataset.select_columns("image").cast_column("image", datasets.Image(decode=False))["image"]:
        with suppress(*pixels.BROKEN):
            found.append(pixels.size_of(image))
    return (max(height for _, height in found), max(width for width, _ in found)) if found else None


def _encoded(dataset: "Dataset") -> Iterator[bytes]:
    """Yield each image as it is stored: its bytes, or the path, size and time of its file."""
    import datasets

    for image in dataset.cast_column("image", datasets.Image(decode=False))["image"]:
        if image["bytes"] is not None:
            yield image["bytes"]
        else:
            seen = os.stat(image["path"])
            yield f"{image['path']} {seen.st_size} {seen.st_mtime_ns}".encode()


def _check_channels(inputs: ImageInputs) -> None:
    if inputs.channels not in (1, 3) or {len(inputs.mean), len(inputs.std)} != {inputs.channels}:
        raise ModelError(
            f"images have 1 (grey) or 3 (colour) channels, each with a mean and a std; the model wants {inputs.channels}, "
            f"with {len(inputs.mean)} means and {len(inputs.std)} stds",
            hint="correct the preprocessor_config.json beside the model",
        )


def _decoder(dataset: "Dataset", inputs: ImageInputs, origin: str, workers: int) -> Callable[..., Tensor]:
    """Return a function from indices to pixels, (batch, channels, height, width), uint8. It fills a list as `pixels.decode`."""
    import datasets

    encoded = dataset.select_columns(["image", "row"]).cast_column("image", datasets.Image(decode=False))

    def decode(peaks: list[int] | None, image: Mapping[str, Any], row: int, seen: Window) -> Tensor:
        try:
            return _pixels(pixels.decode(image, peaks), inputs, seen)
        except pixels.BROKEN as error:
            file = f" {image['path']}" if image.get("path") else ""
            raise DataError(
                f"the image{file} in row {row} of {origin} {_wrong_with(error)}: {error}", hint=_hint_for(error)
            ) from error

    def pixels_at(indices: Tensor, peaks: list[int] | None = None, variants: Tensor | None = None) -> Tensor:
        examples = encoded.select(indices.tolist())[:]
        images, rows = examples["image"], examples["row"]
        seen = [WHOLE] * len(images) if variants is None else list(map(crops.window, indices.tolist(), variants.tolist()))
        with pixels.careful():
            if workers == 0:
                return torch.stack(list(map(partial(decode, peaks), images, rows, seen)))
            with ThreadPoolExecutor(workers) as pool:  # Pillow decodes and resizes without the interpreter's lock
                return torch.stack(list(pool.map(partial(decode, peaks), images, rows, seen)))

    return pixels_at


def _wrong_with(error: Exception) -> str:
    return "cannot be used" if isinstance(error, pixels.RangeError | pixels.SizeError) else "cannot be decoded"


def _hint_for(error: Exception) -> str:
    if isinstance(error, pixels.RangeError):
        return "convert the images to 8 bits, to 16 bits without a sign, or to floats from 0 (black) to 1 (white)"
    if isinstance(error, pixels.SizeError):
        return "make the image smaller, or cut it into pieces; a model sees a few hundred pixels along an edge"
    return "replace the image, or remove its row"


def _pixels(image: Any, inputs: ImageInputs, seen: Window = WHOLE) -> Tensor:
    """Return a decoded image as (channels, height, width), uint8. Like ViT's processor, it does not keep the aspect ratio."""
    import PIL.Image

    height, width = inputs.size
    flat = image.convert("L" if inputs.channels == 1 else "RGB")
    left, top, wide, high = map(round, in_pixels(seen.place, width, height))
    box = None if seen is WHOLE else in_pixels(seen.box, *flat.size)
    resized = flat.resize((wide, high), PIL.Image.Resampling[inputs.interpolation.upper()], box=box)
    values = torch.from_numpy(np.array(resized).reshape(high, wide, inputs.channels)).permute(2, 0, 1)
    if (high, wide) != inputs.size:
        part, mean = values, torch.tensor(inputs.mean).mul(255).round().to(torch.uint8)
        values = mean[:, None, None].repeat(1, height, width)  # (channels, height, width)
        values[:, top : top + high, left : left + wide] = part
    return values.flip(-1) if seen.flip else values
