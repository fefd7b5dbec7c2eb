"""Int8 codes: how near they are to the weight."""

import pytest
import torch
from torch import Tensor

from recap_cli.plugins.weights.int8 import INT8, LARGEST

HALF = 0.5 + 1e-5  # of a scale; code and scale are themselves rounded, to a relative 6e-8 of up to 127 scales


def matrix(rows: int = 12, columns: int = 10) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    assert INT8.quantize is not None
    parts = INT8.quantize(weight)
    return parts["codes"], parts["scale"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_entry_is_within_half_a_scale(dtype: torch.dtype) -> None:
    weight = matrix(64, 96).to(dtype)
    codes, scale = quantized(weight)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (codes.shape, scale.shape) == ((64, 96), (64, 1))
    error = (codes.double() * scale - weight).abs()
    assert (error <= HALF * scale.double()).all()


def test_a_row_of_zeros_stays_zero() -> None:
    weight = matrix()
    weight[3] = 0.0
    codes, scale = quantized(weight)
    assert not codes[3].any()
    assert scale[3] > 0


def test_a_huge_entry_costs_its_own_row_and_no_other() -> None:
    weight = matrix()
    plain_codes, plain_scale = quantized(weight)
    weight[5, 2] = 1e30
    codes, scale = quantized(weight)
    others = torch.arange(12) != 5
    assert torch.equal(codes[others], plain_codes[others])
    assert torch.equal(scale[others], plain_scale[others])
    assert codes[5, 2] == LARGEST
    assert codes[5].count_nonzero() == 1
    assert torch.isfinite(codes[5].float() * scale[5]).all()


def test_codes_are_symmetric() -> None:
    weight = matrix(64, 96)
    codes, scale = quantized(weight)
    negative_codes, negative_scale = quantized(-weight)
    assert torch.equal(negative_codes, -codes)
    assert torch.equal(negative_scale, scale)
    assert codes.abs().amax(1).eq(LARGEST).all()  # each row uses the whole range
    assert codes.min() >= -LARGEST


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-37])
def test_the_smallest_numbers_are_kept_within_the_smallest_scale(value: float) -> None:
    codes, scale = quantized(torch.full((2, 3), value))
    assert torch.isfinite(scale).all()
    error = (codes.double() * scale - value).abs()
    assert (error <= HALF * scale.double()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_is_code_times_scale_rounded_once(dtype: torch.dtype) -> None:
    assert INT8.dense is not None
    codes, scale = quantized(matrix(20, 30))
    out = torch.empty(20, 30, dtype=dtype)
    INT8.dense({"codes": codes, "scale": scale}, out)
    assert torch.equal(out, (codes.float() * scale).to(dtype))
