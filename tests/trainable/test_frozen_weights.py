"""Int8 codes: how near they are, and that dense weights are put together again as a naive assembly would."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recap_cli.trainable.frozen_weights import (
    LARGEST,
    Partition,
    Place,
    QuantizedEmbedding,
    dequantize,
    place_of,
    quantize,
    rest_of,
)

HALF = 0.5 + 1e-5  # of a scale; code and scale are themselves rounded, to a relative 6e-8 of up to 127 scales
SCATTERED, SIDE_BY_SIDE = torch.tensor([0, 3, 4, 9]), torch.tensor([3, 4, 5, 6])
AT_THE_START, AT_THE_END = torch.arange(4), torch.arange(6, 10)


def matrix(rows: int = 12, columns: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_entry_is_within_half_a_scale(dtype: torch.dtype) -> None:
    weight = matrix(64, 96).to(dtype)
    codes, scale = quantize(weight)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (codes.shape, scale.shape) == ((64, 96), (64, 1))
    error = (codes.double() * scale - weight).abs()
    assert (error <= HALF * scale.double()).all()


def test_a_row_of_zeros_stays_zero() -> None:
    weight = matrix()
    weight[3] = 0.0
    codes, scale = quantize(weight)
    assert not codes[3].any()
    assert scale[3] > 0
    assert not dequantize(codes, scale, dtype=torch.float32)[3].any()


def test_a_huge_entry_costs_its_own_row_and_no_other() -> None:
    weight = matrix()
    plain_codes, plain_scale = quantize(weight)
    weight[5, 2] = 1e30
    codes, scale = quantize(weight)
    others = torch.arange(12) != 5
    assert torch.equal(codes[others], plain_codes[others])
    assert torch.equal(scale[others], plain_scale[others])
    assert codes[5, 2] == LARGEST
    assert codes[5].count_nonzero() == 1
    assert torch.isfinite(codes[5].float() * scale[5]).all()


def test_codes_are_symmetric() -> None:
    weight = matrix(64, 96)
    codes, scale = quantize(weight)
    negative_codes, negative_scale = quantize(-weight)
    assert torch.equal(negative_codes, -codes)
    assert torch.equal(negative_scale, scale)
    assert codes.abs().amax(1).eq(LARGEST).all()  # each row uses the whole range
    assert codes.min() >= -LARGEST


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-37])
def test_the_smallest_numbers_are_kept_within_the_smallest_scale(value: float) -> None:
    codes, scale = quantize(torch.full((2, 3), value))
    assert torch.isfinite(scale).all()
    error = (codes.double() * scale - value).abs()
    assert (error <= HALF * scale.double()).all()


def naive(codes: Tensor, scale: Tensor, part: Tensor, dim: int, index: Tensor) -> Tensor:
    """The dense weight put together one row, or one column, at a time, in float64."""
    still = iter((codes.double() * scale).unbind(dim))
    trains = iter(part.double().unbind(dim))
    chosen = set(index.tolist())
    return torch.stack([next(trains) if i in chosen else next(still) for i in range(codes.shape[dim] + len(index))], dim)


def places(index: Tensor, length: int) -> tuple[Place, Place]:
    return place_of(index, "cpu"), place_of(rest_of(index, length), "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("index", [SCATTERED, SIDE_BY_SIDE, AT_THE_START, AT_THE_END])
def test_a_dense_weight_is_the_naive_assembly(index: Tensor, dim: int, dtype: torch.dtype) -> None:
    codes, scale = quantize(matrix(6, 8) if dim == 0 else matrix(8, 6))
    part = matrix(4, 8, seed=1) if dim == 0 else matrix(8, 4, seed=1)
    dense = dequantize(codes, scale, part, Partition(dim, *places(index, 10)), dtype=dtype)
    expected = naive(codes, scale, part, dim, index)
    assert dense.shape == ((10, 8) if dim == 0 else (8, 10))
    assert dense.dtype == dtype
    assert torch.equal(dense.index_select(dim, index), part.to(dtype))  # what moves is never rounded to a code
    torch.testing.assert_close(dense.double(), expected, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=0)


@pytest.mark.parametrize("index", [AT_THE_START, AT_THE_END, SIDE_BY_SIDE])
def test_a_slice_and_the_same_indices_give_the_same_bits(index: Tensor) -> None:
    codes, scale = quantize(matrix(6, 8))
    part = matrix(4, 8, seed=1)
    as_slices = dequantize(codes, scale, part, Partition(0, *places(index, 10)), dtype=torch.bfloat16)
    scattered = dequantize(codes, scale, part, Partition(0, index, rest_of(index, 10)), dtype=torch.bfloat16)
    torch.testing.assert_close(as_slices.float(), scattered.float(), rtol=8e-3, atol=0)


def test_codes_without_a_part_are_the_whole_weight() -> None:
    weight = matrix(20, 30)
    codes, scale = quantize(weight)
    dense = dequantize(codes, scale, dtype=torch.float32)
    assert torch.equal(dense, codes.float() * scale)


def test_places_are_slices_where_indices_stand_side_by_side() -> None:
    assert place_of(SIDE_BY_SIDE, "cpu") == slice(3, 7)
    assert place_of(torch.tensor([5]), "cpu") == slice(5, 6)
    found = place_of(SCATTERED, "cpu")
    assert isinstance(found, Tensor)
    assert torch.equal(found, SCATTERED)
    assert rest_of(SCATTERED, 10).tolist() == [1, 2, 5, 6, 7, 8]
    assert rest_of(torch.arange(10), 10).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_of_codes_is_that_of_the_dequantized_weight(dtype: torch.dtype) -> None:
    codes, scale = quantize(matrix(40, 16))
    ids = torch.tensor([[0, 39, 7], [7, 7, 1]])
    dense = dequantize(codes, scale, dtype=dtype)
    out = QuantizedEmbedding(codes, scale, dtype)(ids)
    assert out.dtype == dtype
    assert torch.equal(out, F.embedding(ids, dense))
