"""`recap export`: write the best small model so that plain Python loads it."""

from pathlib import Path
from typing import Annotated

import typer

from recap_cli import console
from recap_cli.commands.arguments import JsonOption, open_state

STATE = typer.Argument(metavar="DIR", help="The state's folder.", show_default=False)
OUT = typer.Argument(metavar="OUT", help="The new folder for the model.", show_default=False)
DENSE = typer.Option("--dense", help="Write the original shapes, filled with zeros: the same logits in a plain checkpoint.")


def export(
    folder: Annotated[Path, STATE],
    out: Annotated[Path, OUT],
    dense: Annotated[bool, DENSE] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the best small model of a state, with its tokenizer or image processor, and say how to load it.

    The export is loaded again and its logits are compared with the original's before the command ends.

    Example: [bold]recap export runs/cola cola-small[/bold]
    """
    state = open_state(folder)
    from recap_cli.stages import export as stage

    facts = stage.export(state, out, dense=dense, track=console.track)
    if as_json:
        console.emit_json(facts)
        return
    console.facts({key: value for key, value in facts.items() if key not in ("path", "load")})
    console.say("Load it with:")
    for line in facts["load"]:
        console.say(f"    {line}")
    console.result(str(facts["path"]))
