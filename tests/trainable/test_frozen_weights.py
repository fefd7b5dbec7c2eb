"""Frozen matrices made dense again: put together as a naive assembly would, for every frozen weight that quantizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recap_cli.trainable.frozen_weights import (
    Partition,
    Place,
    QuantizedEmbedding,
    QuantizedMatrix,
    dense_weight,
    hold,
    place_of,
    rest_of,
)
from tests.weights import QUANTIZED, WEIGHTS

SCATTERED, SIDE_BY_SIDE = torch.tensor([0, 3, 4, 9]), torch.tensor([3, 4, 5, 6])
AT_THE_START, AT_THE_END = torch.arange(4), torch.arange(6, 10)


def matrix(rows: int = 12, columns: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def held(name: str, weight: Tensor) -> QuantizedMatrix:
    return hold(WEIGHTS[name], "a weight", weight, "cpu")


def naive(frozen: Tensor, part: Tensor, dim: int, index: Tensor) -> Tensor:
    """The dense weight put together one row, or one column, at a time."""
    still, trains = iter(frozen.unbind(dim)), iter(part.unbind(dim))
    chosen = set(index.tolist())
    return torch.stack([next(trains) if i in chosen else next(still) for i in range(frozen.shape[dim] + len(index))], dim)


def places(index: Tensor, length: int) -> tuple[Place, Place]:
    return place_of(index, "cpu"), place_of(rest_of(index, length), "cpu")


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("index", [SCATTERED, SIDE_BY_SIDE, AT_THE_START, AT_THE_END])
def test_a_dense_weight_is_the_naive_assembly(index: Tensor, dim: int, dtype: torch.dtype, name: str) -> None:
    frozen = held(name, matrix(6, 8) if dim == 0 else matrix(8, 6))
    part = matrix(4, 8, seed=1) if dim == 0 else matrix(8, 4, seed=1)
    dense = dense_weight(frozen, part, Partition(dim, *places(index, 10)), dtype=dtype)
    assert dense.shape == ((10, 8) if dim == 0 else (8, 10))
    assert dense.dtype == dtype
    assert torch.equal(dense.index_select(dim, index), part.to(dtype))  # what moves is never rounded to a code
    assert torch.equal(dense, naive(frozen.dense(dtype), part.to(dtype), dim, index))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("index", [AT_THE_START, AT_THE_END, SIDE_BY_SIDE])
def test_a_slice_and_the_same_indices_give_the_same_bits(index: Tensor, name: str) -> None:
    frozen, part = held(name, matrix(6, 8)), matrix(4, 8, seed=1)
    as_slices = dense_weight(frozen, part, Partition(0, *places(index, 10)), dtype=torch.bfloat16)
    scattered = dense_weight(frozen, part, Partition(0, index, rest_of(index, 10)), dtype=torch.bfloat16)
    assert torch.equal(as_slices, scattered)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_matrix_without_a_part_is_the_whole_weight_as_the_layer_keeps_it(name: str) -> None:
    frozen = held(name, matrix(20, 30).t())
    upright = dense_weight(frozen, dtype=torch.float32)
    transposed = dense_weight(frozen, partition=Partition(transposed=True), dtype=torch.float32)
    assert torch.equal(upright, transposed)
    assert (upright.stride(), transposed.stride()) == ((20, 1), (1, 30))


def test_places_are_slices_where_indices_stand_side_by_side() -> None:
    assert place_of(SIDE_BY_SIDE, "cpu") == slice(3, 7)
    assert place_of(torch.tensor([5]), "cpu") == slice(5, 6)
    assert place_of(torch.tensor([], dtype=torch.int64), "cpu") == slice(0, 0)
    found = place_of(SCATTERED, "cpu")
    assert isinstance(found, Tensor)
    assert torch.equal(found, SCATTERED)
    assert rest_of(SCATTERED, 10).tolist() == [1, 2, 5, 6, 7, 8]
    assert rest_of(torch.arange(10), 10).tolist() == []


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("width", [16, 50, 64, 192])  # less than a block of NF4, not whole ones, one, and three
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_of_codes_is_that_of_the_dense_weight(dtype: torch.dtype, width: int, name: str) -> None:
    frozen = held(name, matrix(40, width))
    ids = torch.tensor([[0, 39, 7], [7, 7, 1]])
    out = QuantizedEmbedding(frozen, dtype)(ids)
    assert out.dtype == dtype
    assert torch.equal(out, F.embedding(ids, frozen.dense(dtype)))
