"""What a finetuning leaves in the state: the trained values, their moments, the metrics, and what was held."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from recap_cli.machine import accounting
from recap_cli.rounds.custom_training import result_of
from recap_cli.rounds.record import LOOKS, MEMORY, METRICS, MOMENTS, ROWS, SCORES, TRAINED
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.trainer import Trainer
from recap_cli.state.store import Transaction
from recap_cli.trainable.embedding import PartialEmbedding
from recap_cli.trainable.moments import COUNT
from recap_cli.trainable.token_rows import TokenRows
from recap_cli.training.loop import Training


@dataclass(frozen=True)
class Outcome:
    """What a round of training came to.

    Attributes:
        run: the steps that were taken.
        held: bytes on the device while they were, by kind.
        peak: the allocator's peak, by kind; None where there is none.
        metrics: loss and metrics on the validation examples.
    """

    run: Training
    held: dict[str, int]
    peak: dict[str, int] | None
    metrics: dict[str, float]


def write_results(transaction: Transaction, context: Context, trainer: Trainer, outcome: Outcome) -> None:
    """Write the files of a finetuned round, and note its facts."""
    recipe, folder, optimizer, run = context.recipe, f"round-{trainer.number:03d}", trainer.optimizer, outcome.run
    token_rows = trainer.small.token_rows
    _write_tensors(transaction, context, trainer)
    if token_rows is not None:
        transaction.save_tensors(f"{folder}/{ROWS}", token_rows.to_tensors())
        transaction.facts["token_rows"] = _token_row_counts(trainer, token_rows)
    pruned = next(entry for entry in reversed(context.state.manifest.history) if entry["stage"] == "prune")
    held: dict[str, Any] = {**outcome.held}
    held["full_finetuning"] = accounting.full_finetuning(pruned["params_full"], len(optimizer.rule.idle_decay))
    held |= accounting.measured(trainer.device, outcome.peak)
    transaction.save_json(f"{folder}/{MEMORY}", held)
    transaction.save_json(f"{folder}/{METRICS}", outcome.metrics)
    transaction.save_text(f"{folder}/{LOOKS}", "".join(f"{json.dumps(asdict(look))}\n" for look in run.looks))
    lr, head_lr = context.lr(trainer.small.round_plan), context.head_lr(trainer.small.round_plan)
    transaction.facts |= {
        "metric": recipe.task.metric,
        **outcome.metrics,
        "evaluated_in": "fp32" if trainer.teaches else recipe.finetune.weights,
        "train_loss": run.loss,
        "steps": run.steps,
        "lr": lr,
        **({} if head_lr == lr else {"head_lr": head_lr}),
        "step_seconds": run.seconds / max(1, run.steps),
        "trainable": sum(trainable.grad_param.numel() for trainable in optimizer.trainables),
        **{name: held[name] for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes", "full_finetuning")},
    }


def _write_tensors(transaction: Transaction, context: Context, trainer: Trainer) -> None:
    """The values and the moments of the trainable entries, compact: all that the merge needs.

    Of a method's own training, what it makes of the small model's tensors as they were, and the scores it learned.
    """
    optimizer, folder = trainer.optimizer, f"round-{trainer.number:03d}"
    trained = {trainable.name: trainable.master.cpu() for trainable in optimizer.trainables}
    kept = set(trained)
    if trainer.hook is not None:
        before = context.small(folder, trainer.small.plan)  # training may have changed what is in memory
        trained, scores = result_of(trainer.hook, trained, before, trainer.small.axes)
        kept &= set(before)
        if scores:
            transaction.save_tensors(f"{folder}/{SCORES}", scores)
    transaction.save_tensors(f"{folder}/{TRAINED}", {name: tensor.contiguous() for name, tensor in trained.items()})
    counts = optimizer.counts()
    stored = {f"{name}/{m}": optimizer.moments[name][m].cpu() for name in kept for m in optimizer.moments[name]}
    stored |= {f"{name}/{COUNT}": counts[name] for name in kept if optimizer.moments[name]}
    transaction.save_tensors(f"{folder}/{MOMENTS}", stored)


def _token_row_counts(trainer: Trainer, token_rows: TokenRows) -> dict[str, int]:
    """How many rows the token table has, how many of them the device held, and how many were trained."""
    trained = sum(len(trainable.grad_param) for trainable in trainer.optimizer.trainables if trainable.name == token_rows.table)
    is_partial = any(isinstance(module, PartialEmbedding) for module in trainer.small.model.modules())
    return {
        "all": token_rows.size,
        "held": len(token_rows.held) if is_partial else token_rows.size,
        "trained": trained,
    }
