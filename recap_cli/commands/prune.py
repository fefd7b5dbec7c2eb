"""`recap prune`: cut the small model of the next round."""

from recap_cli import console
from recap_cli.commands.arguments import JsonOption, StateArgument, open_state, report_stage


def prune(folder: StateArgument = None, as_json: JsonOption = False) -> None:
    """Cut a small model out of the full one: whole heads and whole neurons, by importance.

    The first stage of a round. Several steps, each judging anew what is left, until the recipe's prune.ratio is met.

    Example: [bold]recap prune runs/cola[/bold]
    """
    state = open_state(folder)
    from recap_cli.stages import prune as stage

    report_stage(state, stage.prune(state, track=console.track), as_json)
