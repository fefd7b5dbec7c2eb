"""What is cut of a full model and how, as a state keeps it: its axes, their shapes, its embeddings and its task head.

A parameter that is cut, and cannot be trainable in part, belongs to no group of a mask. It is trained whole beside the mask if
it is small, as norms are: the smallest come first, until all of them hold `WHOLE_SHARE` of the prunable parameters. Larger ones
are frozen whole wherever a mask freezes anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from torch import nn

from recap_cli.core.adapter import Adapter, find_axes
from recap_cli.core.axes import Axis, Shape, prunable_params, shapes_of
from recap_cli.models import build
from recap_cli.trainable.build import whole_parameters

WHOLE_SHARE = 0.01  # of the prunable parameters


@dataclass(frozen=True)
class Layout:
    """What of a full model is cut, and what the parameters are that a mask does not choose from.

    Attributes:
        axes: those of pruning.
        shapes: of the parameters that they cut.
        embeddings: the names of its embeddings.
        head: those of its task head.
        whole_trained: parameters that are cut, and are trained whole where a mask decides.
        whole_frozen: those that are frozen whole there.
    """

    axes: tuple[Axis, ...]
    shapes: dict[str, Shape]
    embeddings: tuple[str, ...]
    head: tuple[str, ...]
    whole_trained: tuple[str, ...]
    whole_frozen: tuple[str, ...]

    @classmethod
    def of_model(cls, adapter: Adapter, model: nn.Module) -> "Layout":
        head = build.head_names(adapter, model)
        embeddings = [name for name in build.embedding_names(adapter, model) if name not in head]
        axes = tuple(find_axes(adapter, model))
        cut = {cut.param for axis in axes for cut in axis.cuts}
        shapes = {name: shape for name, shape in shapes_of(model.named_parameters()).items() if name in cut}
        trained, frozen = _whole(model, axes, shapes)
        return cls(axes, shapes, tuple(embeddings), tuple(head), trained, frozen)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def whole(self) -> frozenset[str]:
        """The parameters that are cut, and of which no group of a mask has any entry."""
        return frozenset({*self.whole_trained, *self.whole_frozen})

    @property
    def along(self) -> dict[str, int]:
        """The dimension that each cut parameter is cut along."""
        return {cut.param: cut.dim for axis in self.axes for cut in axis.cuts}


def _whole(model: nn.Module, axes: Sequence[Axis], shapes: Mapping[str, Shape]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parameters that cannot be trainable in part: those that are trained whole, and those that are frozen whole."""
    names = whole_parameters(model, axes)
    allowed = WHOLE_SHARE * prunable_params(axes, shapes)
    trained: set[str] = set()
    for name in sorted(names, key=lambda name: prod(shapes[name])):
        allowed -= prod(shapes[name])
        if allowed < 0:
            break
        trained.add(name)
    return tuple(n for n in names if n in trained), tuple(n for n in names if n not in trained)
