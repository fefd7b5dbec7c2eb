"""`recap finetune`: train the part that may move."""

from pathlib import Path
from typing import Annotated

import typer

from recap_cli import console
from recap_cli.commands.arguments import JsonOption, StateArgument, open_state, report_stage

ChangeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting of the state that says how, not what, is computed, as finetune.checkpointing=true. "
        "May be repeated.",
    ),
]
SnapshotOption = Annotated[
    Path | None,
    typer.Option(
        "--snapshot",
        metavar="FILE",
        help="Write torch's record of CUDA's allocations, for pytorch.org/memory_viz, to a new file.",
    ),
]


def finetune(
    folder: StateArgument = None, overrides: ChangeOption = None, snapshot: SnapshotOption = None, as_json: JsonOption = False
) -> None:
    """Train the part of the small model that the mask lets move.

    The third stage of a round, and the long one. A loss that is not finite stops it, and so does a device whose memory runs
    out; the state stays as it was.

    Example: [bold]recap finetune runs/cola[/bold]
    """
    state = open_state(folder)
    from recap_cli.commands.tables import say_change
    from recap_cli.stages import finetune as stage

    facts = stage.finetune(state, track=console.track, overrides=overrides or (), on_change=say_change, snapshot_to=snapshot)
    report_stage(state, facts, as_json)
