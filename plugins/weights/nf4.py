"""NF4: frozen matrices as 4-bit codes in blocks of 64, with double quantization (QLoRA, 2305.14314, sec. 3 and appendix E).

A block is 64 entries of the matrix read row by row, and its scale is its largest magnitude. Scales are 8-bit codes themselves,
in groups of 256 blocks, of the dynamic data type of 2110.02861. That is 4.127 bits per entry. The 4-bit codes are those of
bitsandbytes; the 8-bit ones are the nearest, which its kernel for the CPU misses by one in up to 0.3 % of the blocks.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from recap_cli.api import FrozenWeight

BLOCK, GROUP = 64, 256  # entries of a block, blocks of a group
AT_ONCE = 2**19  # entries that are in fp32 at a time, of a matrix that is made dense
TINY = 1e-38  # the least scale: a block of zeros has codes of zero

# The quantiles of a normal distribution that appendix E prints.
BOOK = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)  # (16,)


def _dynamic_book() -> Tensor:
    """Return the 256 values of the dynamic 8-bit type: 2^i linear steps in the i-th of seven decades, both signs, 0 and 1."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values  # (256,)


DYNAMIC_BOOK = _dynamic_book()
_BYTES = torch.arange(256)
# The two values of a byte, the high four bits first, as one number of 64 bits: half as many look-ups, each of an integer.
PAIRS = torch.stack([BOOK[_BYTES >> 4], BOOK[_BYTES & 15]], 1).view(torch.int64).flatten()  # (256,)
TABLES = {"book": BOOK, "dynamic": DYNAMIC_BOOK, "pairs": PAIRS}


@cache
def _table_there(name: str, device: torch.device) -> Tensor:
    return TABLES[name].to(device)


def _table(name: str, device: torch.device) -> Tensor:
    """Return a table on a device; there is one of each on it."""
    return TABLES[name] if device.type in ("cpu", "meta") else _table_there(name, device)


def quantize(matrix: Tensor) -> dict[str, Tensor]:
    """Return two codes per byte, uint8, (⌈entries / 2⌉,), and what gives the scale of each block.

    `scales` are uint8 codes, (blocks,), `largest` fp32, (groups,), and `mean` fp32, (1,).
    """
    entries = matrix.numel()
    blocks = _in_rows(matrix.detach().float().reshape(-1), BLOCK)  # (blocks, 64)
    scales = blocks.abs().amax(1)  # (blocks,)
    scaled = blocks * (1.0 / scales.clamp(min=TINY)).unsqueeze(1)  # (blocks, 64), from -1 to 1
    codes = torch.zeros(scaled.shape, dtype=torch.uint8, device=scaled.device)  # (blocks, 64)
    for low, high in pairwise(BOOK):  # 15 comparisons; a binary search took four times as long
        codes += scaled > float((low + high) / 2)
    codes = codes.view(-1, 2)  # (blocks · 32, 2)
    packed = codes[:, 0] * 16 + codes[:, 1]  # (blocks · 32,)
    mean = scales.mean().reshape(1) if len(scales) else scales.new_zeros(1)  # (1,)
    groups = _in_rows(scales - mean, GROUP)  # (groups, 256)
    largest = groups.abs().amax(1)  # (groups,)
    relative = groups * (1.0 / largest.clamp(min=TINY)).unsqueeze(1)  # (groups, 256)
    book = _table("dynamic", matrix.device)
    nearest = torch.bucketize(relative, (book[:-1] + book[1:]) / 2).to(torch.uint8)  # (groups, 256)
    return {
        "codes": packed[: -(-entries // 2)].clone(),
        "scales": nearest.view(-1)[: len(scales)].clone(),
        "largest": largest,
        "mean": mean,
    }


def dense(parts: Mapping[str, Tensor], out: Tensor) -> None:
    """Write value · scale, rounded once, some rows at a time."""
    rows, width = out.shape
    scales = _scales(parts, torch.arange(len(parts["scales"]), device=out.device))  # (blocks,)
    step = max(1, AT_ONCE // max(1, width * BLOCK)) * BLOCK  # rows that end with a block
    for first, last in _steps(rows, step):
        start, end = first * width, last * width  # entries
        packed = parts["codes"][start // 2 : -(-end // 2)]
        pairs = _table("pairs", out.device).index_select(0, packed.int())  # (⌈entries / 2⌉,)
        values = pairs.view(torch.float32)[: end - start]  # (entries,)
        whole = (end - start) // BLOCK
        values[: whole * BLOCK].view(whole, BLOCK).mul_(scales[start // BLOCK : start // BLOCK + whole].unsqueeze(1))
        values[whole * BLOCK :].mul_(scales[start // BLOCK + whole : -(-end // BLOCK)])  # the last block, if it is cut
        out[first:last].copy_(values.view(last - first, width))


def rows(parts: Mapping[str, Tensor], ids: Tensor, out: Tensor) -> None:
    """Write some rows, some at a time."""
    width = out.shape[1]
    some = _rows_of_blocks if width % BLOCK == 0 else _rows_of_entries
    for first, last in _steps(len(ids), max(1, AT_ONCE // max(1, width))):
        out[first:last].copy_(some(parts, ids[first:last], width))


def _rows_of_blocks(parts: Mapping[str, Tensor], ids: Tensor, width: int) -> Tensor:
    """Return rows that are whole blocks, fp32, (count, in)."""
    per_row = width // BLOCK
    packed = parts["codes"].view(-1, width // 2)[ids].int()  # (count, in / 2)
    pairs = _table("pairs", ids.device).index_select(0, packed.view(-1))  # (count · in / 2,)
    blocks = ids.unsqueeze(1) * per_row + torch.arange(per_row, device=ids.device)  # (count, blocks of a row)
    values = pairs.view(torch.float32).view(len(ids), per_row, BLOCK).mul_(_scales(parts, blocks).unsqueeze(2))
    return values.view(len(ids), width)  # (count, in)


def _rows_of_entries(parts: Mapping[str, Tensor], ids: Tensor, width: int) -> Tensor:
    """Return rows that begin and end within blocks, or within bytes, fp32, (count, in)."""
    entries = ids.unsqueeze(1) * width + torch.arange(width, device=ids.device)  # (count, in)
    codes = (parts["codes"][entries >> 1].int() >> (4 - 4 * (entries & 1))) & 15  # (count, in)
    return _table("book", ids.device)[codes].mul_(_scales(parts, entries // BLOCK))


def nbytes(shape: tuple[int, int]) -> int:
    """Half a byte per entry, one per block, four per group, and four."""
    entries = shape[0] * shape[1]
    blocks = -(-entries // BLOCK)
    return -(-entries // 2) + blocks + 4 * -(-blocks // GROUP) + 4


def _scales(parts: Mapping[str, Tensor], blocks: Tensor) -> Tensor:
    """Return the scales of blocks, fp32, of their shape."""
    book = _table("dynamic", blocks.device)
    return book[parts["scales"][blocks].int()].mul_(parts["largest"][blocks // GROUP]).add_(parts["mean"])


def _in_rows(flat: Tensor, length: int) -> Tensor:
    """Return a tensor, (count,), as rows of a length, (⌈count / length⌉, length), filled up with zeros."""
    return F.pad(flat, (0, -len(flat) % length)).view(-1, length)


def _steps(count: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, step):
        yield first, min(first + step, count)


NF4 = FrozenWeight(dtype=torch.bfloat16, quantize=quantize, dense=dense, rows=rows, nbytes=nbytes)
