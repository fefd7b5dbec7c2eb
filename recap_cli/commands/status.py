"""`recap status`: the rounds of a state so far."""

from recap_cli import console
from recap_cli.commands.arguments import JsonOption, StateArgument, open_state


def status(folder: StateArgument = None, as_json: JsonOption = False) -> None:
    """Show the rounds of a state, their time and memory, and the next command. Loads no model.

    Example: [bold]recap status runs/cola[/bold]
    """
    state = open_state(folder)
    from recap_cli.commands.tables import print_summary
    from recap_cli.rounds.status import summary

    found = summary(state)
    if as_json:
        console.emit_json(found)
    else:
        print_summary(found, is_result=True)
        for note in (found.get("init") or {}).get("notes", ()):
            console.line(f"note: {note}")
