"""One round of finetuning: a small model made trainable, trained where its mask allows, and scored (paper, sec. 3.2)."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from math import ceil, isfinite

import torch
from torch import nn

from recap_cli.core.axes import counts
from recap_cli.core.batch_norms import train_mode
from recap_cli.core.hidden_states import watched
from recap_cli.core.task import Batch
from recap_cli.data.sampling import batches, order, seed_for
from recap_cli.data.soft_targets import fingerprint
from recap_cli.data.split import Split
from recap_cli.errors import TrainingError
from recap_cli.machine import accounting
from recap_cli.progress import Label, Track
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.custom_training import stepping
from recap_cli.rounds.device_policy import blocks_of, importance_batch_size
from recap_cli.rounds.plans import lr_window_of, steps_in_round, steps_of, teaches
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.small_model import SmallModel, in_dtype, micro_batch_size_of, placement_of
from recap_cli.rounds.teacher import lesson_of
from recap_cli.rounds.teacher_outputs import hidden_blocks
from recap_cli.rounds.teacher_round import teaching
from recap_cli.rounds.trainer import Trainer, make_trainer
from recap_cli.tasks.losses import Lesson
from recap_cli.trainable.optim import Optimizer, learning_rate
from recap_cli.trainable.token_rows import used_token_rows
from recap_cli.training.evaluation import Pass, evaluate
from recap_cli.training.loop import Forward, Look, Steps, Training, train

NOT_COMMITTED = "the round is not committed"
LOWER_THE_RATE = (
    "lower the rate in a new state, and that of the head: "
    "recap run RECIPE --state NEW --set finetune.lr=… --set finetune.head_lr=null"
)


def read_small_model(context: Context, number: int, examples: tuple[Split, Split]) -> SmallModel:
    """The small model of a round as it was cut, with its mask, and the token rows that the `examples` use."""
    folder = f"round-{number:03d}"
    plan = context.plan(folder)
    model = context.model(context.small(folder, plan), counts(plan))
    token_rows = used_token_rows(model, *examples)
    return SmallModel(model, context.layout, context.round_plans[number - 1], plan, context.mask(folder, plan), token_rows)


def trainer_of(context: Context, number: int, small: SmallModel, device: torch.device) -> AbstractContextManager[Trainer]:
    """What trains the small model of a round on the device, or the full model that becomes the teacher."""
    if teaches(small.round_plan):
        return teaching(context, number, small, device)
    return nullcontext(make_trainer(context, number, small, device))


def train_round(context: Context, trainer: Trainer, split: Split, track: Track) -> Training:
    """Take the steps of a round on the training examples, from where the round before has ended."""
    recipe, settings, number, device = context.recipe, context.recipe.finetune, trainer.number, trainer.device
    torch.manual_seed(seed_for(recipe.seed, number, "finetune"))
    each = steps_of(context.round_plans, recipe.rounds * steps_in_round(recipe, len(split)))
    before, steps = sum(each[: number - 1]), each[number - 1]
    (whole, first), peak = _lr_window(context, number, each), context.lr(trainer.small.round_plan)

    def rate(step: int) -> float:
        warmup = settings.warmup_ratio
        return learning_rate(first + step, steps=whole, peak=peak, schedule=settings.schedule, warmup_ratio=warmup)

    label = Label(f"finetune, round {number}")

    def show(look: Look) -> None:
        label.now = f"loss {look.loss:.4f}"

    with _taught_forward(context, trainer) as (forward, lesson):
        return train(
            forward,
            context.objective.task,
            trainer.optimizer,
            track(_epochs(recipe, split, before, steps, device), label, steps),
            steps=Steps(
                rate=rate,
                micro_batch_size=_micro_batch_size(recipe, trainer),
                max_grad_norm=settings.max_grad_norm,
                fused_backward=settings.fused_backward,
                before_step=stepping(trainer.hook, trainer.optimizer, steps),
                log_every=settings.log_every,
                on_log=show,
                if_not_finite=NOT_COMMITTED,
                hint=LOWER_THE_RATE,
                lesson=lesson,
            ),
        )


@contextmanager
def _taught_forward(context: Context, trainer: Trainer) -> Iterator[tuple[Forward, Lesson | None]]:
    """Inside, the forward of a model in training, and how much it learns from a teacher, its hidden states being heard."""
    model, axes = train_mode(trainer.small.model, not trainer.teaches), trainer.small.layout.axes
    forward, lesson = _forward(context, trainer, model), None if trainer.teaches else lesson_of(context.recipe)
    if lesson is None or not lesson.hidden_weight:
        yield forward, lesson
        return
    with watched(model, hidden_blocks(context.recipe, model, axes, context.spec.model_type)) as states:
        yield states.heard(forward), replace(lesson, states=states.take)


def _lr_window(context: Context, number: int, each: Sequence[int]) -> tuple[int, int]:
    """The steps of the learning-rate schedule of a round, and its first step there; a teacher's has a schedule of its own."""
    mine = teaches(context.round_plans[number - 1])
    alike = [steps if teaches(plan) == mine else 0 for plan, steps in zip(context.round_plans, each, strict=True)]
    return lr_window_of(context.round_plans[number - 1], sum(alike[: number - 1]), each[number - 1], sum(alike))


