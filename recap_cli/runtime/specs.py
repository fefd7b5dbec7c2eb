"""What it takes to build a model again, as plain data: the library, its configuration, the task and the preprocessing."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from recap_cli.errors import ModelError

Library = Literal["transformers", "timm"]
TaskKind = Literal["text-classification", "image-classification"]


@dataclass(frozen=True)
class ModelSpec:
    """A model without its weights.

    `model_type` is the name of its adapter. `config` is the whole configuration of transformers, or `architecture` and `args`
    of timm's `create_model`. `image` holds `size` (pixels, square), `channels`, `mean`, `std` (per channel, of values in
    [0, 1]) and `interpolation`; None for text. `forward` are keyword arguments of every forward call.
    """

    library: Library
    model_type: str
    config: dict[str, Any]
    num_labels: int
    label_names: list[str]
    task_kind: TaskKind
    image: dict[str, Any] | None = None
    forward: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The spec as JSON text; `from_json` is its inverse."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str, origin: str = "the model's spec") -> "ModelSpec":
        """The spec that `to_json` wrote. Raises `ModelError`, naming `origin`, if the text is something else."""
        try:
            return ModelSpec(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ModelError(f"{origin} cannot be read: {error}", hint="write it again with this version of recap") from error


def image_facts(size: int, channels: int, mean: Any = None, std: Any = None, interpolation: str = "bilinear") -> dict[str, Any]:
    """The `image` of a spec; mean and std are 0.5 where none are given for that many channels."""
    return {
        "size": size,
        "channels": channels,
        "mean": _per_channel(mean, channels),
        "std": _per_channel(std, channels),
        "interpolation": interpolation,
    }


def _per_channel(values: Any, channels: int) -> list[float]:
    given = [float(value) for value in values] if isinstance(values, list | tuple) else []
    return given if len(given) == channels else [0.5] * channels
