"""`eval`: score the full model, the small model and the best small model on the validation data, or on other data."""

from collections.abc import Callable, Sequence
from typing import Any

from recap_cli.data import prediction_files
from recap_cli.errors import DataError
from recap_cli.progress import Track, silent
from recap_cli.rounds.plans import require_extra_of_task
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.scoring import (
    OtherData,
    PredictionFile,
    check_made,
    prediction_columns,
    read_others,
    score_models,
    validation_data,
)
from recap_cli.rounds.threads import on_fitting_threads
from recap_cli.state.store import State
from recap_cli.training.evaluation import Predictions


@on_fitting_threads
def evaluate(
    state: State,
    *,
    which: Sequence[str],
    other: OtherData | None = None,
    predictions: PredictionFile | None = None,
    say: Callable[[str], None] = lambda _: None,
    track: Track = silent,
) -> list[dict[str, Any]]:
    """A row for each model named (`full`, `small`, `best`): its round, parameters, loss and metrics, and seconds.

    Args:
        state: whose models are scored.
        which: their names.
        other: what they are scored on; None for the validation data. They may lack labels where predictions are written: there
            are no metrics then.
        predictions: gets a row for each model and example.
        say: hears what a user should know.
        track: hears of progress.

    Raises:
        MissingExtraError: the task's metrics need an extra that is not installed.
        UsageError: the state holds no such model yet. This, as the following, is raised before any model is loaded.
        StorageError: the predictions cannot be written; `UsageError` where their file is there.
        DataError: the data do not fit.
    """
    context = Context(state)
    require_extra_of_task(context.recipe)
    for name in which:
        check_made(context, name)
    if predictions is not None:
        prediction_files.check(predictions.path, force=predictions.force)
    if other is None:
        scored = validation_data(context, track, placed=predictions is not None)
    else:
        scored = read_others(context, other, say, track)
    if not scored.labelled and predictions is None:
        raise DataError(
            f"{scored.split.origin} has no labels to score with", hint="--predictions FILE writes what the models predict"
        )
    seen = {name: Predictions() for name in which} if predictions is not None else {}
    rows = list(score_models(context, which, scored, seen, track))
    if predictions is not None:
        prediction_files.write(predictions.path, prediction_columns(scored, seen))
    return rows
