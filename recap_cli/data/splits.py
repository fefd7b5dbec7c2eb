"""Examples as tensors: texts tokenized once, images decoded once, combined into batches by index.

`sampling` decides which examples a batch holds; `sources` reads them.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from recap_cli.data import pixels
from recap_cli.errors import DataError, ModelError
from recap_cli.progress import Track, silent

if TYPE_CHECKING:
    from datasets import Dataset

Fetch = Callable[[Tensor, torch.Generator | None], dict[str, Tensor]]

RAM_BYTES = 2 * 1024**3  # images of a split that fit into this are decoded once, others at each use
CHUNK = 256  # examples per step of the progress bar
LOOKED_AT = 64  # images, spread over a split that does not fit, whose range is checked in advance


@dataclass(frozen=True)
class TextInputs:
    """How text becomes tensors.

    Attributes:
        tokenizer: A tokenizer of transformers.
        max_length: The most tokens of an example.
        positions: How many tokens the model has positions for, if known. Tokenizers often lack this number.
    """

    tokenizer: Any
    max_length: int
    positions: int | None = None


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
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    augment: Literal["none", "flip"] = "none"


@dataclass(frozen=True)
class Split:
    """The training or the validation examples.

    Attributes:
        origin: The file or data set that they come from, for messages.
        labels: Shape (examples,), int64.
        fetch: Returns the inputs at some indices.
        tokens: For texts, the token ids that occur, sorted, int64.
        special: For texts, the ids that the tokenizer may add, such as padding, sorted, int64.
        notes: What a user should know.
    """

    origin: str
    labels: Tensor
    fetch: Fetch
    tokens: Tensor | None = None
    special: Tensor | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the model's inputs at `indices`, and `labels`, all with the batch first. A `generator` augments images."""
        return {**self.fetch(indices, generator), "labels": self.labels[indices]}


def make_split(
    dataset: "Dataset",
    inputs: TextInputs | ImageInputs,
    *,
    origin: str,
    workers: int = 0,
    ram_bytes: int = RAM_BYTES,
    track: Track = silent,
) -> Split:
    """Make examples from `sources` ready for a model, by `text_split` or `image_split`. `track` reports each chunk.

    Raises:
        DataError: An image cannot be decoded.
        ModelError: The inputs do not fit the tokenizer or the channels.
    """
    if isinstance(inputs, TextInputs):
        return text_split(dataset, inputs, origin=origin, track=track)
    return image_split(dataset, inputs, origin=origin, workers=workers, ram_bytes=ram_bytes, track=track)


def _labels(dataset: "Dataset") -> Tensor:
    return torch.tensor(dataset.select_columns("label")[:]["label"], dtype=torch.int64)


def _chunks(count: int, track: Track, label: str) -> Iterable[range]:
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    return track(chunks, label, len(chunks))


def text_split(dataset: "Dataset", inputs: TextInputs, *, origin: str, track: Track = silent) -> Split:
    """Tokenize the columns `text` and, if there is one, `text_pair`. A batch is padded to its longest example.

    The batch has the outputs of the tokenizer (`input_ids`, `attention_mask`, …), each (batch, tokens), int64. All tokens are
    held in RAM as int32 without padding. A pair that is too long loses tokens from its longer text.

    Raises:
        ModelError: The tokenizer cannot pad, or `max_length` is more than its model takes.
    """
    _check_tokenizer(inputs)
    texts = dataset.select_columns([name for name in ("text", "text_pair") if name in dataset.column_names])
    pieces: dict[str, list[np.ndarray]] = {}
    lengths: list[int] = []
    for chunk in _chunks(len(texts), track, f"tokenize {origin}"):
        columns = texts[chunk.start : chunk.stop].values()
        tokens = inputs.tokenizer(*columns, truncation=True, max_length=inputs.max_length)
        lengths += map(len, tokens["input_ids"])
        for name, lists in tokens.items():
            pieces.setdefault(name, []).append(np.fromiter(chain.from_iterable(lists), dtype=np.int32))
    flat = {name: np.concatenate(arrays) for name, arrays in pieces.items()}
    ends = np.cumsum(lengths).tolist()

    def fetch(indices: Tensor, _: torch.Generator | None) -> dict[str, Tensor]:
        places = [slice(ends[i] - lengths[i], ends[i]) for i in indices.tolist()]
        ragged = {name: [array[place].tolist() for place in places] for name, array in flat.items()}
        return dict(inputs.tokenizer.pad(ragged, padding=True, return_tensors="pt"))

    occurs = np.bincount(flat["input_ids"], minlength=1) > 0
    special = torch.tensor(sorted(inputs.tokenizer.all_special_ids), dtype=torch.int64)
    return Split(origin, _labels(dataset), fetch, torch.from_numpy(occurs.nonzero()[0]), special)


