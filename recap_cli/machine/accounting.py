"""The memory that a finetuning stage holds: counted on its tensors, and measured by the allocator and the system."""

import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from recap_cli.machine import nvml
from recap_cli.trainable.optim import Optimizer

KINDS = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
REST = "activations_and_temporary_bytes"


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages of `tensors`: a view and its base count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type != "meta"}
    return sum(storages.values())


def held(model: nn.Module, optimizer: Optimizer, gradient_bytes: int) -> dict[str, int]:
    """Return the bytes held on the device while finetuning.

    Args:
        model: The model, partly trainable.
        optimizer: Its optimizer.
        gradient_bytes: The gradients at their peak.

    Returns:
        `weights_bytes` (weights, compact parameters and masters), `gradients_bytes`, `optimizer_bytes`, and `offloaded_bytes`:
        masters and moments on the CPU.
    """
    weights = [*model.parameters(), *model.buffers()]
    devices = {weight.device.type for weight in weights}
    kept = [*_masters(optimizer), *(m for moments in optimizer.moments.values() for m in moments.values())]
    away = [tensor for tensor in kept if tensor.device.type not in devices]
    return {
        "weights_bytes": storage_bytes([*weights, *(t for t in _masters(optimizer) if t.device.type in devices)]),
        "gradients_bytes": gradient_bytes,
        "optimizer_bytes": 0 if away else optimizer.state_bytes(),
        "offloaded_bytes": storage_bytes(away),
    }


def held_by_blocks(model: nn.Module, blocks: Sequence[str], optimizer: Optimizer) -> dict[str, int]:
    """Return the bytes that a device holds while a model on the CPU visits it a block at a time: counted, also on the CPU.

    That is the largest block, what stands outside the blocks, and the gradients and moments of the latter. Tables of embeddings
    are looked up on the CPU (`core.streaming`).

    Args:
        model: The model, partly trainable.
        blocks: The paths of its blocks.
        optimizer: Its optimizer.

    Returns:
        As `held`; `offloaded_bytes` are the moments of what is in a block, or in a table.
    """
    places = {f"{name}." for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    inside = {name: next((f"{path}." for path in blocks if name.startswith(f"{path}.")), "") for name in _tensors(model)}

    def most(sizes: Mapping[str, int]) -> int:
        """The bytes outside, and those of the block that has most."""
        by_block: dict[str, int] = {}
        for name, size in sizes.items():
            if inside[name] or not any(name.startswith(place) for place in places):
                by_block[inside[name]] = by_block.get(inside[name], 0) + size
        return by_block.pop("", 0) + max(by_block.values(), default=0)

    trained = {one.name: one.grad_param for one in optimizer.trainables}
    moments = {name: storage_bytes(kept.values()) for name, kept in optimizer.moments.items()}
    stay = {name for name in trained if not inside[name] and not any(name.startswith(place) for place in places)}
    return {
        "weights_bytes": most({name: tensor.nbytes for name, tensor in _tensors(model).items()}),
        "gradients_bytes": most({name: param.nbytes for name, param in trained.items()}),
        "optimizer_bytes": sum(moments[name] for name in stay),
        "offloaded_bytes": sum(size for name, size in moments.items() if name not in stay),
    }


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def held_now(device: torch.device, model: nn.Module | None, optimizer: Optimizer | None) -> dict[str, int]:
    """Return the bytes that a model and its optimizer, even half made, hold on a device now, by kind."""
    masters = _masters(optimizer) if optimizer is not None else []
    weights = [*model.parameters(), *model.buffers()] if model is not None else []
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    moments = [moment for kept in optimizer.moments.values() for moment in kept.values()] if optimizer is not None else []
    kinds = ([*weights, *masters], gradients, moments)
    return {
        kind: storage_bytes(t for t in tensors if t.device.type == device.type)
        for kind, tensors in zip(KINDS, kinds, strict=True)
    }


def _masters(optimizer: Optimizer) -> list[Tensor]:
    """Return the fp32 masters that are separate tensors. `Trainable.master` would copy the others."""
    return [trainable.own_master for trainable in optimizer.trainables if trainable.own_master is not None]


def full_finetuning(params: int, moments: int) -> dict[str, int]:
    """Return what full finetuning of `params` weights holds in fp32, with `moments` per weight: computed, not measured."""
    return {
        "weights_bytes": 4 * params,
        "gradients_bytes": 4 * params,
        "optimizer_bytes": 4 * params * moments,
    }


def reset(device: torch.device) -> None:
    """Reset the allocator's peaks."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def training_peak(device: torch.device, held: dict[str, int]) -> dict[str, int] | None:
    """Return the most bytes allocated at once since `reset`, by kind; None on other devices than CUDA.

    Weights, gradients and optimizer state are `held`; the rest is the difference. Gradients may have their peak at another
    moment than the total, so the rest is a lower bound for activations and temporary tensors.
    """
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    known = {kind: held[kind] for kind in KINDS}
    return {"allocated_bytes": peak, **known, REST: max(0, peak - sum(known.values()))}


def measured(device: torch.device, peak: dict[str, int] | None) -> dict[str, Any]:
    """Return the figures of the system, the allocator and the driver at this moment, for memory.json.

    Returns:
        `process`, `training_peak` (the argument `peak`), `accelerator`, `device`, and `not_seen`: a sentence for each figure
        that cannot be measured.
    """
    accelerator, not_seen = _accelerator(device)
    return {
        "process": process(device),
        "training_peak": peak,
        "accelerator": accelerator,
        "device": str(device),
        "not_seen": not_seen,
    }


def process(device: torch.device) -> dict[str, Any]:
    """Return the resident set of this process, now and at its peak, and the allocator's bytes (on CUDA peaks since `reset`)."""
    scale = 1 if sys.platform == "darwin" else 1024
    now, peak = psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    seen: dict[str, Any] = {"rss_bytes": now, "peak_rss_bytes": max(now, peak)}  # Linux updates the peak with a delay
    if device.type == "cuda":
        seen["cuda_max_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        seen["cuda_max_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    if device.type == "mps":
        seen["mps_allocated_bytes"] = torch.mps.current_allocated_memory()
        seen["mps_driver_bytes"] = torch.mps.driver_allocated_memory()
    return seen


def _accelerator(device: torch.device) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the name of a device, its bytes and which processes hold them; and what cannot be measured."""
    if device.type == "cpu":
        return None, [
            "a peak of the allocator: the CPU's has none; peak_rss_bytes is that of the whole process since its start"
        ]
    if device.type == "mps":
        return None, ["a peak of the allocator: that of MPS has none; its figures are from the end of the stage"]
    if device.type != "cuda":
        return None, [f"anything on {device.type}: only CUDA and MPS are measured"]
    seen = nvml.processes(device)
    facts = {
        **name_and_total(device),
        "nvml_process_bytes": seen.process_bytes,
        "nvml_other_processes_bytes": seen.others_bytes,
    }
    return facts, list(seen.not_seen)


def name_and_total(device: torch.device) -> dict[str, Any]:
    """Return the name and the total bytes of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return {"name": properties.name, "total_bytes": properties.total_memory}
