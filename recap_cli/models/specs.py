"""The spec of a model, as plain data: the library, its configuration, the task and the preprocessing."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from recap_cli.errors import ModelError

AUTO = re.compile(r"AutoModelFor\w+")
Library = Literal["transformers", "timm"]
MOST_PIXELS = 1 << 16  # of a side
MOST_ID = 1 << 31  # of a token
MOST_VALUE = 1e6  # of a mean or standard deviation of pixels in [0, 1]
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers, 0 … 5


@dataclass(frozen=True)
class ModelSpec:
    """A model without its weights.

    Attributes:
        library: The library that builds it.
        model_type: The name of its adapter.
        config: The configuration of transformers, or `architecture` and `args` of timm's `create_model`.
        num_labels: The width of the head.
        label_names: The names of its outputs.
        task_kind: The name of its task.
        image: `size` (pixels, square), `channels`, `mean`, `std` (per channel, of values in [0, 1]) and `interpolation`; None
            for text.
        forward: Keyword arguments of every forward. A list is a row of whole numbers that each example of a batch has.
        auto_class: The class of transformers that builds it, such as `AutoModelForSequenceClassification`; None for timm. With
            it, a product opens where its task is not installed.
    """

    library: Library
    model_type: str
    config: dict[str, Any]
    num_labels: int
    label_names: list[str]
    task_kind: str
    image: dict[str, Any] | None = None
    forward: dict[str, Any] = field(default_factory=dict)
    auto_class: str | None = None

    def to_json(self) -> str:
        """Return the spec as JSON text; `from_json` is its inverse."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str, origin: str = "the model's spec") -> "ModelSpec":
        """Return the spec that `to_json` wrote.

        Raises:
            ModelError: The text is something else. The message names `origin`.
        """
        hint = "write it again with this version of recap"
        try:
            spec = ModelSpec(**json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:
            raise ModelError(f"{origin} cannot be read: {error}", hint=hint) from error
        if wrong := next(_problems(spec), None):
            raise ModelError(f"{origin} is no description of a model: {wrong}", hint=hint)
        return spec


def _problems(spec: ModelSpec) -> Iterator[str]:
    """Yield fields of the wrong type or value. Only the first is certain: checks assume that earlier ones passed."""
    if spec.library not in get_args(Library):
        yield f"library is {spec.library!r}"
    if not isinstance(spec.task_kind, str):
        yield f"task_kind is {spec.task_kind!r}"
    if not (isinstance(spec.auto_class, str) and AUTO.fullmatch(spec.auto_class) if spec.library == "transformers" else True):
        yield f"auto_class is {spec.auto_class!r}"
    if not isinstance(spec.model_type, str):
        yield f"model_type is {spec.model_type!r}"
    if not isinstance(spec.config, dict) or not isinstance(spec.forward, dict):
        yield "config or forward is no object"
    yield from (f"forward has {key} {value!r:.80}" for key, value in spec.forward.items() if not _is_argument(value))
    if spec.library == "timm" and not (isinstance(spec.config.get("architecture"), str) and _is_dict(spec.config.get("args"))):
        yield "config names no architecture, or no args"
    if spec.library == "transformers" and spec.config.get("model_type") != spec.model_type:
        yield f"model_type is {spec.model_type!r}, and that of config {spec.config.get('model_type')!r}"
    if spec.library == "timm" and not spec.model_type.startswith("timm-"):
        yield f"model_type is {spec.model_type!r}, which is not timm's"
    if not isinstance(spec.label_names, list) or not all(isinstance(name, str) for name in spec.label_names):
        yield "label_names is no list of names"
    if type(spec.num_labels) is not int or spec.num_labels != len(spec.label_names):
        yield f"num_labels is {spec.num_labels!r}, for {len(spec.label_names)} label_names"
    if spec.image is None and "vocab_size" not in spec.config:  # nothing that embeds tokens
        yield "image is missing"
    if spec.image is not None:
        yield from _image_problems(spec.image)


def _image_problems(image: Any) -> Iterator[str]:
    if not _is_dict(image) or set(image) != {"size", "channels", "mean", "std", "interpolation"}:
        yield "image has a key too few or too many"
    for key in ("size", "channels"):
        if type(image[key]) is not int or not 0 < image[key] <= MOST_PIXELS:
            yield f"image has {key} {image[key]!r}"
    for key in ("mean", "std"):
        if not isinstance(image[key], list) or len(image[key]) != image["channels"] or not all(map(_is_number, image[key])):
            yield f"image has {key} {image[key]!r}"
    if image["interpolation"] not in INTERPOLATIONS:
        yield f"image has interpolation {image['interpolation']!r}"


def _is_argument(value: Any) -> bool:
    """Whether a value may be an argument of a forward: if it is a list, a row of ids."""
    return not isinstance(value, list) or (bool(value) and all(type(one) is int and 0 <= one < MOST_ID for one in value))


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST_VALUE < value < MOST_VALUE  # nor NaN


def image_facts(size: int, channels: int, mean: Any = None, std: Any = None, interpolation: str = "bilinear") -> dict[str, Any]:
    """Return the `image` of a spec. Mean and std are 0.5 if none are given for this number of channels.

    Raises:
        ModelError: A mean or a std is not a number, a std is 0, or Pillow does not have the interpolation.
    """
    if interpolation not in INTERPOLATIONS:
        raise ModelError(f"the interpolation is {interpolation!r}; expected one of {', '.join(INTERPOLATIONS)}")
    facts: dict[str, Any] = {
        "size": size,
        "channels": channels,
        "mean": _per_channel(mean, channels),
        "std": _per_channel(std, channels),
        "interpolation": interpolation,
    }
    if not all(std > 0 for std in facts["std"]):
        raise ModelError(f"expected standard deviations above 0; found {facts['std']}")
    return facts


def _per_channel(values: Any, channels: int) -> list[float]:
    if not isinstance(values, list | tuple) or len(values) != channels:
        return [0.5] * channels
    if not all(map(_is_number, values)):
        raise ModelError(f"expected numbers as mean and standard deviation; found {list(values)}")
    return [float(value) for value in values]
