"""`recap prune`: make the small model of the next round."""

from recap_cli import console
from recap_cli.commands.arguments import JsonOption, StateArgument, open_state, report_stage


def prune(folder: StateArgument = None, as_json: JsonOption = False) -> None:
    """Prune whole heads and neurons of the full model by importance; what is kept is the small model.

    The first stage of a round. It prunes in several steps, each with a new importance, until prune.ratio is met.

    Example: [bold]recap prune runs/cola[/bold]
    """
    state = open_state(folder)
    from recap_cli.stages import prune as stage

    report_stage(state, stage.prune(state, track=console.track), as_json)
