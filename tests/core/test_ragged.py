"""Rows of different lengths as one tensor."""

import pytest
import torch

from recap_cli.core.ragged import Ragged
from recap_cli.core.task import IGNORED

ROWS = [[3], [], [1, 2, 4], [5, 6]]


@pytest.mark.parametrize(
    ("left", "padded"),
    [
        (False, [[5, 6, IGNORED], [1, 2, 4], [IGNORED] * 3]),
        (True, [[IGNORED, 5, 6], [1, 2, 4], [IGNORED] * 3]),
    ],
)
def test_rows_are_padded_to_the_longest_of_those_taken(left: bool, padded: list[list[int]]) -> None:
    ragged = Ragged.of(ROWS, left=left)
    taken = ragged[torch.tensor([3, 2, 1])]
    assert taken.tolist() == padded
    assert taken.dtype == torch.int64
    assert ragged[torch.tensor([0, 1])].shape == (2, 1)


def test_each_row_is_what_was_given() -> None:
    ragged = Ragged.of(ROWS)
    assert len(ragged) == 4
    assert [ragged.row(i).tolist() for i in range(4)] == ROWS
    assert ragged.values.tolist() == [3, 1, 2, 4, 5, 6]


def test_no_rows_and_rows_of_nothing_are_empty() -> None:
    nothing = Ragged.of([])
    assert (len(nothing), nothing.values.dtype, nothing.ends.dtype) == (0, torch.int64, torch.int64)
    assert nothing[torch.tensor([], dtype=torch.int64)].shape == (0, 0)
    assert Ragged.of([[], []])[torch.tensor([1, 0])].shape == (2, 0)


def test_another_pad_is_taken() -> None:
    ragged = Ragged(torch.tensor([1, 2, 3]), torch.tensor([1, 3]), pad=0)
    assert ragged[torch.tensor([0, 1])].tolist() == [[1, 0], [2, 3]]
