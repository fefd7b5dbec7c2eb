"""`prune`: cut the full model to the small model of this round, by importance on D_s (paper, sec. 3.1) or as its round says."""

from typing import Any

from recap_cli.models.build import tensors_of
from recap_cli.progress import Track, silent
from recap_cli.rounds.compensation import write_change
from recap_cli.rounds.pruning import changed, prune_model, pruning_facts
from recap_cli.rounds.record import IMPORTANCE, PLAN, SMALL
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.stored import as_bytes
from recap_cli.rounds.threads import on_fitting_threads
from recap_cli.state.store import State


@on_fitting_threads
def prune(state: State, *, track: Track = silent) -> dict[str, Any]:
    """Begin a round: write the plan and the small model, with what it absorbs of the cut (`prune.compensate`).

    Returns:
        The facts of the stage: what was kept.

    Raises:
        StageOrderError: another stage is next, or no round is left.
        SelectionError: the ratio cannot be met, or the inputs of a matrix that is compensated are not finite.
    """
    context = Context(state)
    with state.writing("prune") as transaction:
        context.check_rounds()
        number, folder, tensors = transaction.round, f"round-{transaction.round:03d}", context.full_tensors()
        model = context.model(tensors)
        pruned = prune_model(context, model, number, track)
        if pruned.importance is not None:
            transaction.save_tensors(f"{folder}/{IMPORTANCE}", pruned.importance)
        transaction.save_tensors(f"{folder}/{PLAN}", as_bytes(pruned.plan))
        write_change(context, transaction, pruned.absorbed)
        transaction.save_tensors(f"{folder}/{SMALL}", tensors_of(model) | changed(context, tensors, pruned))
        transaction.set_small(folder)
        transaction.facts |= pruning_facts(context, number, tensors, model, pruned.plan)
    return state.manifest.history[-1]
