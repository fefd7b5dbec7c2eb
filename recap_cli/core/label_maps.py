"""Targets that are maps, a class for each pixel: read when they are asked for, as they may not fit into main memory."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from recap_cli.core.task import IGNORED, Batch

SIZES = "label_sizes"  # of a batch of maps that differ in size: the (height, width) of each, int64, (batch, 2)


@dataclass(frozen=True)
class LabelMaps:
    """The maps of a split, the examples first.

    Attributes:
        count: how many there are.
        read: `read(indices, variants)` are the `labels` of a batch, and `label_sizes` where maps differ in size.
        content: yields the bytes that they are made of, for a digest.
    """

    count: int
    read: Callable[[Tensor, Tensor | None], Batch]
    content: Callable[[], Iterable[bytes | memoryview]]

    def __len__(self) -> int:
        return self.count

    def pixels_of(self, classes: int) -> Tensor:
        """Return how many pixels each class has in all maps, int64, (classes,)."""
        totals = torch.zeros(classes, dtype=torch.int64)
        for index in range(self.count):
            labels = self.read(torch.tensor([index]), None)["labels"]  # (1, height, width)
            totals += torch.bincount(labels[labels != IGNORED], minlength=classes)
        return totals


def padded(maps: list[Tensor]) -> Batch:
    """Return the `labels` of maps, (height, width) each, int64. Smaller ones are padded, and there are `label_sizes` then."""
    sizes = torch.tensor([tuple(one.shape) for one in maps], dtype=torch.int64)  # (batch, 2)
    if not bool((sizes != sizes[0]).any()):
        return {"labels": torch.stack(maps).long()}
    height, width = (int(side) for side in sizes.amax(0))
    labels = torch.full((len(maps), height, width), IGNORED, dtype=torch.int64)
    for place, one in zip(labels, maps, strict=True):
        place[: one.shape[0], : one.shape[1]] = one
    return {"labels": labels, SIZES: sizes}
