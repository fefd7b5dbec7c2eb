"""What a finetuning stage holds, counted on the tensors that are there (and by the allocator, on CUDA)."""

import resource
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from recap_cli.core.optim import Optimizer


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`: a view and its base count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type != "meta"}
    return sum(storages.values())


def held(model: nn.Module, optimizer: Optimizer, gradient_bytes: int) -> dict[str, int]:
    """Bytes held while finetuning: `weights` (residents, compact parameters and masters), `gradients` at their peak,
    `optimizer`.
    """
    weights = [*model.parameters(), *model.buffers(), *(slot.master for slot in optimizer.slots)]
    return {
        "weights_bytes": storage_bytes(weights),
        "gradients_bytes": gradient_bytes,
        "optimizer_bytes": optimizer.state_bytes(),
    }


def full_finetuning(params: int, moments: int) -> dict[str, int]:
    """What finetuning every one of `params` weights holds in fp32 with `moments` states a weight: computed, not measured."""
    return {
        "weights_bytes": 4 * params,
        "gradients_bytes": 4 * params,
        "optimizer_bytes": 4 * params * moments,
    }


def process(device: torch.device) -> dict[str, Any]:
    """Peak resident set of this process so far, and on CUDA the allocator's peaks since `reset`."""
    scale = 1 if sys.platform == "darwin" else 1024
    seen: dict[str, Any] = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    if device.type == "cuda":
        seen["cuda_max_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        seen["cuda_max_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return seen


def reset(device: torch.device) -> None:
    """Start the allocator's peaks anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
