"""`mask`: choose which fine groups of the small model are trainable (paper, sec. 3.2.1)."""

from typing import Any

from recap_cli.progress import Track, silent
from recap_cli.rounds.masking import choose_mask, mask_facts
from recap_cli.rounds.record import MASK
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.stored import as_bytes
from recap_cli.rounds.threads import on_fitting_threads
from recap_cli.state.store import State


@on_fitting_threads
def mask(state: State, *, track: Track = silent) -> dict[str, Any]:
    """Write the update mask of this round.

    Returns:
        The facts of the stage: how much is trainable.

    Raises:
        StageOrderError: another stage is next.
    """
    context = Context(state)
    with state.writing("mask") as transaction:
        context.check_rounds()
        number, folder = transaction.round, f"round-{transaction.round:03d}"
        plan = context.plan(folder)
        chosen = choose_mask(context, number, plan, track)
        transaction.save_tensors(f"{folder}/{MASK}", as_bytes(chosen))
        transaction.facts |= mask_facts(context, number, plan, chosen)
    return state.manifest.history[-1]
