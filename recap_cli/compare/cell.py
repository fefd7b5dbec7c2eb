"""One cell of a comparison: the command that runs it, and the figures of its finished state."""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recap_cli.compare.schema import STAGES
from recap_cli.compare.store import finite
from recap_cli.core.task import Batch
from recap_cli.data.sampling import batches
from recap_cli.errors import RecapError
from recap_cli.machine import devices
from recap_cli.memory import meta_model, predict
from recap_cli.memory.teacher import teacher_bytes
from recap_cli.progress import silent
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import record, status, stored
from recap_cli.rounds.latency import forward_seconds, measured_on
from recap_cli.rounds.record import MEMORY
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.scoring import OtherData, best_tensors
from recap_cli.stages.eval import evaluate
from recap_cli.state.store import State

BATCH = 32

_batches: dict[str, Batch] = {}  # by data and model, so that all cells are timed on the same examples


def command(recipe: Path, state: Path) -> list[str]:
    """Return the command that starts or continues a recipe in another process.

    It does not import modules of the working directory, unless this process does.
    """
    safe = [] if {"", os.getcwd()} & set(sys.path) else ["-P"]
    return [sys.executable, *safe, "-m", "recap_cli", "run", str(recipe), "--state", str(state)]


def is_finished(recipe: Recipe, path: Path) -> bool:
    """Whether the state at `path` has exactly this recipe, and no stage left to do."""
    try:
        state = State.open(path)
        record.check(state)
    except RecapError:  # new or damaged: the command that runs it gives the error
        return False
    return state.manifest.recipe_digest == recipes.digest(recipe) and status.next_stage(recipe, state) is None


def figures(path: Path) -> dict[str, Any]:
    """Return the figures of a finished state: metrics, steps, seconds, and the memory of the round that holds most.

    Raises:
        StateError: As in `State.open`.
    """
    state = State.open(path)
    facts, best = status.summary(state), state.manifest.best
    rows = [row for row in facts["rounds"] if "value" in row]
    product = next((row for row in rows if best and row["round"] == best["round"]), None)
    return {
        "status": "done",
        "error": None,
        "value": _number(best["value"]) if best else None,
        "warm_up": _number(facts["warm_up"]),
        "chance": _number(facts["chance"]),
        "warning": facts["warning"],
        "last": _number(rows[-1]["value"]) if rows else None,
        "product_round": best["round"] if best else None,
        "per_round": [_number(row["value"]) for row in rows if not row["teaches"]],
        "steps": sum(row["steps"] for row in rows),
        "seconds": _seconds(facts),
        "memory": _memory(state, rows) if rows else None,
        "parameters": {
            "full": product["full_parameters"],
            "product": product["small_parameters"],
            "trainable": max(row["trainable_entries"] for row in rows if not row["teaches"]),
        }
        if product
        else None,
    }


def predicted(path: Path) -> dict[str, int]:
    """Return the predicted activations and peak of a training step, for the round that holds most."""
    context = Context(State.open(path))
    model, recipe = meta_model.of_state(context), context.recipe
    usage = predict.predict(model, recipe, recipe.method).usage
    teacher = teacher_bytes(model, recipe) if recipe.distill.is_own else 0
    return {"activations_bytes": usage.maxima["activations"], "peak_bytes": max(usage.peak_bytes, teacher)}


def measured_product(path: Path) -> dict[str, Any]:
    """Return the bytes of the product's tensors, and the median seconds of a forward of up to 32 validation examples.

    The forward runs on the recipe's `finetune.device`, on one thread where that is a CPU.

    Raises:
        RecapError: The state, the data or the model cannot be read.
    """
    context = Context(State.open(path))
    tensors, sizes, _ = best_tensors(context)
    device = devices.pick(context.recipe.finetune.device)
    count_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    model = context.model(tensors, sizes).to(device)
    batch = _batch(context, device)
    (seconds,) = forward_seconds(context.spec, [model], batch, device)
    return {
        "bytes": count_bytes,
        "latency_seconds": seconds,
        "latency_batch": len(batch["labels"]),
        "latency_on": measured_on(device),
    }


def tested(path: Path, other: OtherData) -> dict[str, Any]:
    """Return the metric of the product on other data, and of how many examples.

    Raises:
        RecapError: The state, the data or the model cannot be read, or there is no product.
    """
    state = State.open(path)
    (row,) = evaluate(state, which=["best"], other=other)
    return {"value": _number(row[Context(state).recipe.metric.name]), "examples": row["examples"]}


def _batch(context: Context, device: torch.device) -> dict[str, Tensor]:
    recipe = context.recipe
    key = json.dumps([recipe.data.model_dump(mode="json"), recipe.model.model_dump(mode="json"), str(device)], sort_keys=True)
    if key not in _batches:
        _, validation = context.splits(silent)
        size = min(BATCH, len(validation))
        _batches[key] = next(batches(validation, torch.arange(size), size, device=device))
    return _batches[key]


def _seconds(facts: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of each kind of stage, over all rounds."""
    total = dict.fromkeys(STAGES, 0.0)
    total["init"] = facts["init"]["seconds"] if facts["init"] else 0.0
    for row in facts["rounds"]:
        for name, seconds in row["seconds"].items():
            total[name] = total.get(name, 0.0) + seconds
    return {name: round(seconds, 3) for name, seconds in total.items()}


def _memory(state: State, rows: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    most = max(rows, key=lambda row: sum(row[name] for name in status.HELD))  # one round
    held: dict[str, float | None] = {name: most[name] for name in status.HELD}
    files = [name for name in state.manifest.files if name.startswith("round-") and name.endswith(f"/{MEMORY}")]
    peaks = [(stored.memory(state, name)["training_peak"] or {}).get("allocated_bytes") for name in files]
    known = [peak for peak in peaks if peak is not None]
    full = sum(most[f"full_{name}"] for name in status.HELD)
    return {
        **held,
        "activations_bytes": None,
        "peak_bytes": None,
        "device_peak_bytes": max(known) if known else None,
        "full_held_bytes": full,
        "held_share": sum(most[name] for name in status.HELD) / full,
    }


def _number(value: Any) -> float | None:
    number: float | None = finite(value)
    return number
