"""Examples as tensors: texts tokenized once, images decoded once, combined into batches by index.

`sampling` decides which examples a batch holds; `sources` reads them.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from recap_cli.data.images import RAM_BYTES, ImageInputs, image_split
from recap_cli.data.map_split import label_maps
from recap_cli.data.split import Split
from recap_cli.data.texts import TextInputs, text_split, words_split
from recap_cli.progress import Track, silent

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ImageInputs", "Split", "TextInputs", "make_split"]


def make_split(
    dataset: "Dataset",
    inputs: TextInputs | ImageInputs,
    *,
    origin: str,
    workers: int = 0,
    ram_bytes: int = RAM_BYTES,
    track: Track = silent,
) -> Split:
    """Make examples from `sources` ready for a model: of texts, of words, or of images. `track` reports each chunk.

    Raises:
        DataError: An image cannot be decoded, or an example has another number of words than labels.
        ModelError: The inputs do not fit the tokenizer or the channels.
    """
    if isinstance(inputs, TextInputs):
        make = words_split if inputs.words else text_split
        return make(dataset, inputs, origin=origin, track=track)
    split = image_split(dataset, inputs, origin=origin, workers=workers, ram_bytes=ram_bytes, track=track)
    if inputs.maps is None:
        return split
    return replace(split, targets=label_maps(dataset, inputs, origin=origin, workers=workers, ram_bytes=ram_bytes, track=track))
