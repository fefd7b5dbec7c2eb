"""Examples that are ready for a model, whatever they are made of: batches by index, and their targets."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recap_cli.core.label_maps import LabelMaps
from recap_cli.core.ragged import Ragged
from recap_cli.core.task import TEACHER, TEACHER_STATES, Batch
from recap_cli.progress import Track

if TYPE_CHECKING:
    from datasets import Dataset

    from recap_cli.data.soft_targets import SoftTargets

Fetch = Callable[[Tensor, Tensor | None], dict[str, Tensor]]  # of indices, and of the variant of each

CHUNK = 256  # examples per step of the progress bar


@dataclass(frozen=True)
class Split:
    """The training or the validation examples.

    Attributes:
        origin: The file or data set that they come from, for messages.
        targets: What the examples are to give, the examples first: (examples,), (examples, labels), one row of a `Ragged`
            each, or a map each.
        fetch: Returns the inputs at some indices, each in its variant.
        content: Yields the bytes that the inputs are made of, for a digest of them.
        variants: How many there are of each example: with random flips two, the second being flipped. Of more than two the
            first is not drawn.
        soft: What a teacher gives for the examples, if there is one.
        states: What its blocks give, where they are learned too: one row for each example.
        tokens: For texts, the token ids that occur, sorted, int64.
        special: For texts, the ids that the tokenizer may add, such as padding, sorted, int64.
        notes: What a user should know.
    """

    origin: str
    targets: Tensor | Ragged | LabelMaps
    fetch: Fetch
    tokens: Tensor | None = None
    special: Tensor | None = None
    notes: tuple[str, ...] = ()
    content: Callable[[], Iterable[bytes | memoryview]] = tuple
    variants: int = 1
    soft: "SoftTargets | None" = None
    states: "SoftTargets | None" = None

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: Tensor, variants: Tensor | None = None) -> Batch:
        """Return the model's inputs at `indices`, `labels`, and what a teacher gives, all with the batch first.

        `variants` has the variant of each, (batch,), int64; None is the first, the example as it is.
        """
        taught = {} if self.soft is None else {TEACHER: self.soft.at(indices, variants)}
        if self.states is not None:
            taught[TEACHER_STATES] = self.states.at(indices, variants)[:, 0]
        return {**self.fetch(indices, variants), **self.labels(indices, variants), **taught}

    def draw_variants(self, count: int, generator: torch.Generator | None) -> Tensor | None:
        """Return a drawn variant for each of `count` examples; None if there is only one, or no generator."""
        if generator is None or self.variants == 1:
            return None
        if self.variants > 2:
            return torch.randint(1, self.variants, (count,), generator=generator)  # (count,)
        return (torch.rand(count, generator=generator) < 0.5).long()  # (count,)

    def labels(self, indices: Tensor, variants: Tensor | None = None) -> Batch:
        """Return the `labels` alone of the batch at `indices`."""
        if isinstance(self.targets, LabelMaps):
            return self.targets.read(indices, variants)
        return {"labels": self.targets[indices]}


def targets_of(dataset: "Dataset") -> Tensor | Ragged:
    """Return the column `label`: int64 or float32, (examples,); float32, (examples, labels), of lists of one length; else rows
    of int64.
    """
    import pyarrow as pa

    column = dataset.select_columns("label").with_format("arrow")[:].column("label").combine_chunks()
    if pa.types.is_integer(column.type):
        return torch.tensor(column.to_numpy(zero_copy_only=False), dtype=torch.int64)  # (examples,)
    if pa.types.is_floating(column.type):
        return torch.tensor(column.to_numpy(zero_copy_only=False), dtype=torch.float32)  # (examples,)
    if pa.types.is_fixed_size_list(column.type):
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        return torch.from_numpy(flat.reshape(len(column), column.type.list_size))  # (examples, labels)
    return Ragged.of(column.to_pylist())


def chunks(count: int, track: Track, label: str) -> Iterable[range]:
    """Return the indices below `count` in pieces, of which `track` hears."""
    pieces = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    return track(pieces, label, len(pieces))
