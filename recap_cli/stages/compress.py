"""What a finished `compress` has come to: the model before and after, on the validation data and on this machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recap_cli.core.task import Batch
from recap_cli.data.sampling import batches
from recap_cli.errors import UsageError, lacks_device_memory
from recap_cli.machine import devices
from recap_cli.models.export import check_out
from recap_cli.progress import Track, silent
from recap_cli.rounds.latency import forward_seconds, measured_on
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.scoring import best_tensors
from recap_cli.rounds.status import HELD, summary
from recap_cli.state.store import State

BATCHES = (1, 32)  # examples of a forward that is timed


def check_place(out: Path, state: Path) -> None:
    """Do nothing if an export of a state can be written to a new folder `out`, before anything is computed.

    Raises:
        UsageError: it is the folder of the state, or lies in it.
        StorageError: it is there already, or cannot be made.
    """
    if state.resolve() in (out.resolve(), *out.resolve().parents):
        raise UsageError(f"{out} is in the state's folder {state}", hint="name another folder: --out DIR")
    check_out(out)


def before_and_after(state: State, *, track: Track = silent) -> dict[str, Any]:
    """The metric, parameters, bytes and latency of the model that a state began with and of its best small model, and what
    training held.

    The metric `before` is that of the teacher, which is the model itself. Latencies are in seconds, by batch size, None where
    the device has no room for the model.

    Raises:
        UsageError: there is no best model yet.
    """
    context = Context(state)
    told, device = summary(state), devices.pick(context.recipe.finetune.device)
    small, sizes, best = best_tensors(context)
    models = [context.model(context.full_tensors()), context.model(small, sizes)]
    _, validation = context.splits(track)
    timed = [next(batches(validation, torch.arange(min(size, len(validation))), size, device=device)) for size in BATCHES]
    latencies = [_latencies(context, models, batch, device) for batch in timed]
    rows = [row for row in told["rounds"] if "value" in row]
    most = max(rows, key=lambda row: sum(row[name] for name in HELD))
    return {
        "metric": best["metric"],
        **{
            name: {"value": value, **_size(model), "latency_seconds": [of_batch[place] for of_batch in latencies]}
            for place, (name, value, model) in enumerate(
                zip(("before", "after"), (told["teacher"], best["value"]), models, strict=True)
            )
        },
        "latency_batches": [len(batch["labels"]) for batch in timed],
        "latency_on": measured_on(device),
        "held_bytes": sum(most[name] for name in HELD),
        "full_held_bytes": sum(most[f"full_{name}"] for name in HELD),
        "steps": sum(row["steps"] for row in rows),
        "seconds": told["seconds"],
        "product": told["product"],
    }


def _size(model: nn.Module) -> dict[str, int]:
    params = list(model.parameters())
    return {
        "parameters": sum(param.numel() for param in params),
        "bytes": sum(param.numel() * param.element_size() for param in params),
    }


def _latencies(context: Context, models: Sequence[nn.Module], batch: Batch, device: torch.device) -> Sequence[float | None]:
    """The seconds of a forward of each model, measured in turns; one by one where the device has no room for all."""
    try:
        return forward_seconds(context.spec, [model.to(device) for model in models], batch, device)
    except Exception as error:
        if not lacks_device_memory(error):
            raise
    for model in models:
        model.cpu()
    return (
        [None] if len(models) == 1 else [seconds for model in models for seconds in _latencies(context, [model], batch, device)]
    )
