"""`finetune`: train what the mask lets move, on the GPU if there is one (paper, sec. 3.2, Step 4)."""

from collections.abc import Iterator, Sequence
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recap_cli.core.axes import Choice, counts, shrink
from recap_cli.core.method import Attached, Turn
from recap_cli.core.surgery import Where, compose_where, indices
from recap_cli.data.sampling import batches, order, seed_for
from recap_cli.data.splits import Split
from recap_cli.errors import TrainingError, lacks_device_memory
from recap_cli.machine import accounting, devices, snapshot
from recap_cli.memory import oom
from recap_cli.memory.oom import Ledger
from recap_cli.models import build
from recap_cli.progress import Track, silent
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds import context as shared
from recap_cli.rounds.context import Context
from recap_cli.rounds.custom_training import attach, make_own, rates_of, result_of, stepping
from recap_cli.rounds.plans import course_of, steps_in_round, steps_of
from recap_cli.rounds.settings import OnChange, adopt, recipe_of, unheard
from recap_cli.rounds.small_model import RESIDENTS, in_dtype, make_trainable, moving, rule_of
from recap_cli.rounds.threads import on_fitting_threads
from recap_cli.state.store import Draft, State
from recap_cli.tasks import task
from recap_cli.trainable import token_rows as vocabularies
from recap_cli.trainable.embedding import PartialEmbedding
from recap_cli.trainable.moments import COUNT, take_moments
from recap_cli.trainable.optim import Optimizer, learning_rate
from recap_cli.trainable.token_rows import Vocabulary
from recap_cli.training.evaluation import evaluate
from recap_cli.training.loop import LOWER_THE_RATE, Batch, Forward, Training, train


@on_fitting_threads
def finetune(
    state: State,
    *,
    track: Track = silent,
    overrides: Sequence[str] = (),
    on_change: OnChange = unheard,
    snapshot_to: Path | None = None,
) -> dict[str, Any]:
    """Train the small model of this round where its mask allows; write the values and moments that moved, and its metrics.

    `overrides` change execution settings of the state first (`settings.adopt`). `snapshot_to` gets torch's record of CUDA's
    allocator, whether the training succeeds or not.

    Raises `StageOrderError` if another stage is next, `UsageError` or `StorageError` if there can be no snapshot (nothing is
    changed then), `TrainingError` if a loss is not finite and `DeviceMemoryError` if the device is too small (nothing is
    committed then).
    """
    state.check_order("finetune")
    recipe = recipe_of(state, overrides)
    ledger = Ledger(devices.pick(recipe.finetune.device))
    if snapshot_to is not None:
        snapshot.check(snapshot_to, ledger.device)
    adopt(state, recipe, on_change=on_change)
    here = Context(state)
    try:
        return _finetune(here, ledger, track, snapshot_to)
    except Exception as error:
        if not lacks_device_memory(error):
            raise
        ledger.measure(error)
    # The error, with the frames that hold the model and its activations, ends above: `explained` has the device to itself.
    raise oom.explained(here, state.manifest.round, ledger)


