"""How images are made into the inputs of a model of transformers: read from its configuration and files, and written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recap_cli.errors import ModelError
from recap_cli.models.specs import INTERPOLATIONS, MOST_PIXELS, image_facts
from recap_cli.untrusted import files

ANY_SIZE = 512  # pixels, of a model that says none: as transformers' processors of SegFormer and others have it
PROCESSORS = {  # those with a `post_process_semantic_segmentation` that fits the model
    "beit": "BeitImageProcessor",
    "data2vec-vision": "BeitImageProcessor",
    "dpt": "DPTImageProcessor",
    "eomt": "MaskFormerImageProcessor",  # its own makes no squares: it wants a size in edges, and keeps the image's shape
    "mask2former": "Mask2FormerImageProcessor",
    "maskformer": "MaskFormerImageProcessor",
    "oneformer": "OneFormerImageProcessor",
    "segformer": "SegformerImageProcessor",
    "upernet": "SegformerImageProcessor",
}

ROUNDING = ("Mask2FormerImageProcessor", "MaskFormerImageProcessor")  # a size up to a multiple of 32, unless told another


def value_of(config: Any, key: str, default: Any = None) -> Any:
    """Return a value of a configuration, or where it has none, of that of its backbone."""
    for one in (config, getattr(config, "backbone_config", None)):
        if (found := getattr(one, key, None)) is not None:
            return found
    return default


def square_size(config: Any, given: Mapping[str, Any], wanted: int | None = None) -> int:
    """Return the side, in pixels, of the images of a configuration.

    A model for any size, as SegFormer, has that of its preprocessing, or that of its backbone's pretraining, or `ANY_SIZE`.

    Args:
        config: The configuration.
        given: The values of a preprocessor_config.json; none where there is no such file.
        wanted: The size that the recipe says, which a model for any size has then.

    Raises:
        ModelError: They are not square.
    """
    if has_own_size(config):
        return _side(config.image_size)
    return wanted or _side(_preprocessed_size(given) or value_of(config, "image_size", ANY_SIZE))


def has_own_size(config: Any) -> bool:
    """Whether models of this configuration are made for one size of images.

    Old checkpoints have an `image_size` that their library does not know: it is kept, and means nothing.
    """
    return hasattr(config, "image_size") and hasattr(type(config)(), "image_size")


def _side(size: Any) -> int:
    sides = list(size) if isinstance(size, list | tuple) else [size]
    if not all(type(side) is int and 0 < side <= MOST_PIXELS for side in sides) or len(set(sides)) != 1:
        raise ModelError(
            f"the model is for images of size {size}, not square ones", hint="give one side: --set data.image_size=224"
        )
    return int(sides[0])


def _preprocessed_size(given: Mapping[str, Any]) -> Any:
    size = given.get("size")
    if isinstance(size, dict):
        return size.get("shortest_edge") or [size.get("height"), size.get("width")]
    return size


def read_image_facts(folder: Path | None, config: Any, wanted: int | None = None) -> tuple[dict[str, Any], str | None]:
    """Return the preprocessing of the folder's preprocessor_config.json, and a note if there is no such file.

    `wanted` is the size of images that the recipe says.
    """
    path = None if folder is None else folder / "preprocessor_config.json"
    given = files.read_object(path) if path is not None and path.is_file() else {}
    size, channels = square_size(config, given, wanted), int(value_of(config, "num_channels", 3))
    if path is None or not path.is_file():
        note = None if path is None else f"{folder} has no preprocessor_config.json: assumes a mean and std of 0.5"
        return image_facts(size, channels), note
    number = given.get("resample")
    if isinstance(number, int) and not 0 <= number < len(INTERPOLATIONS):
        raise ModelError(f"{path}: resample is {number}; expected 0 to {len(INTERPOLATIONS) - 1}", hint=files.AGAIN)
    interpolation = INTERPOLATIONS[number] if isinstance(number, int) else "bilinear"
    try:
        return image_facts(size, channels, given.get("image_mean"), given.get("image_std"), interpolation), None
    except ModelError as error:
        raise ModelError(f"{path}: {error.message}", hint=files.AGAIN) from error


def preprocessor_json(image: dict[str, Any], model_type: str) -> str:
    """Return a preprocessor_config.json with the preprocessing of the finetuning: resize to a square, no crop."""
    processor = PROCESSORS.get(model_type, "ViTImageProcessor")
    values = {
        "image_processor_type": processor,
        "do_resize": True,
        "size": {"height": image["size"], "width": image["size"]},
        "resample": INTERPOLATIONS.index(image["interpolation"]),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": image["mean"],
        "image_std": image["std"],
        **({"size_divisor": 1} if processor in ROUNDING else {}),
    }
    return json.dumps(values, indent=2) + "\n"
