"""`recap finetune`: train the part that may move."""

from recap_cli import console
from recap_cli.commands.arguments import JsonOption, StateArgument, open_state, report_stage


def finetune(folder: StateArgument = None, as_json: JsonOption = False) -> None:
    """Train the part of the small model that the mask lets move.

    The third stage of a round, and the long one. A loss that is not finite stops it, and the state stays as it was.

    Example: [bold]recap finetune runs/cola[/bold]
    """
    state = open_state(folder)
    from recap_cli.stages import finetune as stage

    report_stage(state, stage.finetune(state, track=console.track), as_json)
