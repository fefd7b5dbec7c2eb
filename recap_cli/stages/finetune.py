"""`finetune`: train what the mask lets move, on the GPU if there is one (paper, sec. 3.2, Step 4)."""

from collections.abc import Iterator
from math import ceil, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from recap_cli.core.groups import Choice, counts, refine, shapes_of, shrink
from recap_cli.core.moments import COUNT, take_moments
from recap_cli.core.optim import Optimizer, Rule, adamw, learning_rate, sgd
from recap_cli.core.partial import bring_forward, make_partial
from recap_cli.core.surgery import Where, compose_where, indices
from recap_cli.errors import TrainingError
from recap_cli.progress import Track, silent
from recap_cli.recipe import Finetune, Recipe
from recap_cli.runtime import devices, memory, models, tasks
from recap_cli.runtime.data import Split
from recap_cli.runtime.evaluation import evaluate
from recap_cli.runtime.order import batches, order, seed_for
from recap_cli.runtime.training import Batch, Training, train
from recap_cli.stages import context as shared
from recap_cli.stages.context import Context
from recap_cli.state import Draft, State

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def finetune(state: State, *, track: Track = silent) -> dict[str, Any]:
    """Train the small model of this round where its mask allows; write the values and moments that moved, and its metrics.

    Raises `StageOrderError` if another stage is next, `TrainingError` if a loss is not finite (nothing is committed then).
    """
    here = Context(state)
    with state.writing("finetune") as draft:
        shared.check_rounds(here)
        recipe, folder = here.recipe, f"round-{draft.round:03d}"
        device, dtype = devices.pick(recipe.finetune.device), DTYPES[recipe.finetune.resident]
        memory.reset(device)
        plan = here.plan(folder)
        small = state.load_tensors(f"{folder}/{shared.SMALL}")
        model = here.model(small, counts(plan))
        chosen = {name: c.bool() for name, c in state.load_tensors(f"{folder}/{shared.MASK}").items()}
        where = moving(here, plan, chosen, small)
        optimizer = _partial(here, model, plan, chosen, where, device, dtype)
        del small  # what the forward reads is in the model; the fp32 originals of bf16 weights are not needed again
        train_split, validation = here.splits(track)
        torch.manual_seed(seed_for(recipe.seed, draft.round, "finetune"))
        run = _train(here, model, optimizer, train_split, draft.round, device, dtype, track)
        forward = _in_dtype(here, model.eval(), dtype)
        size = recipe.evaluate.batch_size
        metrics = evaluate(forward, validation, here.task, batch_size=size, device=device, track=track, label="validation")
        _check_finite(metrics["loss"], optimizer)
        _save(draft, folder, optimizer)
        moments = len(optimizer.rule.aging)
        held = {
            **memory.held(model, optimizer, run.gradient_bytes),
            "full_finetuning": memory.full_finetuning(_entry(state, "prune")["params_full"], moments),
            "process": memory.process(device),
            "device": str(device),
        }
        draft.save_json(f"{folder}/memory.json", held)
        draft.save_json(f"{folder}/metrics.json", metrics)
        draft.facts |= {
            "metric": recipe.task.metric,
            **metrics,
            "evaluated_in": recipe.finetune.resident,
            "train_loss": run.loss,
            "steps": run.steps,
            "step_seconds": run.seconds / max(1, run.steps),
            "trainable": sum(slot.leaf.numel() for slot in optimizer.slots),
            **{name: held[name] for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes", "full_finetuning")},
        }
    return state.manifest.history[-1]


def rule_of(settings: Finetune) -> Rule:
    """The update rule that a recipe names."""
    if settings.optimizer == "sgd":
        return sgd(momentum=settings.momentum)
    return adamw(betas=settings.betas, eps=settings.eps)


def moving(here: Context, plan: Choice, chosen: Choice, small: dict[str, Tensor]) -> Where:
    """The entries of the small model's tensors that the mask lets move; parameters that are not named move whole."""
    axes = [refine(axis) for axis in shrink(here.layout.axes, plan)]
    return indices(axes, chosen, shapes_of(small))


def frozen_whole(here: Context, name: str) -> bool:
    """Whether a parameter does not move at all, being an embedding."""
    return name in here.layout.embeddings and not here.recipe.mask.train_embeddings


def steps_in_round(recipe: Recipe, examples: int) -> int:
    """N_f: the optimizer steps of a round."""
    settings = recipe.finetune
    if settings.steps is not None:
        return settings.steps
    return max(1, round((settings.epochs or 0) * ceil(examples / settings.batch_size)))


def _partial(
    here: Context, model: nn.Module, plan: Choice, chosen: Choice, where: Where, device: torch.device, dtype: torch.dtype
) -> Optimizer:
    """Make the model partly trainable, and the optimizer of its slots, with the moments they had."""
    settings = here.recipe.finetune
    in_full = compose_where(indices(here.layout.axes, plan, here.layout.shapes), where)
    moments, steps = take_moments(_stored_moments(here), in_full)
    if settings.checkpointing:
        models.enable_checkpointing(model)
    forward = bring_forward(model, [refine(axis) for axis in shrink(here.layout.axes, plan)], chosen, where)
    slots = make_partial(model, forward, frozen=lambda name: frozen_whole(here, name), device=device, dtype=dtype)
    return Optimizer(
        slots, rule_of(settings), weight_decay=settings.weight_decay, moments=moments, counts=steps, along=here.layout.along
    )


def _stored_moments(here: Context) -> dict[str, Tensor]:
    file = f"{here.full}/{shared.MOMENTS}"
    carried = here.recipe.finetune.carry_moments and file in here.state.manifest.files
    return here.state.load_tensors(file) if carried else {}


def _train(
    here: Context,
    model: nn.Module,
    optimizer: Optimizer,
    split: Split,
    round: int,
    device: torch.device,
    dtype: torch.dtype,
    track: Track,
) -> Training:
    recipe, settings = here.recipe, here.recipe.finetune
    steps = steps_in_round(recipe, len(split))
    return train(
        _in_dtype(here, model.train(), dtype),
        tasks.loss,
        optimizer,
        track(_epochs(recipe, split, round, steps, device), f"finetune, round {round}", steps),
        rate=lambda step: learning_rate(
            step, steps=steps, peak=settings.lr, schedule=settings.schedule, warmup_ratio=settings.warmup_ratio
        ),
        micro_batch_size=settings.micro_batch_size,
        max_grad_norm=settings.max_grad_norm,
        fused_backward=settings.fused_backward,
    )


def _epochs(recipe: Recipe, split: Split, round: int, steps: int, device: torch.device) -> Iterator[Batch]:
    """Exactly `steps` batches, epoch after epoch, in an order that follows from seed, round and epoch alone."""
    epoch = 0
    while steps > 0:
        chosen = order(len(split), seed=recipe.seed, round=round, epoch=epoch)[: steps * recipe.finetune.batch_size]
        augment_seed = seed_for(recipe.seed, round, f"augmentation of epoch {epoch}")
        for batch in batches(split, chosen, recipe.finetune.batch_size, augment_seed=augment_seed, device=device):
            yield batch
            steps -= 1
        epoch += 1


def _in_dtype(here: Context, model: nn.Module, dtype: torch.dtype) -> Any:
    """The forward pass with floating-point inputs in the residents' type."""
    call = shared.forward_of(here.spec, model)
    if dtype == torch.float32:
        return call
    return lambda batch: call({n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()})


def _check_finite(loss: float, optimizer: Optimizer) -> None:
    """Refuse what a last step has ruined, which no later loss would show."""
    bad = next((slot.name for slot in optimizer.slots if not bool(slot.master.isfinite().all())), None)
    if bad is not None or not isfinite(loss):
        what = f"{bad} is not finite" if bad is not None else f"the validation loss is {loss}"
        raise TrainingError(
            f"{what} after finetuning; the round is not committed",
            hint="lower the rate, in a new state: recap run RECIPE --state NEW --set finetune.lr=…",
        )


def _save(draft: Draft, folder: str, optimizer: Optimizer) -> None:
    """The values and the moments of the entries that may move, compact: all that the merge needs."""
    draft.save_tensors(f"{folder}/{shared.MOVED}", {slot.name: slot.master.cpu() for slot in optimizer.slots})
    counts_after = optimizer.counts()
    stored = {f"{name}/{m}": t.cpu() for name, moments in optimizer.moments.items() for m, t in moments.items()}
    stored |= {f"{name}/{COUNT}": count for name, count in counts_after.items() if optimizer.moments[name]}
    draft.save_tensors(f"{folder}/{shared.MOMENTS}", stored)


def _entry(state: State, stage: str) -> dict[str, Any]:
    """The newest history entry of a stage."""
    return next(entry for entry in reversed(state.manifest.history) if entry["stage"] == stage)
