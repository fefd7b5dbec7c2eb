"""`recap mask`: choose which part of the small model is trainable."""

from recap_cli import console
from recap_cli.commands.arguments import JsonOption, StateArgument, open_state, report_stage


def mask(folder: StateArgument = None, as_json: JsonOption = False) -> None:
    """Choose which part of the small model is trainable, by importance.

    The second stage of a round. The rest is frozen: it has no gradient and no optimizer state.

    Example: [bold]recap mask runs/cola[/bold]
    """
    state = open_state(folder)
    from recap_cli.stages import mask as stage

    report_stage(state, stage.mask(state, track=console.track), as_json)
