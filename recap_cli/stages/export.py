"""`export`: the best small model, or the full one, as a folder that three lines of Python load."""

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from recap_cli.errors import StateError, UsageError
from recap_cli.models import export as product
from recap_cli.progress import Track, silent
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.scoring import best_tensors
from recap_cli.state.manifest import quoted
from recap_cli.state.store import State

Which = Literal["best", "full"]


def export(state: State, out: Path, *, which: Which = "best", dense: bool = False, track: Track = silent) -> dict[str, Any]:
    """Write the best small model to the new folder `out`, or with `dense` a zero-filled checkpoint of the original shapes.

    `which="full"` writes the full model as it is after the rounds that are merged: of the size that it had, and trained where
    they trained it. What was written is loaded again, and its logits are compared, before this returns the facts of it. What a
    stopped writer has left in the state goes first.

    Raises:
        UsageError: there is no best model yet; or, of the full one, no round is merged yet.
        StorageError: `out` is there already, or cannot be written.
    """
    product.check_out(out)
    with suppress(StateError):  # another process is writing, and tidies up itself; what is read here is checked by itself
        state.tidy()
    context = Context(state)
    if which == "full":
        if (merged := int(context.full.rpartition("-")[2])) == 0:
            raise UsageError(
                f"{state.path}: no round is merged, so that the full model is as it began",
                hint=f"recap run --state {quoted(state.path)}",
            )
        tensors, plan, facts = context.full_tensors(), {}, {"round": merged, "model": "full"}
    else:
        tensors, _, best = best_tensors(context)
        plan, facts = context.plan(best["folder"]), {key: best[key] for key in ("round", "metric", "value")}
    made = product.Product(context.spec, context.processor(), context.adapter, tensors, context.layout.axes, plan)
    return product.export(made, out, dense=dense, facts=facts)
