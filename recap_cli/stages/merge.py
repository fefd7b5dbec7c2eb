"""`merge`: write what was trained back into the full model; keep the small model if it is the best so far (paper, sec. 3.3)."""

from dataclasses import replace
from typing import Any

from recap_cli.progress import Track, silent
from recap_cli.rounds.merging import copy_the_rest, keep_best, merge_round, write_teacher
from recap_cli.rounds.plans import teaches
from recap_cli.rounds.record import MOMENTS, SMALL, TARGETS, TEACHER_FOLDER, TRAINED, WEIGHTS
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.status import finished
from recap_cli.rounds.threads import on_fitting_threads
from recap_cli.state.store import State


@on_fitting_threads
def merge(state: State, *, track: Track = silent) -> dict[str, Any]:
    """End the round: write a new full model and its moments, eq. (5) and (6), and the best small model.

    After the round that makes the teacher, that is the full model. Its outputs for the training examples are written too.

    Returns:
        The facts of the stage: how much was trained, and which round is best.

    Raises:
        StageOrderError: another stage is next.
        ModelError: the round has made the teacher, and its outputs are not finite; nothing is committed then.
    """
    context = Context(state)
    with state.writing("merge") as transaction:
        context.check_rounds()
        folder, full = f"round-{transaction.round:03d}", f"full-{transaction.round:03d}"
        merged = merge_round(context, folder)
        transaction.save_tensors(f"{full}/{WEIGHTS}", merged.weights)
        if merged.moments is not None:
            transaction.save_tensors(f"{full}/{MOMENTS}", merged.moments)
        copy_the_rest(context, transaction, full)
        if teaches(context.round_plans[transaction.round - 1]):
            write_teacher(context, transaction, merged.weights, track)
        keep_best(context, transaction, merged.small, folder)
        transaction.set_full(full)
        for old in (context.full, *(f"{folder}/{name}" for name in (SMALL, TRAINED, MOMENTS))):
            transaction.drop(old)
        has_teacher, last = (
            f"{TEACHER_FOLDER}/{TARGETS}" in state.manifest.files,
            replace(state.manifest, best=transaction.best),
        )
        if has_teacher and finished(context.recipe, last):
            transaction.drop(TEACHER_FOLDER)
        transaction.facts |= {"trained": merged.trained, "best_round": (transaction.best or {}).get("round")}
    return state.manifest.history[-1]
