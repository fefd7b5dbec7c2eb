"""`recap finetune`: train the trainable part of the small model."""

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
        help="Change an execution setting of the state, as in finetune.checkpointing=true. May be repeated.",
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
    """Train the part of the small model that the mask leaves trainable.

    The third stage of a round, and the longest.
    It stops if a loss is not finite or memory runs out; the state stays as it was.

    Example: [bold]recap finetune runs/cola[/bold]
    """
    state = open_state(folder)
    from recap_cli.commands.tables import say_change
    from recap_cli.stages import finetune as stage

    facts = stage.finetune(state, track=console.track, overrides=overrides or (), on_change=say_change, snapshot_to=snapshot)
    report_stage(state, facts, as_json)
