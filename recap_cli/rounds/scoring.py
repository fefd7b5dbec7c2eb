"""What `eval` scores: the full, the small and the best small model, on the validation data or on other data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from recap_cli.core.axes import counts
from recap_cli.core.surgery import scatter
from recap_cli.core.task import Labels
from recap_cli.data import other_data
from recap_cli.data.split import Split
from recap_cli.data.splits import make_split
from recap_cli.errors import DataError, UsageError
from recap_cli.machine import devices
from recap_cli.progress import Track
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.device_policy import on_device
from recap_cli.rounds.examples import inputs_of, read_raw, splits_of, to_score
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.record import TRAINED, WEIGHTS
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.small_model import trainable_entries
from recap_cli.state.manifest import quoted
from recap_cli.tasks.calls import task_named
from recap_cli.training.evaluation import Pass, Predictions, evaluate
from recap_cli.training.loop import Forward


@dataclass(frozen=True)
class OtherData:
    """Data that are not the recipe's validation data: a file, folder or data set, and its split (`other_data.read_other`)."""

    data: Path | None = None
    split: str | None = None


@dataclass(frozen=True)
class PredictionFile:
    """Where predictions are written; with `force` over a file that is there."""

    path: Path
    force: bool = False


@dataclass(frozen=True)
class Scored:
    """The examples that are scored.

    Attributes:
        split: the examples.
        labelled: False where they have no labels, so that there are predictions and no metrics.
        places: the index of each in its source; empty where it was not asked for.
        files: the files of images; None where there are none, or they were not asked for.
        note: what stands in every row of a table of them.
    """

    split: Split
    labelled: bool = True
    places: Sequence[int] = ()
    files: Sequence[str] | None = None
    note: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ready:
    """A model of a state that may be called.

    Attributes:
        forward: from a batch on `device` to outputs.
        device: where it takes its batches.
        round: after which it is as it is.
        params: how many it has.
    """

    forward: Forward
    device: torch.device
    round: int
    params: int


def validation_data(context: Context, track: Track, *, placed: bool) -> Scored:
    """The recipe's validation data; where each example comes from is read if `placed`."""
    if not placed:
        return Scored(context.splits(track)[1])
    raw = read_raw(context.recipe)
    processor = context.processor()
    _, split = splits_of(context.recipe, context.spec, processor, track, raw)
    files = None if context.recipe.data.train is None else other_data.files_of(raw.validation)
    return Scored(split, places=other_data.places_of(raw.validation), files=files)


def read_others(context: Context, other: OtherData, say: Callable[[str], None], track: Track) -> Scored:
    """Other data, with the columns, the preprocessing and the labels of the recipe's own.

    Args:
        context: the state.
        other: where they are.
        say: hears what a user should know of them.
        track: hears of progress.

    Raises:
        DataError: they do not fit.
    """
    recipe, spec = context.recipe, context.spec
    found = other_data.read_other(context.objective.task, other.data, other.split, _labels(context), recipe.data.model_dump())
    for note in found.notes:
        say(f"note: {note}")
    if not found.labelled:
        say(f"note: {found.origin} has no labels: there are predictions of it, and no metrics")
    inputs = to_score(inputs_of(recipe, spec, context.processor()))
    made = make_split(found.examples, inputs, origin=found.origin, workers=recipe.data.workers, track=track)
    for note in made.notes:
        say(f"note: {note}")
    said = {"data": made.origin, "examples": len(made)}
    return Scored(made, found.labelled, found.places, None if other.data is None else found.files, said)


def labelled_others(recipe: Recipe, other: OtherData) -> other_data.Other:
    """Other data with labels, read as those of a recipe that no state has been made of.

    Raises:
        DataError: they do not fit, or have no labels.
    """
    labels, task = read_raw(recipe).labels, task_named(recipe.task.kind)
    found = other_data.read_other(task, other.data, other.split, labels, recipe.data.model_dump())
    if not found.labelled:
        raise DataError(f"{found.origin} has no labels to score with", hint="name data that have labels: --data FILE")
    return found


def _labels(context: Context) -> Labels:
    """The labels as `init` read them."""
    made = context.state.manifest.made
    return Labels(tuple(context.spec.label_names), from_dataset=made["label_places"], words=made["label_words"])