def _check_tokenizer(inputs: TextInputs) -> None:
    tokenizer = inputs.tokenizer
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.pad_token is None:
        raise ModelError(
            f"the tokenizer of {name} has no padding token, so that texts of different lengths cannot make a batch",
            hint='give "pad_token" in the tokenizer_config.json beside the model',
        )
    if inputs.max_length > tokenizer.model_max_length:
        raise ModelError(
            f"data.max_length is {inputs.max_length}, but the model takes at most {tokenizer.model_max_length} tokens "
            f"by the tokenizer of {name}",
            hint=f"--set data.max_length={tokenizer.model_max_length}",
        )
    if inputs.positions is not None and inputs.max_length > inputs.positions:
        raise ModelError(
            f"data.max_length is {inputs.max_length}, but the model has positions for {inputs.positions} tokens",
            hint=f"--set data.max_length={inputs.positions}",
        )


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
    With `augment="flip"` a generator flips each image left to right with probability 1/2. `workers` threads decode.

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
    if len(dataset) * inputs.channels * inputs.size[0] * inputs.size[1] <= ram_bytes:
        held = torch.empty((len(dataset), inputs.channels, *inputs.size), dtype=torch.uint8)
        for chunk in _chunks(len(dataset), track, f"decode {origin}"):
            held[chunk.start : chunk.stop] = decoded(torch.arange(chunk.start, chunk.stop), peaks)
        pixels_at = held.__getitem__
    else:
        decoded(torch.arange(0, len(dataset), -(-len(dataset) // LOOKED_AT)), peaks)
        pixels_at = decoded

    def fetch(indices: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        values = pixels_at(indices)
        if generator is not None and inputs.augment == "flip":
            flip = torch.rand(len(indices), generator=generator) < 0.5
            values = torch.where(flip.view(-1, 1, 1, 1), values.flip(-1), values)
        return {"pixel_values": values.to(torch.float32).div_(255).sub_(mean).div_(std)}

    return Split(origin, _labels(dataset), fetch, notes=tuple(pixels.notes(peaks, origin)))


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

    encoded = dataset.cast_column("image", datasets.Image(decode=False))

    def decode(peaks: list[int] | None, image: Mapping[str, Any], row: int) -> Tensor:
        try:
            return _pixels(pixels.decode(image, peaks), inputs)
        except pixels.BROKEN as error:
            file = f" {image['path']}" if image.get("path") else ""
            raise DataError(
                f"the image{file} in row {row} of {origin} {_wrong_with(error)}: {error}", hint=_hint_for(error)
            ) from error

    def pixels_at(indices: Tensor, peaks: list[int] | None = None) -> Tensor:
        examples = encoded.select(indices.tolist())[:]
        images, rows = examples["image"], examples["row"]
        with pixels.careful():
            if workers == 0:
                return torch.stack(list(map(partial(decode, peaks), images, rows)))
            with ThreadPoolExecutor(workers) as pool:  # Pillow decodes and resizes without the interpreter's lock
                return torch.stack(list(pool.map(partial(decode, peaks), images, rows)))

    return pixels_at


def _wrong_with(error: Exception) -> str:
    return "cannot be used" if isinstance(error, pixels.RangeError | pixels.SizeError) else "cannot be decoded"


def _hint_for(error: Exception) -> str:
    if isinstance(error, pixels.RangeError):
        return "convert the images to 8 bits, to 16 bits without a sign, or to floats from 0 (black) to 1 (white)"
    if isinstance(error, pixels.SizeError):
        return "make the image smaller, or cut it into pieces; a model sees a few hundred pixels along an edge"
    return "replace the image, or remove its row"


def _pixels(image: Any, inputs: ImageInputs) -> Tensor:
    """Return a decoded image as (channels, height, width), uint8. Like ViT's processor, it does not keep the aspect ratio."""
    import PIL.Image

    height, width = inputs.size
    flat = image.convert("L" if inputs.channels == 1 else "RGB")
    resized = flat.resize((width, height), PIL.Image.Resampling[inputs.interpolation.upper()])
    return torch.from_numpy(np.array(resized).reshape(height, width, inputs.channels)).permute(2, 0, 1)
