"""`finetune`: train what the mask lets move, on the GPU if there is one (paper, sec. 3.2, Step 4)."""

from collections.abc import Iterator, Sequence
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recap_cli.core.axes import UnitMask, counts, shrink
from recap_cli.core.method import RoundPlan, TrainerHook
from recap_cli.core.surgery import IndexMap, compose_index_maps, indices
from recap_cli.data.sampling import batches, order, seed_for
from recap_cli.data.splits import Split
from recap_cli.errors import TrainingError, lacks_device_memory
from recap_cli.machine import accounting, devices, snapshot
from recap_cli.memory import oom
from recap_cli.memory.oom import OOMReport
from recap_cli.models import build
from recap_cli.progress import Track, silent
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import context as shared
from recap_cli.rounds.context import Context
from recap_cli.rounds.custom_training import attach, make_hook_trainable, rates_of, result_of, stepping
from recap_cli.rounds.plans import lr_window_of, require_extra, steps_in_round, steps_of
from recap_cli.rounds.settings import OnChange, adopt, ignore, recipe_of
from recap_cli.rounds.small_model import WEIGHT_DTYPES, in_dtype, make_trainable, rule_of, trainable_entries
from recap_cli.rounds.threads import on_fitting_threads
from recap_cli.state.store import State, Transaction
from recap_cli.tasks import task
from recap_cli.trainable import token_rows as token_rows_of_data
from recap_cli.trainable.embedding import PartialEmbedding
from recap_cli.trainable.moments import COUNT, take_moments
from recap_cli.trainable.optim import Optimizer, learning_rate
from recap_cli.trainable.token_rows import TokenRows
from recap_cli.training.evaluation import evaluate
from recap_cli.training.loop import LOWER_THE_RATE, Batch, Forward, Training, train


@on_fitting_threads
def finetune(
    state: State,
    *,
    track: Track = silent,
    overrides: Sequence[str] = (),
    on_change: OnChange = ignore,
    snapshot_to: Path | None = None,
) -> dict[str, Any]:
    """Train the small model of this round where its mask allows; write the values and moments that moved, and its metrics.

    `overrides` change execution settings of the state first (`settings.adopt`). `snapshot_to` gets torch's record of CUDA's
    allocator, whether the training succeeds or not.

    Raises:
        StageOrderError: another stage is next.
        MissingExtraError: the method needs an extra that is not installed. Nothing is changed then.
        UsageError, StorageError: there can be no snapshot. Nothing is changed then.
        TrainingError: a loss is not finite. Nothing is committed then.
        DeviceMemoryError: the device is too small. Nothing is committed then.
    """
    state.check_order("finetune")
    recipe = recipe_of(state, overrides)
    require_extra(recipe.method)
    report = OOMReport(devices.pick(recipe.finetune.device))
    if snapshot_to is not None:
        snapshot.check(snapshot_to, report.device)
    adopt(state, recipe, on_change=on_change)
    context = Context(state)
    try:
        return _finetune(context, report, track, snapshot_to)
    except Exception as error:
        if not lacks_device_memory(error):
            raise
        report.measure(error)
    # The error, with the frames that hold the model and its activations, ends above: `explained` has the device to itself.
    raise oom.explained(context, state.manifest.round, report)