def _finetune(here: Context, ledger: Ledger, track: Track, snapshot_to: Path | None) -> dict[str, Any]:
    """The stage itself. What `ledger` is told is for the message if the device's memory runs out."""
    state, device = here.state, ledger.device
    with (
        state.writing("finetune") as draft,
        snapshot.recording(snapshot_to, lambda text: draft.facts.update(notes=[text])),  # ends before the commit
    ):
        shared.check_rounds(here)
        recipe, folder = here.recipe, f"round-{draft.round:03d}"
        accounting.reset(device)
        turn, plan = here.turns[draft.round - 1], here.plan(folder)
        train_split, validation = here.splits(track)
        small = here.small(folder, plan)
        model = ledger.model = here.model(small, counts(plan))
        chosen = here.mask(folder, plan)
        vocabulary = vocabularies.of(model, train_split, validation)
        where = moving(here.layout, plan, chosen, small, vocabulary.where(turn) if vocabulary else None)
        torch.manual_seed(seed_for(recipe.seed, draft.round, "training"))
        own = attach(model, here.layout, recipe, plan, here.turns[draft.round - 1 :]) if turn.moves == "training" else None
        optimizer = ledger.optimizer = _partial(here, model, turn, plan, chosen, where, own, device, vocabulary)
        del small  # what the forward reads is in the model; the fp32 originals of bf16 weights are not needed again
        torch.manual_seed(seed_for(recipe.seed, draft.round, "finetune"))
        ledger.doing = oom.TRAINING
        run = _train(here, model, optimizer, own, train_split, draft.round, device, track)
        held: dict[str, Any] = {**accounting.held(model, optimizer, run.gradient_bytes)}
        peak = accounting.training_peak(device, held)  # before the evaluation, which may have a higher one
        ledger.doing = oom.EVALUATING
        forward = _forward(here, model.eval())
        size = recipe.evaluate.batch_size
        metrics = evaluate(forward, validation, here.task, batch_size=size, device=device, track=track, label="validation")
        _check_finite(metrics["loss"], optimizer)
        _save(draft, folder, optimizer, own, here, plan)
        if vocabulary is not None:
            draft.save_tensors(f"{folder}/{shared.ROWS}", vocabulary.to_tensors())
            draft.facts["token_rows"] = _token_rows(model, optimizer, vocabulary)
        moments = len(optimizer.rule.aging)
        held["full_finetuning"] = accounting.full_finetuning(_entry(state, "prune")["params_full"], moments)
        held |= accounting.measured(device, peak)
        draft.save_json(f"{folder}/{shared.MEMORY}", held)
        draft.save_json(f"{folder}/{shared.METRICS}", metrics)
        draft.facts |= {
            "metric": recipe.task.metric,
            **metrics,
            "evaluated_in": recipe.finetune.resident,
            "train_loss": run.loss,
            "steps": run.steps,
            "lr": recipe.finetune.lr,
            **({} if (rate := here.head_lr(turn)) == recipe.finetune.lr else {"head_lr": rate}),
            "step_seconds": run.seconds / max(1, run.steps),
            "trainable": sum(slot.leaf.numel() for slot in optimizer.slots),
            **{name: held[name] for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes", "full_finetuning")},
        }
    return state.manifest.history[-1]


def _partial(
    here: Context,
    model: nn.Module,
    turn: Turn,
    plan: Choice,
    chosen: Choice,
    where: Where,
    own: Attached | None,
    device: torch.device,
    vocabulary: Vocabulary | None = None,
) -> Optimizer:
    """Make the model partly trainable, and the optimizer of its slots, with the moments they had."""
    settings = here.recipe.finetune
    in_full = compose_where(indices(here.layout.axes, plan, here.layout.shapes), where)
    moments, steps = take_moments(here.full_moments(tuple(rule_of(settings).aging)), in_full)
    if settings.checkpointing:
        build.enable_checkpointing(model)
    if own is None:
        slots = make_trainable(model, here.layout, here.recipe, turn, plan, chosen, device, vocabulary)
        scale = {slot.name: 1.0 for slot in slots}
    else:
        slots = make_own(model, own, here.recipe, device, vocabulary)
        scale = rates_of(own, slots)
    if (rate := here.head_lr(turn)) != settings.lr:
        scale |= {name: scale[name] * rate / settings.lr for name in scale.keys() & set(here.layout.head)}
    return Optimizer(
        slots,
        rule_of(settings),
        weight_decay=settings.weight_decay,
        moments=moments,
        counts=steps,
        along=here.layout.along | (vocabulary.along() if vocabulary else {}),
        scale=scale,
    )


def _train(
    here: Context,
    model: nn.Module,
    optimizer: Optimizer,
    own: Attached | None,
    split: Split,
    number: int,
    device: torch.device,
    track: Track,
) -> Training:
    recipe, settings, turn = here.recipe, here.recipe.finetune, here.turns[number - 1]
    each = steps_of(here.turns, recipe.rounds * steps_in_round(recipe, len(split)))
    before, steps = sum(each[: number - 1]), each[number - 1]
    whole, first = course_of(turn, before, steps, sum(each))

    def rate(step: int) -> float:
        warmup = settings.warmup_ratio
        return learning_rate(first + step, steps=whole, peak=settings.lr, schedule=settings.schedule, warmup_ratio=warmup)

    return train(
        _forward(here, model.train()),
        task.loss,
        optimizer,
        track(_epochs(recipe, split, before, steps, device), f"finetune, round {number}", steps),
        rate=rate,
        micro_batch_size=settings.micro_batch_size,
        max_grad_norm=settings.max_grad_norm,
        fused_backward=settings.fused_backward,
        before_step=stepping(own, optimizer, steps),
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


def _forward(here: Context, model: nn.Module) -> Forward:
    return in_dtype(shared.forward_of(here.spec, model), RESIDENTS[here.recipe.finetune.resident])


def _check_finite(loss: float, optimizer: Optimizer) -> None:
    """Refuse what a last step has ruined, which no later loss would show."""
    bad = next((slot.name for slot in optimizer.slots if not bool(slot.master.isfinite().all())), None)
    if bad is not None or not isfinite(loss):
        what = f"{bad} is not finite" if bad is not None else f"the validation loss is {loss}"
        raise TrainingError(
            f"{what} after finetuning; the round is not committed",
            hint=LOWER_THE_RATE,
        )


def _save(draft: Draft, folder: str, optimizer: Optimizer, own: Attached | None, here: Context, plan: Choice) -> None:
    """The values and the moments of the entries that may move, compact: all that the merge needs.

    Of a method's own training, what it makes of the small model's tensors as they were, and the scores it learned.
    """
    moved = {slot.name: slot.master.cpu() for slot in optimizer.slots}
    kept = set(moved)
    if own is not None:
        before = here.small(folder, plan)  # training may have moved what is in memory
        moved, scores = result_of(own, moved, before, shrink(here.layout.axes, plan))
        kept &= set(before)
        if scores:
            draft.save_tensors(f"{folder}/{shared.SCORES}", scores)
    draft.save_tensors(f"{folder}/{shared.MOVED}", {name: tensor.contiguous() for name, tensor in moved.items()})
    counts_after = optimizer.counts()
    stored = {f"{name}/{m}": optimizer.moments[name][m].cpu() for name in kept for m in optimizer.moments[name]}
    stored |= {f"{name}/{COUNT}": counts_after[name] for name in kept if optimizer.moments[name]}
    draft.save_tensors(f"{folder}/{shared.MOMENTS}", stored)


def _token_rows(model: nn.Module, optimizer: Optimizer, vocabulary: Vocabulary) -> dict[str, int]:
    """How many rows the token table has, how many of them the device held, and how many moved."""
    moving = sum(len(slot.leaf) for slot in optimizer.slots if slot.name == vocabulary.table)
    is_partial = any(isinstance(module, PartialEmbedding) for module in model.modules())
    return {"all": vocabulary.size, "held": len(vocabulary.held) if is_partial else vocabulary.size, "moving": moving}


def _entry(state: State, stage: str) -> dict[str, Any]:
    """The newest history entry of a stage."""
    return next(entry for entry in reversed(state.manifest.history) if entry["stage"] == stage)
