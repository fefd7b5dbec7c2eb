"""What is cut of a full model and how, as a state keeps it: its axes, their shapes, its embeddings and its task head."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from recap_cli.core.adapter import Adapter, find_axes
from recap_cli.core.axes import Axis, Shape, shapes_of
from recap_cli.models import build


@dataclass(frozen=True)
class Layout:
    """The axes of the full model, the shapes of what they cut, and the names of its embeddings and of its task head."""

    axes: tuple[Axis, ...]
    shapes: dict[str, Shape]
    embeddings: tuple[str, ...]
    head: tuple[str, ...]

    @classmethod
    def of_model(cls, adapter: Adapter, model: nn.Module) -> "Layout":
        head = build.head_names(adapter, model)
        embeddings = [name for name in build.embedding_names(adapter, model) if name not in head]
        axes = tuple(find_axes(adapter, model))
        cut = {cut.param for axis in axes for cut in axis.cuts}
        shapes = {name: shape for name, shape in shapes_of(model.named_parameters()).items() if name in cut}
        return cls(axes, shapes, tuple(embeddings), tuple(head))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def along(self) -> dict[str, int]:
        """The dimension that each cut parameter is cut along."""
        return {cut.param: cut.dim for axis in self.axes for cut in axis.cuts}