def _finetune(context: Context, report: OOMReport, track: Track, snapshot_to: Path | None) -> dict[str, Any]:
    """The stage itself. What `report` is told is for the message if the device's memory runs out."""
    state, device = context.state, report.device
    with (
        state.writing("finetune") as transaction,
        snapshot.recording(snapshot_to, lambda text: transaction.facts.update(notes=[text])),  # ends before the commit
    ):
        shared.check_rounds(context)
        recipe, folder = context.recipe, f"round-{transaction.round:03d}"
        accounting.reset(device)
        round_plan, plan = context.round_plans[transaction.round - 1], context.plan(folder)
        train_split, validation = context.splits(track)
        small = context.small(folder, plan)
        model = report.model = context.model(small, counts(plan))
        chosen = context.mask(folder, plan)
        token_rows = token_rows_of_data.of(model, train_split, validation)
        index_map = trainable_entries(
            context.layout, plan, chosen, small, token_rows.index_map(round_plan) if token_rows else None
        )
        torch.manual_seed(seed_for(recipe.seed, transaction.round, "training"))
        hook = (
            attach(model, context.layout, recipe, plan, context.round_plans[transaction.round - 1 :])
            if round_plan.trains == "training"
            else None
        )
        optimizer = report.optimizer = _partial(context, model, round_plan, plan, chosen, index_map, hook, device, token_rows)
        del small  # what the forward reads is in the model; the fp32 originals of bf16 weights are not needed again
        torch.manual_seed(seed_for(recipe.seed, transaction.round, "finetune"))
        report.doing = oom.TRAINING
        run = _train(context, model, optimizer, hook, train_split, transaction.round, device, track)
        held: dict[str, Any] = {**accounting.held(model, optimizer, run.gradient_bytes)}
        peak = accounting.training_peak(device, held)  # before the evaluation, which may have a higher one
        report.doing = oom.EVALUATING
        forward = _forward(context, model.eval())
        size = recipe.evaluate.batch_size
        metrics = evaluate(forward, validation, context.task, batch_size=size, device=device, track=track, label="validation")
        _check_finite(metrics["loss"], optimizer)
        _save(transaction, folder, optimizer, hook, context, plan)
        if token_rows is not None:
            transaction.save_tensors(f"{folder}/{shared.ROWS}", token_rows.to_tensors())
            transaction.facts["token_rows"] = _token_rows(model, optimizer, token_rows)
        moments = len(optimizer.rule.idle_decay)
        held["full_finetuning"] = accounting.full_finetuning(_entry(state, "prune")["params_full"], moments)
        held |= accounting.measured(device, peak)
        transaction.save_json(f"{folder}/{shared.MEMORY}", held)
        transaction.save_json(f"{folder}/{shared.METRICS}", metrics)
        transaction.facts |= {
            "metric": recipe.task.metric,
            **metrics,
            "evaluated_in": recipe.finetune.weights,
            "train_loss": run.loss,
            "steps": run.steps,
            "lr": recipe.finetune.lr,
            **({} if (rate := context.head_lr(round_plan)) == recipe.finetune.lr else {"head_lr": rate}),
            "step_seconds": run.seconds / max(1, run.steps),
            "trainable": sum(trainable.grad_param.numel() for trainable in optimizer.trainables),
            **{name: held[name] for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes", "full_finetuning")},
        }
    return state.manifest.history[-1]


def _partial(
    context: Context,
    model: nn.Module,
    round_plan: RoundPlan,
    plan: UnitMask,
    chosen: UnitMask,
    index_map: IndexMap,
    hook: TrainerHook | None,
    device: torch.device,
    token_rows: TokenRows | None = None,
) -> Optimizer:
    """Make the model partly trainable, and the optimizer of its slots, with the moments they had."""
    settings = context.recipe.finetune
    in_full = compose_index_maps(indices(context.layout.axes, plan, context.layout.shapes), index_map)
    moments, steps = take_moments(context.full_moments(tuple(rule_of(settings).idle_decay)), in_full)
    if settings.checkpointing:
        build.enable_checkpointing(model)
    if hook is None:
        trainables = make_trainable(model, context.layout, context.recipe, round_plan, plan, chosen, device, token_rows)
        scale = {trainable.name: 1.0 for trainable in trainables}
    else:
        trainables = make_hook_trainable(model, hook, context.recipe, device, token_rows)
        scale = rates_of(hook, trainables)
    if (rate := context.head_lr(round_plan)) != settings.lr:
        scale |= {name: scale[name] * rate / settings.lr for name in scale.keys() & set(context.layout.head)}
    return Optimizer(
        trainables,
        rule_of(settings),
        weight_decay=settings.weight_decay,
        moments=moments,
        counts=steps,
        along=context.layout.along | (token_rows.along() if token_rows else {}),
        scale=scale,
    )


def _train(
    context: Context,
    model: nn.Module,
    optimizer: Optimizer,
    hook: TrainerHook | None,
    split: Split,
    number: int,
    device: torch.device,
    track: Track,
) -> Training:
    recipe, settings, round_plan = context.recipe, context.recipe.finetune, context.round_plans[number - 1]
    each = steps_of(context.round_plans, recipe.rounds * steps_in_round(recipe, len(split)))
    before, steps = sum(each[: number - 1]), each[number - 1]
    whole, first = lr_window_of(round_plan, before, steps, sum(each))

    def rate(step: int) -> float:
        warmup = settings.warmup_ratio
        return learning_rate(first + step, steps=whole, peak=settings.lr, schedule=settings.schedule, warmup_ratio=warmup)

    return train(
        _forward(context, model.train()),
        task.loss,
        optimizer,
        track(_epochs(recipe, split, before, steps, device), f"finetune, round {number}", steps),
        rate=rate,
        micro_batch_size=settings.micro_batch_size,
        max_grad_norm=settings.max_grad_norm,
        fused_backward=settings.fused_backward,
        before_step=stepping(hook, optimizer, steps),
    )


def _epochs(recipe: Recipe, split: Split, before: int, steps: int, device: torch.device) -> Iterator[Batch]:
    """Exactly `steps` batches, from where the `before` of earlier rounds have ended, epoch after epoch: the run sees its
    examples in an order that follows from the seed alone, however it is cut into rounds.
    """
    size = recipe.finetune.batch_size
    per_epoch = ceil(len(split) / size)
    while steps > 0:
        epoch, done = divmod(before, per_epoch)
        chosen = order(len(split), seed=recipe.seed, round=1, epoch=epoch)[done * size :][: steps * size]
        augment_seed = seed_for(recipe.seed, 1, f"augmentation of epoch {epoch}, from batch {done}")
        for batch in batches(split, chosen, size, augment_seed=augment_seed, device=device):
            yield batch
            steps, before = steps - 1, before + 1


def _forward(context: Context, model: nn.Module) -> Forward:
    return in_dtype(shared.forward_of(context.spec, model), WEIGHT_DTYPES[context.recipe.finetune.weights])


def _check_finite(loss: float, optimizer: Optimizer) -> None:
    """Refuse what a last step has ruined, which no later loss would show."""
    bad = next((trainable.name for trainable in optimizer.trainables if not bool(trainable.master.isfinite().all())), None)
    if bad is not None or not isfinite(loss):
        what = f"{bad} is not finite" if bad is not None else f"the validation loss is {loss}"
        raise TrainingError(
            f"{what} after finetuning; the round is not committed",
            hint=LOWER_THE_RATE,
        )


def _save(
    transaction: Transaction, folder: str, optimizer: Optimizer, hook: TrainerHook | None, context: Context, plan: UnitMask
) -> None:
    """The values and the moments of the entries that may move, compact: all that the merge needs.

    Of a method's own training, what it makes of the small model's tensors as they were, and the scores it learned.
    """
    trained = {trainable.name: trainable.master.cpu() for trainable in optimizer.trainables}
    kept = set(trained)
    if hook is not None:
        before = context.small(folder, plan)  # training may have moved what is in memory
        trained, scores = result_of(hook, trained, before, shrink(context.layout.axes, plan))
        kept &= set(before)
        if scores:
            transaction.save_tensors(f"{folder}/{shared.SCORES}", scores)
    transaction.save_tensors(f"{folder}/{shared.TRAINED}", {name: tensor.contiguous() for name, tensor in trained.items()})
    counts_after = optimizer.counts()
    stored = {f"{name}/{m}": optimizer.moments[name][m].cpu() for name in kept for m in optimizer.moments[name]}
    stored |= {f"{name}/{COUNT}": counts_after[name] for name in kept if optimizer.moments[name]}
    transaction.save_tensors(f"{folder}/{shared.MOMENTS}", stored)


def _token_rows(model: nn.Module, optimizer: Optimizer, token_rows: TokenRows) -> dict[str, int]:
    """How many rows the token table has, how many of them the device held, and how many moved."""
    trainable_entries = sum(
        len(trainable.grad_param) for trainable in optimizer.trainables if trainable.name == token_rows.table
    )
    is_partial = any(isinstance(module, PartialEmbedding) for module in model.modules())
    return {
        "all": token_rows.size,
        "held": len(token_rows.held) if is_partial else token_rows.size,
        "trained": trainable_entries,
    }


def _entry(state: State, stage: str) -> dict[str, Any]:
    """The newest history entry of a stage."""
    return next(entry for entry in reversed(state.manifest.history) if entry["stage"] == stage)
