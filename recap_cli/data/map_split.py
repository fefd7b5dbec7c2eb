"""The label maps of a split: decoded once where they fit into main memory, and checked against their images."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recap_cli.core.label_maps import LabelMaps, padded
from recap_cli.core.task import IGNORED, Batch
from recap_cli.data import crops, pixels
from recap_cli.data.crops import WHOLE, Window, in_pixels
from recap_cli.data.images import LOOKED_AT, ImageInputs
from recap_cli.data.label_maps import MapError, MapReading, nearest, numbers_of, open_map, values_of
from recap_cli.data.split import CHUNK, chunks
from recap_cli.errors import DataError
from recap_cli.progress import Track

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from PIL.Image import Image

Read = Callable[[Tensor, Tensor | None], list[Tensor]]  # of indices and variants: maps, int16, (height, width) each


def label_maps(
    dataset: "Dataset", inputs: ImageInputs, *, origin: str, workers: int, ram_bytes: int, track: Track
) -> LabelMaps:
    """Return the maps of the column `label`, each of the size of its image in a batch, or of its own (`MapReading.native`).

    They are kept as int16 if all of them fit into `ram_bytes`, and are decoded in each batch otherwise, by `workers` threads.

    Raises:
        DataError: A map cannot be decoded, is of another size than its image, or has a value that is no class; or no map has a
            pixel that is counted. Maps that do not fit raise this when a batch is made.
    """
    import datasets

    encoded = dataset.cast_column("image", datasets.Image(decode=False))
    if inputs.maps is None or "label" not in dataset.column_names:
        return _blank(encoded, inputs)
    encoded = encoded.cast_column("label", datasets.Image(decode=False))
    decoded = _decoder(encoded, inputs, inputs.maps, origin, workers)
    read: Read = decoded
    content: Callable[[], Iterable[bytes | memoryview]] = partial(_encoded, encoded)
    looked_at = torch.arange(0, len(dataset), -(-len(dataset) // LOOKED_AT))
    sizes = [one.numel() for one in decoded(looked_at, None)]  # whose faults are better told before a training than in it
    fits = inputs.augment != "crop" and len(dataset) * max(sizes, default=0) * 2 <= ram_bytes
    held = _decoded_within(ram_bytes, decoded, chunks(len(dataset), track, f"decode the maps of {origin}")) if fits else None
    if held is not None:
        read = partial(_held, held)
        content = lambda: (one.numpy().data.cast("B") for one in held)  # noqa: E731
    if not any(bool((one != IGNORED).any()) for index in torch.arange(len(dataset)) for one in read(index[None], None)):
        raise all_ignored(origin)

    def batch(indices: Tensor, variants: Tensor | None) -> Batch:
        return padded(read(indices, variants))

    return LabelMaps(len(dataset), batch, content)


def _decoded_within(ram_bytes: int, decoded: Read, every: Iterable[range]) -> list[Tensor] | None:
    """Return all maps; None if they are larger than those that were looked at, and do not fit."""
    held: list[Tensor] = []
    for chunk in every:
        held += decoded(torch.arange(chunk.start, chunk.stop), None)
        if sum(one.nbytes for one in held) > ram_bytes:
            return None
    return held


def all_ignored(origin: str) -> DataError:
    """Return the error of maps that have nothing that is counted."""
    return DataError(
        f"{origin}: all pixels of its maps are ignored",
        hint="correct the values that are no class, --set data.ignore_index=255, or those of the file of data.classes",
    )


def values_in(column: "pa.ChunkedArray", origin: str) -> list[int]:
    """Return the different values in all maps of a column, sorted. Raises `DataError` as `label_maps`."""
    found = set[int]()
    with pixels.careful():
        for start in range(0, len(column), CHUNK):
            for row, stored in enumerate(column.slice(start, CHUNK).to_pylist(), start + 1):
                found.update(np.unique(_opened(stored, lambda image: values_of(image, None), row, origin)).tolist())
    return sorted(found)


def _blank(encoded: "Dataset", inputs: ImageInputs) -> LabelMaps:
    """Return maps without a pixel that is counted, for images that have none, of the sizes that theirs would have."""

    def size_of(image: Mapping[str, Any]) -> tuple[int, int]:
        if inputs.maps is None or not inputs.maps.native:
            return inputs.size
        width, height = pixels.size_of(image)
        return height, width

    def batch(indices: Tensor, _: Tensor | None) -> Batch:
        images = encoded.select(indices.tolist())[:]["image"]
        with pixels.careful():
            return padded([torch.full(size_of(image), IGNORED) for image in images])

    return LabelMaps(len(encoded), batch, tuple)


def _held(held: list[Tensor], indices: Tensor, variants: Tensor | None) -> list[Tensor]:
    flips = [0] * len(indices) if variants is None else variants.tolist()
    return [held[index].flip(-1) if flip else held[index] for index, flip in zip(indices.tolist(), flips, strict=True)]


def _encoded(dataset: "Dataset") -> Iterator[bytes]:
    """Yield each map as it is stored: its bytes, or the path, size and time of its file."""
    for stored in dataset["label"]:
        if stored["bytes"] is not None:
            yield stored["bytes"]
        else:
            seen = os.stat(stored["path"])
            yield f"{stored['path']} {seen.st_size} {seen.st_mtime_ns}".encode()


def _decoder(encoded: "Dataset", inputs: ImageInputs, reading: MapReading, origin: str, workers: int) -> Read:
    checked = set[int]()

    def one(stored: Mapping[str, Any], image: Mapping[str, Any], row: int, seen: Window) -> Tensor:
        values = _opened(stored, lambda picture: values_of(picture, reading.classes.colours), row, origin)
        try:
            numbers = numbers_of(values, reading)
        except MapError as error:
            raise _wrong(stored, row, origin, error) from error
        if row not in checked:
            _check_size(numbers, image, row, origin)
            checked.add(row)
        return torch.from_numpy(numbers) if reading.native else _windowed(numbers, inputs.size, seen)

    def read(indices: Tensor, variants: Tensor | None) -> list[Tensor]:
        examples = encoded.select(indices.tolist())[:]
        seen = _windows(inputs, indices, variants)
        columns = examples["label"], examples["image"], examples["row"], seen
        with pixels.careful():
            if workers == 0:
                return list(map(one, *columns))
            with ThreadPoolExecutor(workers) as pool:
                return list(pool.map(one, *columns))

    return read


def _windows(inputs: ImageInputs, indices: Tensor, variants: Tensor | None) -> list[Window]:
    if variants is None:
        return [WHOLE] * len(indices)
    if inputs.augment == "crop":
        return list(map(crops.window, indices.tolist(), variants.tolist()))
    return [Window(flip=bool(variant)) for variant in variants]


def _windowed(numbers: np.ndarray[Any, Any], size: tuple[int, int], seen: Window) -> Tensor:
    """Return what a window shows of a map, int16, of the size of the images; padding is ignored."""
    height, width = size
    left, top, wide, high = map(round, in_pixels(seen.place, width, height))
    part = nearest(numbers, (high, wide), in_pixels(seen.box, numbers.shape[1], numbers.shape[0]))
    whole = part
    if (high, wide) != size:
        whole = torch.full(size, IGNORED, dtype=torch.int16)
        whole[top : top + high, left : left + wide] = part
    return whole.flip(-1) if seen.flip else whole


def _opened(stored: Mapping[str, Any], read: "Callable[[Image], Any]", row: int, origin: str) -> np.ndarray[Any, Any]:
    try:
        values: np.ndarray[Any, Any] = open_map(stored, read)
        return values
    except pixels.BROKEN as error:  # `MapError` too
        raise _wrong(stored, row, origin, error) from error


def _wrong(stored: Mapping[str, Any], row: int, origin: str, error: Exception) -> DataError:
    file = f" {stored['path']}" if stored.get("path") else ""
    if isinstance(error, MapError):
        return DataError(f"the label map{file} in row {row} of {origin}: {error}", hint=error.hint)
    return DataError(
        f"the label map{file} in row {row} of {origin} cannot be decoded: {error}", hint="replace the map, or remove its row"
    )


def _check_size(numbers: np.ndarray[Any, Any], image: Mapping[str, Any], row: int, origin: str) -> None:
    """Refuse a map that is of another size than its image, which is looked at without being decoded."""
    try:
        width, height = pixels.size_of(image)
    except pixels.BROKEN:  # the image's own decoding says it
        return
    if numbers.shape != (height, width):
        raise DataError(
            f"row {row} of {origin}: the image has {height} × {width} pixels, and its label map "
            f"{numbers.shape[0]} × {numbers.shape[1]}",
            hint="give each image the map that was drawn for it, of the same size",
        )
