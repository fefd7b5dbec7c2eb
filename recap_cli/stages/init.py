"""`init`: a pretrained model, a task head that has seen the task, and a state to begin from (paper, Step 1)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from math import ceil
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from torch import nn

from recap_cli import registry
from recap_cli.core.axes import prunable_params
from recap_cli.core.method import RoundPlan
from recap_cli.data.sampling import batches, order, seed_for
from recap_cli.data.splits import Split
from recap_cli.errors import ModelError
from recap_cli.machine import devices, threads
from recap_cli.memory import budget
from recap_cli.models import build, conformance
from recap_cli.models.build import ModelSpec
from recap_cli.progress import Track, silent
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import context as shared
from recap_cli.rounds.context import Layout
from recap_cli.rounds.plans import check_steps, round_plans_for, steps_in_round
from recap_cli.state.store import State, Transaction
from recap_cli.tasks import task
from recap_cli.trainable import token_rows as token_rows_of_data
from recap_cli.trainable.build import Trainable
from recap_cli.trainable.optim import Optimizer, adamw, learning_rate
from recap_cli.training.evaluation import chance, evaluate
from recap_cli.training.loop import Batch, train

LIBRARIES = ("torch", "transformers", "timm", "safetensors")
FULL = "full-000"
PROBED = 8  # examples whose forward shows how large the products are


def init(recipe: Recipe, path: Path, *, track: Track = silent) -> State:
    """Make the state of `recipe` at `path`: data and model are read and checked, the head is warmed up, the full model is
    written.

    With a `finetune.memory_budget` the settings that fit are found first, and the state is made with them.

    Raises `DataError`, `ModelError`, `ConformanceError`, `RecipeError` or `PluginError` for what does not fit, before anything
    is written that would stay; `BudgetError` if nothing fits the memory budget; `StateError` if there is a state already.
    """
    recipe, changes = budget.solved(recipe, track)
    round_plans = round_plans_for(recipe)  # after that: what a moving entry holds may have changed
    with State.create(path, recipes.dump(recipe), recipes.digest(recipe)) as transaction, ExitStack() as stack:
        if recipe.finetune.memory_budget is not None:
            amount = recipe.finetune.memory_budget
            transaction.facts["budget"] = {"memory_budget": amount, "changes": [asdict(change) for change in changes]}
            transaction.facts["notes"] = list(budget.told(amount, changes))
        transaction.plugins = {"used": [registry.used("methods", recipe.method)]}
        for name in (recipe.prune.criterion, recipe.mask.criterion):
            transaction.plugins["used"].append(registry.used("criteria", name))
            shared.load_criterion(name)
        devices.pick(recipe.finetune.device), devices.pick(recipe.importance.device)
        raw = shared.read_raw(recipe)
        torch.manual_seed(seed_for(recipe.seed, 0, "weights"))
        created = build.create(**shared.source_of(recipe), label_names=raw.label_names)
        model, spec = created.model, created.spec
        transaction.plugins["used"].append(registry.used("adapters", spec.model_type))
        adapter = build.adapter_of(spec)
        _check_weights(model, recipe.model.name)
        _check_tokens(round_plans, model)
        with threads.limited(threads.fitting_alone(model)):
            report = conformance.check(model, adapter, spec)
        layout = Layout.of(adapter, model)
        if devices.pick(recipe.importance.device).type != "cpu":
            shared.blocks_of(model, layout.axes, spec.model_type)
        split, validation = shared.splits_of(recipe, spec, created.processor, track, raw)
        check_steps(round_plans, recipe.rounds * steps_in_round(recipe, len(split)), recipe)
        count = _threads(recipe, model, spec, split)
        stack.enter_context(threads.limited(count))
        new = recipe.model.name is None or bool(created.new)
        warm = _warm_up(recipe, model, spec, layout, split, validation, new=new, track=track)
        _save(transaction, model, spec, created.processor, layout)
        transaction.versions = {"recap": version("recap-cli"), "python": python_version(), **{n: version(n) for n in LIBRARIES}}
        transaction.facts |= {
            "method": recipe.method,
            "round_plans": [round_plan.to_json() for round_plan in round_plans],
            "adapter": spec.model_type,
            "notes": [*transaction.facts.get("notes", ()), *raw.notes, *created.notes, *split.notes, *validation.notes],
            "layouts": report.found,
            "not_pruned": report.coverage,
            "parameters": sum(param.numel() for param in model.parameters()),
            "prunable_parameters": prunable_params(layout.axes, layout.shapes),
            "train_examples": len(split),
            "labels": spec.num_labels,
            "label_places": raw.labels.from_dataset,
            "label_words": raw.labels.words,
            "head_new": new,
            "threads": count,
            "metric": recipe.task.metric,
            "chance": chance(validation.labels, spec.num_labels),
            **warm,
        }
    return State.open(path)


def _threads(recipe: Recipe, model: nn.Module, spec: ModelSpec, split: Split) -> int | None:
    """How many threads the stages compute with on the CPU; all there are where that is None."""
    size = recipe.finetune.micro_batch_size or recipe.finetune.batch_size
    batch = split.batch(torch.arange(min(PROBED, len(split))))
    return threads.fitting(model.eval(), shared.forward_of(spec, model), batch, size)


def _warm_up(
    recipe: Recipe,
    model: nn.Module,
    spec: ModelSpec,
    layout: Layout,
    split: Split,
    validation: Split,
    *,
    new: bool,
    track: Track,
) -> dict[str, Any]:
    """Train the head on frozen features if it is `new`, or any weight of it: no backward runs through the model.

    The whole head is trained then, BERT's pooler with its classifier; a head that came with the checkpoint is left as it is.
    What a trained one is worth is measured: the validation data are a fraction of what it was trained on. Without a warm-up
    a look at all of them by the full model would be the longest part of `init`, and is left out.
    """
    settings = recipe.head
    steps = settings.warmup_epochs * ceil(len(split) / settings.batch_size)
    if steps == 0 or not new:
        return {}
    device = devices.pick(recipe.importance.device)

    def epochs() -> Iterator[Batch]:
        for epoch in range(settings.warmup_epochs):
            chosen = order(len(split), seed=recipe.seed, round=0, epoch=epoch)
            yield from batches(split, chosen, settings.batch_size, device=device)

    with shared.on_device(model.eval(), layout.axes, device, spec.model_type):
        run = train(
            shared.forward_of(spec, model),
            task.loss,
            Optimizer(_head_trainables(model, layout.head), adamw(betas=(0.9, 0.999), eps=1e-8)),
            track(epochs(), "warm up the head", steps),
            rate=lambda step: learning_rate(step, steps=steps, peak=settings.lr, schedule="linear", warmup_ratio=0.0),
            micro_batch_size=None if device.type == "cpu" else shared.importance_batch_size(recipe, device),
        )
        found = evaluate(
            shared.forward_of(spec, model),
            validation,
            shared.task_of(recipe, spec),
            batch_size=recipe.evaluate.batch_size,
            device=device,
            track=track,
            label="validation of the warmed-up head",
        )
    return {"head_steps": run.steps, "head_loss": run.loss, "warmed_up": found}


def _head_trainables(model: nn.Module, head: Sequence[str]) -> list[Trainable]:
    """Freeze all but the head; a slot for each of its parameters, which moves where it stands."""
    for name, param in model.named_parameters():
        param.requires_grad_(name in head)
    return [Trainable(name, param, param.detach()) for name, param in model.named_parameters() if name in head]


def _check_weights(model: nn.Module, name: str | None) -> None:
    """Refuse a checkpoint with weights that are not finite: every importance would be, too."""
    for weight, param in model.named_parameters():
        if not bool(param.isfinite().all()):
            raise ModelError(
                f"{name}: {weight} holds values that are not finite", hint="the checkpoint is damaged: get it again"
            )


def _check_tokens(round_plans: Sequence[RoundPlan], model: nn.Module) -> None:
    """Refuse rows of tokens that are to move by themselves where there is no table that has just these."""
    if any(round_plan.embeddings == "tokens" for round_plan in round_plans) and token_rows_of_data.everything(model) is None:
        raise ModelError(
            f"rows of tokens are to move, but {type(model).__name__} has no table of tokens that is looked up and nothing else",
            hint="--set mask.train_embeddings=true, or false",
        )


def _save(transaction: Transaction, model: nn.Module, spec: ModelSpec, processor: Any, layout: Layout) -> None:
    """The full model in its library's layout: weights, what is no part of a checkpoint, description and layout."""
    stored = set(model.state_dict())
    tensors = build.tensors_of(model)
    transaction.save_tensors(f"{FULL}/{shared.WEIGHTS}", {name: t for name, t in tensors.items() if name in stored})
    if buffers := {name: t for name, t in tensors.items() if name not in stored}:
        transaction.save_tensors(f"{FULL}/{shared.BUFFERS}", buffers)
    transaction.save_json(f"{FULL}/{shared.LAYOUT}", layout.to_json())
    for name, content in build.describe(spec, processor).items():
        transaction.path(f"{FULL}/{name}").write_bytes(content if isinstance(content, bytes) else content.encode())
    transaction.set_full(FULL)
