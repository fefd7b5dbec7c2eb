"""Targets as tensors, from each type that a task may make."""

import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from recap_cli.core.ragged import Ragged
from recap_cli.core.task import IGNORED
from recap_cli.data.split import Split, targets_of


@pytest.mark.parametrize(
    ("column", "wanted"),
    [
        (pa.array([2, 0, 1]), torch.tensor([2, 0, 1])),
        (pa.array([0.5, -1.25, 1e10]), torch.tensor([0.5, -1.25, 1e10])),
        (pa.array([[1.0, 0.0], [0.0, 0.0]], pa.list_(pa.float64(), 2)), torch.tensor([[1.0, 0.0], [0.0, 0.0]])),
    ],
    ids=["numbers of outputs", "numbers", "lists of one length"],
)
def test_targets_are_of_the_type_that_a_loss_takes(column: pa.Array, wanted: torch.Tensor) -> None:
    found = targets_of(Dataset(pa.table({"label": column})))
    assert isinstance(found, torch.Tensor)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


def test_a_selection_of_examples_has_its_own_targets() -> None:
    """`datasets` keeps the whole table and a list of rows."""
    pairs = pa.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], pa.list_(pa.float64(), 2))
    assert targets_of(Dataset(pa.table({"label": pairs})).select([2, 1])).tolist() == [[1.0, 1.0], [0.0, 1.0]]  # type: ignore[union-attr]
    assert targets_of(Dataset(pa.table({"label": [5, 6, 7]})).select([2, 0])).tolist() == [7, 5]  # type: ignore[union-attr]
    rows = targets_of(Dataset(pa.table({"label": [[5], [6, 7], []]})).select([1, 2]))
    assert isinstance(rows, Ragged)
    assert [rows.row(i).tolist() for i in range(2)] == [[6, 7], []]


def test_lists_of_different_lengths_are_rows_that_a_batch_pads() -> None:
    found = targets_of(Dataset(pa.table({"label": [[0, 2, 1], [], [1]]})))
    assert isinstance(found, Ragged)
    split = Split("made", found, lambda indices, _: {"at": indices})
    assert split.batch(torch.tensor([2, 0]))["labels"].tolist() == [[1, IGNORED, IGNORED], [0, 2, 1]]
    assert split.labels(torch.tensor([1]))["labels"].shape == (1, 0)
    assert len(split) == 3