def prediction_columns(scored: Scored, seen: dict[str, Predictions]) -> dict[str, list[Any]]:
    """The predictions of all models, one after another. Without labels there is neither a label nor a loss."""
    again, count = len(seen), len(scored.split)
    names = dict.fromkeys(name for one in seen.values() for name in one.columns)
    found = {name: [value for one in seen.values() for value in one.columns[name]] for name in names}
    if not scored.labelled:
        found |= {name: [None] * (again * count) for name in ("label", "loss")}
    return {
        "model": [name for name in seen for _ in range(count)],
        "index": [*scored.places] * again,
        **({} if scored.files is None else {"file": [*scored.files] * again}),
        **found,
    }


def score_models(
    context: Context, which: Sequence[str], scored: Scored, seen: dict[str, Predictions], track: Track
) -> Iterator[dict[str, Any]]:
    """A row for each model named; what each says of every example goes to its place in `seen`."""
    for name in which:
        with ready(context, name) as model:
            started = perf_counter()
            metrics = evaluate(
                model.forward,
                scored.split,
                context.objective,
                how=Pass(
                    batch_size=context.recipe.evaluate.batch_size, device=model.device, track=track, label=f"{name} model"
                ),
                each=seen.get(name),
            )
        facts = {"model": name, "round": model.round, "parameters": model.params}
        yield {**facts, **(metrics if scored.labelled else {}), "seconds": perf_counter() - started, **scored.note}


@contextmanager
def ready(context: Context, name: str) -> Iterator[Ready]:
    """Lend the model of a name (`full`, `small`, `best`) on its device. `check_made` comes first; raises as `Context.model`."""
    device = devices.pick(context.recipe.importance.device if name == "full" else context.recipe.finetune.device)
    tensors, sizes, round = _MODELS[name](context)
    model = context.model(tensors, sizes)
    with _on_device(context, name, model, device):
        params = sum(param.numel() for param in model.parameters())
        yield Ready(forward_of(context.spec, model), device, round, params)


def _on_device(context: Context, name: str, model: nn.Module, device: torch.device) -> AbstractContextManager[Any]:
    """The full model goes to the device a block at a time, a small one as a whole."""
    if name != "full":
        return nullcontext(model.to(device))
    return on_device(model, context.layout.axes, device, context.spec.model_type)


def best_tensors(context: Context) -> tuple[dict[str, Tensor], dict[str, int], dict[str, Any]]:
    """The tensors and sizes of the best small model, and what is noted of it.

    Raises:
        UsageError: there is none yet.
    """
    check_made(context, "best")
    best = context.state.manifest.best or {}
    plan = context.plan(best["folder"])
    return context.small(best["folder"], plan, WEIGHTS), counts(plan), best


def _best(context: Context) -> tuple[dict[str, Tensor], dict[str, int], int]:
    tensors, sizes, best = best_tensors(context)
    return tensors, sizes, int(best["round"])


def _full(context: Context) -> tuple[dict[str, Tensor], dict[str, int], int]:
    return context.full_tensors(), {}, int(context.full.rpartition("-")[2])


def _small(context: Context) -> tuple[dict[str, Tensor], dict[str, int], int]:
    """The small model of the newest round as far as that round is: cut, finetuned, or merged."""
    state, folder = context.state, str(context.state.manifest.small)
    plan = context.plan(folder)
    tensors = context.gathered(folder, plan)
    if f"{folder}/{TRAINED}" in state.manifest.files:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        index_map = trainable_entries(context.layout, plan, context.mask(folder, plan), tensors, context.rows(folder))
        scatter(tensors, context.trained(folder, plan, index_map), index_map)
    return tensors, counts(plan), state.manifest.round


def check_made(context: Context, name: str) -> None:
    """Do nothing if the state has a model of this name.

    Raises:
        UsageError: it has none yet.
    """
    manifest, path = context.state.manifest, quoted(context.state.path)
    if {"full": manifest.full, "small": manifest.small, "best": manifest.best}[name] is not None:
        return
    first = next(number for number, round_plan in enumerate(context.round_plans, 1) if round_plan.product)
    until = f": round {first} is the first that may give it" if name == "best" else ""
    raise UsageError(
        f"{context.state.path}: no {name} model yet{until}",
        hint=f"recap {context.state.next_stage()} {path}, or recap run --state {path}",
    )


_MODELS = {"full": _full, "small": _small, "best": _best}
