"""`recap merge`: write back what moved."""

from recap_cli import console
from recap_cli.commands.arguments import JsonOption, StateArgument, open_state, report_stage


def merge(folder: StateArgument = None, as_json: JsonOption = False) -> None:
    """Write what moved back into the full model; everything else in it stays as it is, bit for bit.

    The last stage of a round. Measures the small model, and keeps the best one so far.

    Example: [bold]recap merge runs/cola[/bold]
    """
    state = open_state(folder)
    from recap_cli.stages import merge as stage

    report_stage(state, stage.merge(state, track=console.track), as_json)
