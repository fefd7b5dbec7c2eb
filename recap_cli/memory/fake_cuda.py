"""CUDA's choice of kernels for tensors that are fake and on the CPU: what a kernel saves for its backward differs.

On the CPU attention with dropout falls back to plain products and saves the probabilities, and dropout saves a mask of its
input's type; on CUDA the fused attention saves a number per row, and dropout a byte per entry. The rules are those of
`sdp_utils.cpp` and `Dropout.cpp` in torch (without cuDNN's attention, which newer releases may choose on newer cards); they are
for shapes only, a real tensor must not come here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recap_cli.memory.tracker import ASKED, PLACES, everywhere, one

FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_HEAD_DIM = 256  # the most that flash attention takes
BIAS_ALIGNMENT = 16  # entries of a row of the mask, to which the memory-efficient kernel pads it


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Inside, attention and dropout are those that CUDA would run, for every thread: one prediction at a time, and no training.

    The functions are swapped where both libraries look them up. A torch-function mode would not do: it is off within the
    `backward` that it sees, so what a checkpoint recomputes there would be other kernels.
    """
    plain = F.scaled_dot_product_attention, F.dropout
    F.scaled_dot_product_attention, F.dropout = _attention, _dropout
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.dropout = plain


class Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers where a program asks a fake tensor for its value, and no tracker that `answers` is there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is PLACES:
            return everywhere(*args)
        return one(args[0].dtype) if func is ASKED else func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,  # (batch, heads, tokens, head_dim)
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa and key.shape[1] != query.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    if attn_mask is None and query.dtype in FLASH_DTYPES and head_dim <= FLASH_HEAD_DIM:
        padded = [F.pad(t, (0, -head_dim % 8)) if head_dim % 8 else t for t in (query, key, value)]
        out = torch.ops.aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, scale=scale)[0]
    else:
        saves = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        bias = None if attn_mask is None else _bias(attn_mask, query, key)
        out = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, saves, dropout_p, is_causal, scale=scale
        )[0]
    narrow: Tensor = out[..., :head_dim] if out.shape[-1] != head_dim else out
    return narrow


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as the kernel reads it: numbers of the query's type, rows padded, the same memory for all heads."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    rows, columns = query.shape[-2], key.shape[-2]
    if columns % BIAS_ALIGNMENT:
        mask = F.pad(mask, (0, -columns % BIAS_ALIGNMENT))[..., :columns]
    return mask.expand(query.shape[0], query.shape[1], rows, columns)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0:
        return input
    kept: Tensor = torch.native_dropout(input, p, True)[0]
    return kept
