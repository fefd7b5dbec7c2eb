"""`compress`: a run of a recipe that makes a finetuned model small, its export, and the model before and after."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recap_cli.core.task import Batch
from recap_cli.data.sampling import batches
from recap_cli.errors import lacks_device_memory
from recap_cli.machine import devices
from recap_cli.models.export import check_out
from recap_cli.progress import Track, silent
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.latency import forward_seconds, measured_on
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.scoring import best_tensors
from recap_cli.rounds.settings import OnChange, ignore
from recap_cli.rounds.status import HELD, summary
from recap_cli.stages.export import export
from recap_cli.stages.run import run
from recap_cli.state.store import State

BATCHES = (1, 32)  # examples of a forward that is timed


def compress(
    recipe: Recipe,
    path: Path,
    out: Path | None = None,
    *,
    track: Track = silent,
    on_stage: Callable[[dict[str, Any]], None] = lambda _: None,
    on_change: OnChange = ignore,
) -> State:
    """Run what is left of a recipe in the state at `path`, and export the product to the new folder `out`, if one is named.

    Raises:
        StorageError: `out` is there already, before anything is computed.
        RecapError: whatever `run` and `export` raise.
    """
    if out is not None:
        check_out(out)
    state = run(recipe, path, track=track, on_stage=on_stage, on_change=on_change)
    if out is not None:
        export(state, out, track=track)
    return state


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
    try:
        return forward_seconds(context.spec, [model.to(device) for model in models], batch, device)
    except Exception as error:
        if not lacks_device_memory(error):
            raise
        return [None] * len(models)
