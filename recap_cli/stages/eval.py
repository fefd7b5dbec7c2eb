"""`eval`: score the full model, the small model and the best small model on the validation data."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from recap_cli.core.groups import counts, shapes_of
from recap_cli.core.surgery import gather, indices, scatter
from recap_cli.errors import UsageError
from recap_cli.manifest import quoted
from recap_cli.progress import Track, silent
from recap_cli.runtime import devices
from recap_cli.runtime.evaluation import evaluate as score
from recap_cli.stages import context as shared
from recap_cli.stages.context import Context
from recap_cli.stages.trainable import moving
from recap_cli.state import State


def evaluate(state: State, *, which: Sequence[str], track: Track = silent) -> list[dict[str, Any]]:
    """A row for each model named (`full`, `small`, `best`): its round, parameters, loss and metrics, and seconds.

    Raises `UsageError` if the state holds no such model yet, before any is scored.
    """
    here = Context(state)
    for name in which:
        _check(here, name)
    _, validation = here.splits(track)
    rows = []
    for name in which:
        device = devices.pick(here.recipe.importance.device if name == "full" else here.recipe.finetune.device)
        tensors, sizes, round = _MODELS[name](here)
        model = here.model(tensors, sizes)
        with _on_device(here, name, model, device):
            started = perf_counter()
            metrics = score(
                shared.forward_of(here.spec, model),
                validation,
                here.task,
                batch_size=here.recipe.evaluate.batch_size,
                device=device,
                track=track,
                label=f"{name} model",
            )
        params = sum(param.numel() for param in model.parameters())
        rows.append({"model": name, "round": round, "parameters": params, **metrics, "seconds": perf_counter() - started})
    return rows


def _on_device(here: Context, name: str, model: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """The full model goes to the device a block at a time, a small one as a whole."""
    return shared.on_device(model, here.layout.axes, device) if name == "full" else nullcontext(model.to(device))


def best_tensors(here: Context) -> tuple[dict[str, Tensor], dict[str, int], dict[str, Any]]:
    """The tensors and sizes of the best small model, and what is noted of it. Raises `UsageError` if there is none yet."""
    _check(here, "best")
    best = here.state.manifest.best or {}
    plan = here.plan(best["folder"])
    return here.small(best["folder"], plan, shared.WEIGHTS), counts(plan), best


def _best(here: Context) -> tuple[dict[str, Tensor], dict[str, int], int]:
    tensors, sizes, best = best_tensors(here)
    return tensors, sizes, int(best["round"])


def _full(here: Context) -> tuple[dict[str, Tensor], dict[str, int], int]:
    return here.full_tensors(), {}, int(here.full.rpartition("-")[2])


def _small(here: Context) -> tuple[dict[str, Tensor], dict[str, int], int]:
    """The small model of the newest round as far as that round is: cut, finetuned, or merged."""
    state, folder = here.state, str(here.state.manifest.small)
    plan, full = here.plan(folder), here.full_tensors()
    tensors = gather(full, indices(here.layout.axes, plan, shapes_of(full)))
    if f"{folder}/{shared.MOVED}" in state.manifest.files:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        where = moving(here.layout, plan, here.mask(folder, plan), tensors, here.rows(folder))
        scatter(tensors, here.moved(folder, plan, where), where)
    return tensors, counts(plan), state.manifest.round


def _check(here: Context, name: str) -> None:
    """Raise `UsageError` if the state has no model of this name yet."""
    manifest, path = here.state.manifest, quoted(here.state.path)
    if {"full": manifest.full, "small": manifest.small, "best": manifest.best}[name] is not None:
        return
    first = next(number for number, turn in enumerate(here.turns, 1) if turn.product)
    until = f": round {first} is the first that may give it" if name == "best" else ""
    raise UsageError(
        f"{here.state.path}: no {name} model yet{until}",
        hint=f"recap {here.state.next_stage()} {path}, or recap run --state {path}",
    )


_MODELS = {"full": _full, "small": _small, "best": _best}
