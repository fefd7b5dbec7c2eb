"""A teacher's outputs for the training examples, kept so that the teacher itself need not be there (Hinton et al., 2015)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from recap_cli.core.label_maps import LabelMaps
from recap_cli.core.ragged import Ragged
from recap_cli.data.split import Split

VALUES, ENDS = "values", "ends"


def stored_as(outputs: int) -> torch.dtype:
    """Return the type in which rows of so many outputs are kept."""
    return torch.bfloat16 if outputs > 1 else torch.float32


@dataclass(frozen=True)
class SoftTargets:
    """The outputs of a teacher, row by row.

    Attributes:
        values: (variants, rows, outputs). They are bfloat16, or float32 where there is one output: a number is taken as it
            is, and logits are compared. A variant is the examples as they are, or all of them flipped.
        ends: Where the rows of each example end, int64, (examples,).
    """

    values: Tensor
    ends: Tensor

    @classmethod
    def of(cls, variants: Sequence[Sequence[Tensor]], lengths: Tensor) -> "SoftTargets":
        """Return those of batches of rows, (rows, outputs) each, for every variant; `lengths` are of the examples."""
        return cls(torch.stack([torch.cat(list(batches)) for batches in variants]), lengths.cumsum(0))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "SoftTargets":
        """Return what `to_tensors` has given. Raises `ValueError` for anything else."""
        if tensors.keys() != {VALUES, ENDS}:
            raise ValueError(f"it holds {', '.join(sorted(tensors)) or 'nothing'}")
        values, ends = tensors[VALUES], tensors[ENDS]
        if (
            values.ndim != 3
            or values.dtype != stored_as(values.shape[-1])
            or ends.ndim != 1
            or ends.dtype != torch.int64
            or not len(ends)
        ):
            raise ValueError("its tensors have other shapes or types")
        if bool((ends.diff(prepend=ends.new_zeros(1)) < 0).any()) or int(ends[-1]) != values.shape[1]:
            raise ValueError(f"its examples do not have {values.shape[1]:,} rows in all")
        return cls(values, ends)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a file."""
        return {VALUES: self.values, ENDS: self.ends}

    def __len__(self) -> int:
        return len(self.ends)

    def at(self, indices: Tensor, variants: Tensor | None) -> Tensor:
        """Return the rows of examples, padded with 0 to the most that one of them has.

        Args:
            indices: Of the examples, int64, (batch,).
            variants: Of each example, int64, (batch,); None is the first of all.

        Returns:
            (batch, most rows, outputs), float32.
        """
        first = self.ends[indices - 1].where(indices > 0, 0)  # (batch,)
        lengths = self.ends[indices] - first  # (batch,)
        along = torch.arange(int(lengths.max()) if len(lengths) else 0)  # (most rows,)
        there = along < lengths[:, None]  # (batch, most rows)
        places = (first[:, None] + along).where(there, 0)  # (batch, most rows)
        chosen = variants[:, None].expand_as(places) if variants is not None else torch.zeros_like(places)
        rows: Tensor = self.values[chosen, places].float()
        return rows.where(there[:, :, None], 0.0)


def fingerprint(split: Split) -> str:
    """Return a digest of a split: its targets, and all that its inputs are made of."""
    digest = sha256(f"{len(split)} {split.variants}".encode())
    targets = split.targets
    if isinstance(targets, LabelMaps):
        for piece in targets.content():
            digest.update(piece)
    else:
        for tensor in (targets.values, targets.ends) if isinstance(targets, Ragged) else (targets,):
            digest.update(tensor.contiguous().numpy().tobytes())
    for piece in split.content():
        digest.update(piece)
    return digest.hexdigest()
