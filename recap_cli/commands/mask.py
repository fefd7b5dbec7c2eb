"""`recap mask`: choose which part may move."""

from recap_cli import console
from recap_cli.commands.arguments import JsonOption, StateArgument, open_state, report_stage


def mask(folder: StateArgument = None, as_json: JsonOption = False) -> None:
    """Choose which part of the small model may move, by importance.

    The second stage of a round. Everything else stays frozen: no gradient, no optimizer state.

    Example: [bold]recap mask runs/cola[/bold]
    """
    state = open_state(folder)
    from recap_cli.stages import mask as stage

    report_stage(state, stage.mask(state, track=console.track), as_json)
