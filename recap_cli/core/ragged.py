"""Rows of different lengths as one tensor, for targets and inputs that examples have different numbers of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recap_cli.core.task import IGNORED


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, which are padded where several are taken together.

    Attributes:
        values: One row after another, (sum of lengths,).
        ends: Where each row ends in `values`, int64, (rows,).
        pad: What stands where a row has no value.
        left: True pads before the values, as tokenizers of decoders do.
    """

    values: Tensor
    ends: Tensor
    pad: float = IGNORED
    left: bool = False

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]], *, left: bool = False) -> "Ragged":
        """Return whole numbers, row by row."""
        found = [torch.as_tensor(row, dtype=torch.int64) for row in rows]  # (length,) each
        lengths = torch.tensor([len(row) for row in found], dtype=torch.int64)  # (rows,)
        return cls(torch.cat(found) if found else torch.empty(0, dtype=torch.int64), lengths.cumsum(0), left=left)

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, index: int) -> Tensor:
        """Return one row, (length,)."""
        start = int(self.ends[index - 1]) if index else 0
        return self.values[start : int(self.ends[index])]

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the rows at `indices`, padded to the longest of them, (rows, longest)."""
        rows = [self.row(index) for index in indices.tolist()]
        longest = max((len(row) for row in rows), default=0)
        taken = self.values.new_full((len(rows), longest), self.pad)  # (rows, longest)
        for place, row in zip(taken, rows, strict=True):
            place[longest - len(row) if self.left else 0 :][: len(row)] = row
        return taken
