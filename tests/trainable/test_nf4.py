"""NF4 against the words of the paper, entry by entry, and against bitsandbytes and torchao where they are installed."""

import importlib
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from recap_cli.plugins.weights.nf4 import AT_ONCE, BLOCK, BOOK, DYNAMIC_BOOK, GROUP, NF4, dense, nbytes, quantize, rows

SHAPES = [(8, 64), (5, 50), (7, 33), (1, 1), (3, 130), (300, 64)]  # whole blocks; cut ones, odd ones, and two groups


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)


def made_dense(parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full(shape, torch.nan, dtype=dtype)
    dense(parts, out)
    return out


def nearest(values: list[float], x: float) -> int:
    return min(range(len(values)), key=lambda i: abs(values[i] - x))


def naive(weight: Tensor) -> tuple[list[int], list[int], list[float]]:
    """The 4-bit codes, the 8-bit codes of the scales and the dense entries, with a loop over everything, in double."""
    flat, book, dynamic = weight.flatten().tolist(), BOOK.tolist(), DYNAMIC_BOOK.tolist()
    blocks = [flat[start : start + BLOCK] for start in range(0, len(flat), BLOCK)]
    scales = [max(map(abs, block)) for block in blocks]
    codes = [nearest(book, x / scale) for block, scale in zip(blocks, scales, strict=True) for x in block]
    mean = sum(scales) / len(scales)
    centred = [scale - mean for scale in scales]
    groups = [centred[start : start + GROUP] for start in range(0, len(centred), GROUP)]
    largest = [max(*map(abs, group), 1e-38) for group in groups]
    scale_codes = [nearest(dynamic, x / most) for group, most in zip(groups, largest, strict=True) for x in group]
    again = [dynamic[code] * largest[i // GROUP] + mean for i, code in enumerate(scale_codes)]
    return codes, scale_codes, [book[code] * again[i // BLOCK] for i, code in enumerate(codes)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_scales_and_entries_are_those_of_a_loop_over_blocks(shape: tuple[int, int]) -> None:
    weight = matrix(shape)
    parts = quantize(weight)
    codes, scale_codes, entries = naive(weight)
    packed = parts["codes"].tolist()
    assert [(packed[i // 2] >> (0 if i % 2 else 4)) & 15 for i in range(len(codes))] == codes
    if len(scale_codes) > 1:  # of one block, scale and mean differ by nothing but rounding, and any code will do
        assert parts["scales"].tolist() == scale_codes
    found = made_dense(parts, shape)
    torch.testing.assert_close(found, torch.tensor(entries).view(shape), rtol=1e-5, atol=1e-7)
    assert torch.equal(made_dense(parts, shape, torch.bfloat16), found.bfloat16())  # rounded once
    assert sum(part.nbytes for part in parts.values()) == nbytes(shape)


def test_the_book_is_the_quantiles_of_appendix_e() -> None:
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083  # the paper's: half of the way from 1 to 1 - 1/30, and to 1 - 1/32
    positive, negative = (normal.icdf(torch.linspace(offset, 0.5, n + 1)[:-1]) for n in (8, 7))
    quantiles = torch.cat([positive, torch.zeros(1), -negative]).sort().values
    torch.testing.assert_close(BOOK, quantiles / quantiles.max(), rtol=0, atol=1e-3)
    assert BOOK.tolist() == sorted(BOOK.tolist())
    assert (BOOK[0], BOOK[7], BOOK[15]) == (-1, 0, 1)


def test_the_dynamic_book_has_256_values_in_seven_decades_and_no_minus_one() -> None:
    assert len(DYNAMIC_BOOK.unique()) == 256
    assert (DYNAMIC_BOOK.max(), DYNAMIC_BOOK[127]) == (1, 0)
    assert torch.equal(DYNAMIC_BOOK[1:127], -DYNAMIC_BOOK[128:254].flip(0))
    decades = DYNAMIC_BOOK[128:].log10().ceil().clamp(max=0)
    assert [int((decades == d).sum()) for d in range(-6, 1)] == [1, 2, 4, 8, 16, 32, 65]


def test_an_entry_of_a_normal_weight_costs_4_127_bits_and_is_a_tenth_off() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    assert 8 * nbytes((256, 512)) / weight.numel() == pytest.approx(4.127, abs=1e-3)
    assert NF4.entry_bytes == 0.5 + 1 / 64 + 4 / (64 * 256)
    error = made_dense(quantize(weight), (256, 512)) - weight
    assert float(error.norm() / weight.norm()) == pytest.approx(0.096, abs=0.01)


def test_a_matrix_is_the_same_in_one_piece_and_in_several() -> None:
    wide = (3 * BLOCK, AT_ONCE // BLOCK + 6)  # three pieces of 64 rows, none of which is whole blocks
    weight = matrix(wide)
    parts = quantize(weight)
    ids = torch.tensor([0, wide[0] - 1, BLOCK, BLOCK - 1])
    found = torch.empty(len(ids), wide[1])
    rows(parts, ids, found)
    assert torch.equal(found, made_dense(parts, wide)[ids])


def test_it_writes_into_what_has_other_strides() -> None:
    weight = matrix((6, 50))
    parts = quantize(weight)
    expected = made_dense(parts, (6, 50))
    transposed, narrow = torch.empty(50, 6).t(), torch.empty(6, 60)
    dense(parts, transposed), dense(parts, narrow[:, 7:57])
    assert torch.equal(transposed, expected)
    assert torch.equal(narrow[:, 7:57], expected)
    assert all(torch.equal(part, quantize(weight.t().contiguous().t())[name]) for name, part in parts.items())


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39, 1e30])
def test_zeros_and_the_smallest_and_largest_numbers_stay_finite(value: float) -> None:
    weight = matrix((4, 64))
    weight[1] = value
    found = made_dense(quantize(weight), (4, 64))
    assert found.isfinite().all()
    assert value >= 1 or found[1].abs().max() <= 0.06  # a scale's own error
    zeros = made_dense(quantize(torch.zeros(2, 64)), (2, 64))
    assert not zeros.any()


def library(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install {name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        return importlib.import_module({"bitsandbytes": "bitsandbytes.functional"}.get(name, name))


@pytest.mark.parametrize("shape", [*SHAPES, (768, 768), (513, 100)], ids=str)
def test_codes_and_scales_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    theirs = library("bitsandbytes")
    weight = matrix(shape)
    parts = quantize(weight)
    codes, state = theirs.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    assert torch.equal(BOOK, state.code)
    assert torch.equal(DYNAMIC_BOOK, state.state2.code)
    assert torch.equal(parts["codes"], codes.flatten())
    assert torch.equal(parts["largest"], state.state2.absmax)
    assert torch.equal(parts["mean"], state.offset.reshape(1))
    if math.prod(shape) <= BLOCK:
        return
    same = parts["scales"] == state.absmax
    assert float(same.float().mean()) > 0.99
    _, plain = theirs.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
    relative = (plain.absmax - parts["mean"]) / parts["largest"].repeat_interleave(GROUP)[: len(plain.absmax)]
    ours, other = ((DYNAMIC_BOOK[of.int()] - relative).abs()[~same] for of in (parts["scales"], state.absmax))
    assert (ours < other).all()  # its kernel for the CPU does not always find the nearest
    state.absmax = parts["scales"]  # all else being equal, so is what it makes dense
    assert torch.equal(made_dense(parts, shape), theirs.dequantize_4bit(codes, state))


def test_codes_are_those_of_torchao_but_at_the_edges_of_its_shorter_book() -> None:
    """Its book has four digits, and its double quantization is another, so the codes alone are compared."""
    library("torchao")
    to_nf4 = importlib.import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor").to_nf4
    weight = matrix((256, 64))
    packed = quantize(weight)["codes"], to_nf4(weight, BLOCK, GROUP).quantized_data.flatten()
    ours, theirs = (torch.stack([codes >> 4, codes & 15], 1).flatten().int() for codes in packed)
    differs = ours != theirs
    assert float(differs.float().mean()) < 1e-3
    scaled = (weight.view(-1, BLOCK) / weight.view(-1, BLOCK).abs().amax(1, keepdim=True)).flatten()
    edges = (BOOK[ours] + BOOK[theirs]) / 2
    assert ((scaled - edges).abs()[differs] < 1e-4).all()
