"""Measured memory of a few real training steps: the same step as `profile` predicts, on random weights, on this machine.

On CUDA the allocator's peak is the measure. Anywhere else it is the tracker's count over the real tensors, which sees what
torch makes for tensors and nothing else.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from recap_cli.errors import DeviceMemoryError, StorageError
from recap_cli.machine import accounting, devices, snapshot
from recap_cli.memory.fake_step import Step, take_step, usage
from recap_cli.memory.meta_model import MetaModel
from recap_cli.memory.predict import predict, prepare
from recap_cli.memory.tracker import KINDS, Usage
from recap_cli.progress import Track, silent
from recap_cli.recipe.recipe import Recipe

KERNELS = "what CUDA's kernels take: this device has others, and is compared with a prediction for its own"
STEPS = 3  # the allocator's peak is that of the second and third; the first makes what is made once


def check(recipe: Recipe, snapshot_to: Path | None = None) -> None:
    """Raise `RecipeError` if the recipe's `finetune.device` is not there, `UsageError` if no snapshot can be made of it."""
    device = devices.pick(recipe.finetune.device)
    if snapshot_to is not None:
        snapshot.check(snapshot_to, device)


def measure(
    model: MetaModel, recipe: Recipe, methods: Sequence[str], track: Track = silent, snapshot_to: Path | None = None
) -> list[dict[str, Any]]:
    """Predicted beside measured bytes of each method's training step, by kind, on the recipe's `finetune.device`.

    `snapshot_to` gets torch's record of CUDA's allocator over all of them.

    Raises:
        RecipeError: the device is not there.
        StorageError: the tensors would not fit into this machine's memory.
        DeviceMemoryError: the step would not fit into that of the GPU.
    """
    device = devices.pick(recipe.finetune.device)
    failed: list[str] = []
    with snapshot.recording(snapshot_to, failed.append):
        rows = [_measured(model, recipe, method, device) for method in track(methods, "measure", len(methods))]
    for row in rows:
        row["not_seen"] += failed
    return rows


def _measured(model: MetaModel, recipe: Recipe, method: str, device: torch.device) -> dict[str, Any]:
    predicted = predict(model, recipe, method, kernels="cuda" if device.type == "cuda" else "cpu")
    _check_room(predicted.usage, method, device)
    torch.manual_seed(recipe.seed)
    step, _ = prepare(model, recipe, method, random_tensors, device=device, round_plans=predicted.round_plans)
    show_all_classes(step, model.spec.num_labels)
    seen = _allocated(step, device) if device.type == "cuda" else {}
    counted = usage(step)
    measured = seen.get("max_allocated_bytes", counted.peak_bytes)
    facts = accounting.measured(device, None)
    facts["not_seen"] += [] if device.type == "cuda" else [KERNELS]
    return {
        "method": method,
        "batch_size": recipe.finetune.batch_size,
        "predicted_bytes": predicted.usage.peak_bytes,
        "measured_bytes": measured,
        "error_share": predicted.usage.peak_bytes / measured - 1,
        **seen,
        **{f"{kind}_bytes": counted.maxima[kind] for kind in KINDS},
        "at_peak": {f"{kind}_bytes": counted.at_peak[kind] for kind in KINDS},
        "counted_bytes": counted.peak_bytes,
        **facts,
    }


def _allocated(step: Step, device: torch.device) -> dict[str, int]:
    take_step(step)
    accounting.reset(device)
    for _ in range(STEPS - 1):
        take_step(step)
    torch.cuda.synchronize(device)
    return {
        "max_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "max_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def random_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Real tensors on the CPU of the shapes of these: small random numbers, zeros where they are whole numbers.

    Of a mask of tokens the last is masked and the others are not, so that there is padding and something beside it. Variances
    are 1, and so are the weights of norms.
    """
    made = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items()}
    for name, tensor in made.items():
        if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
            tensor.fill_(1)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.02)
        elif name == "attention_mask":
            tensor[:, :-1] = 1
    return made


def show_all_classes(step: Step, classes: int) -> None:
    """Let the label maps of a step, if it has such, show every class, as a prediction takes them."""
    if step.task.target.maps:
        labels = step.batch["labels"]  # (batch, height, width)
        labels.copy_((torch.arange(labels.numel(), device=labels.device) % classes).view_as(labels))


def _check_room(predicted: Usage, method: str, device: torch.device) -> None:
    """Refuse what would not fit, before anything is made. The weights are made in main memory, whatever the device."""
    needed = predicted.maxima["weights"] if device.type == "cuda" else predicted.peak_bytes
    hint = "leave out --measure: the prediction needs none of it"
    if needed > (free := psutil.virtual_memory().available):
        raise StorageError(
            f"a real step of {method} holds about {_mb(needed)}, and this machine has {_mb(free)} free", hint=hint
        )
    if device.type == "cuda" and predicted.peak_bytes > (free := torch.cuda.mem_get_info(device)[0]):
        raise DeviceMemoryError(
            f"a real step of {method} holds about {_mb(predicted.peak_bytes)}, and {device} has {_mb(free)} free", hint=hint
        )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
