"""`finetune`: train what the mask makes trainable, on the GPU if there is one (paper, sec. 3.2, Step 4)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recap_cli.errors import lacks_device_memory
from recap_cli.machine import devices, snapshot
from recap_cli.memory import oom
from recap_cli.progress import Track, silent
from recap_cli.rounds.plans import require_extras
from recap_cli.rounds.round_results import Outcome, write_results
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.settings import OnChange, adopt, ignore, recipe_of
from recap_cli.rounds.threads import on_fitting_threads
from recap_cli.rounds.training_round import (
    held_in_training,
    read_small_model,
    score_round,
    taught_on,
    train_round,
    trainer_of,
)
from recap_cli.state.store import State


@on_fitting_threads
def finetune(
    state: State,
    *,
    track: Track = silent,
    overrides: Sequence[str] = (),
    on_change: OnChange = ignore,
    snapshot_to: Path | None = None,
) -> dict[str, Any]:
    """Train the small model of this round where its mask allows; write the trained values, their moments, and the metrics.

    Args:
        state: whose `mask` is done.
        track: hears of progress.
        overrides: execution settings of the state, each `section.key=value`, that are changed first (`settings.adopt`).
        on_change: hears of that change.
        snapshot_to: gets torch's record of CUDA's allocator, whether the training succeeds or not.

    Returns:
        The facts of the stage.

    Raises:
        StageOrderError: another stage is next.
        MissingExtraError: the method needs an extra that is not installed; nothing is changed then.
        UsageError, StorageError: there can be no snapshot; nothing is changed then.
        TrainingError: a loss is not finite; nothing is committed then.
        DeviceMemoryError: the device is too small; nothing is committed then.
    """
    state.check_order("finetune")
    recipe = recipe_of(state, overrides)
    require_extras(recipe)
    report = oom.OOMReport(devices.pick(recipe.finetune.device))
    if snapshot_to is not None:
        snapshot.check(snapshot_to, report.device)
    adopt(state, recipe, on_change=on_change)
    context = Context(state)
    try:
        return _finetune(context, report, track, snapshot_to)
    except Exception as error:
        if not lacks_device_memory(error):
            raise
        if not report.seen:
            report.measure(error)
    # The error, with the frames that hold the model and its activations, ends above: `explained` has the device to itself.
    raise oom.explained(context, state.manifest.round, report)


def _finetune(context: Context, report: oom.OOMReport, track: Track, snapshot_to: Path | None) -> dict[str, Any]:
    """The stage itself. What `report` gets is for the message if the device's memory runs out."""
    state = context.state
    with (
        state.writing("finetune") as transaction,
        snapshot.recording(snapshot_to, lambda text: transaction.facts.update(notes=[text])),  # ends before the commit
    ):
        context.check_rounds()
        examples, validation = context.training_examples(track)
        small = read_small_model(context, transaction.round, (examples, validation))
        report.model = small.model
        with trainer_of(context, transaction.round, small, report.device) as trainer, report.watching():
            report.optimizer, report.doing = trainer.optimizer, oom.TRAINING
            run = train_round(context, trainer, examples, track)
            held, peak = held_in_training(context, trainer, run)
            report.doing = oom.EVALUATING
            metrics = score_round(context, trainer, validation, track)
            write_results(transaction, context, trainer, Outcome(run, held, peak, metrics))
            transaction.facts |= taught_on(trainer, examples)
    return state.manifest.history[-1]
