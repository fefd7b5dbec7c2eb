"""`export`: the best small model as a folder that three lines of Python load."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from recap_cli.errors import StateError
from recap_cli.models import export as product
from recap_cli.progress import Track, silent
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.scoring import best_tensors
from recap_cli.state.store import State


def export(state: State, out: Path, *, dense: bool = False, track: Track = silent) -> dict[str, Any]:
    """Write the best small model to the new folder `out`, or with `dense` a zero-filled checkpoint of the original shapes.

    What was written is loaded again, and its logits are compared, before this returns the facts of it. What a stopped writer
    has left in the state goes first.

    Raises:
        UsageError: there is no best model yet.
        StorageError: `out` is there already, or cannot be written.
    """
    product.check_out(out)
    with suppress(StateError):  # another process is writing, and tidies up itself; what is read here is checked by itself
        state.tidy()
    context = Context(state)
    tensors, _, best = best_tensors(context)
    small = product.Product(
        context.spec, context.processor(), context.adapter, tensors, context.layout.axes, context.plan(best["folder"])
    )
    return product.export(small, out, dense=dense, facts={key: best[key] for key in ("round", "metric", "value")})
