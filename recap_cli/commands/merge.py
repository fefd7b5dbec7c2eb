"""`recap merge`: write the trained weights into the full model."""

from recap_cli import console
from recap_cli.commands.arguments import JsonOption, StateArgument, open_state, report_stage


def merge(folder: StateArgument = None, as_json: JsonOption = False) -> None:
    """Write the trained weights into the full model; all other weights stay the same, bit for bit.

    The last stage of a round. Keeps the small model if it is the best so far.

    Example: [bold]recap merge runs/cola[/bold]
    """
    state = open_state(folder)
    from recap_cli.stages import merge as stage

    report_stage(state, stage.merge(state, track=console.track), as_json)