def _micro_batch_size(recipe: Recipe, trainer: Trainer) -> int | None:
    """The examples at a time; where the full model visits a device, as many as importance has there."""
    if trainer.teaches and trainer.device.type != "cpu":
        return importance_batch_size(recipe, trainer.device)
    return micro_batch_size_of(recipe, trainer.small.round_plan, trainer.small.model)


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


def taught_on(trainer: Trainer, examples: Split) -> dict[str, str]:
    """What a round notes of its examples, if it makes a teacher: the outputs that `merge` stores must be for the same ones."""
    return {"examples": fingerprint(examples)} if trainer.teaches else {}


def held_in_training(context: Context, trainer: Trainer, run: Training) -> tuple[dict[str, int], dict[str, int] | None]:
    """Bytes held on the device by kind, and the allocator's peak; asked before the evaluation, which may have a higher one."""
    model, optimizer = trainer.small.model, trainer.optimizer
    if trainer.teaches:
        blocks = blocks_of(model, trainer.small.layout.axes, context.spec.model_type)
        held = accounting.held_by_blocks(model, blocks, optimizer)
    else:
        held = accounting.held(model, optimizer, run.gradient_bytes)
    return held, accounting.training_peak(trainer.device, held)


def score_round(context: Context, trainer: Trainer, validation: Split, track: Track) -> dict[str, float]:
    """The loss and metrics of the trained model on the validation examples.

    Raises:
        TrainingError: the loss, or a trained value, is not finite.
    """
    how = Pass(context.recipe.evaluate.batch_size, trainer.device, track, "validation")
    metrics = evaluate(_forward(context, trainer, trainer.small.model.eval()), validation, context.objective, how)
    _check_finite(metrics["loss"], trainer.optimizer)
    return metrics


def _forward(context: Context, trainer: Trainer, model: nn.Module) -> Forward:
    dtype = torch.float32 if trainer.teaches else placement_of(context.recipe.finetune).dtype
    return in_dtype(forward_of(context.spec, model), dtype)


def _check_finite(loss: float, optimizer: Optimizer) -> None:
    """Refuse what a last step has ruined, which no later loss would show."""
    bad = next((trainable.name for trainable in optimizer.trainables if not bool(trainable.master.isfinite().all())), None)
    if bad is not None or not isfinite(loss):
        what = f"{bad} is not finite" if bad is not None else f"the validation loss is {loss}"
        raise TrainingError(f"{what} after finetuning; {NOT_COMMITTED}", hint=LOWER_THE_RATE)
