"""`recap plugins`: list the criteria and adapters that are installed, without importing any."""

from recap_cli import console
from recap_cli.commands.arguments import JsonOption


def plugins(as_json: JsonOption = False) -> None:
    """List the criteria, model adapters and methods that are installed, ours and others'.

    Nothing is imported to list it. A criterion's name goes into a recipe; an adapter's name is the model type it knows. Extras
    of recap-cli that are not installed are named on standard error.

    Example: [bold]recap plugins[/bold]
    """
    from recap_cli.extras import EXTRAS, is_installed, pip_command
    from recap_cli.registry import KINDS, SINGULAR, broken, entries

    rows = [
        {"kind": SINGULAR[kind], "name": entry.name, "distribution": entry.distribution, "version": entry.version}
        for kind in KINDS
        for entry in entries(kind)
    ]
    if as_json:
        console.emit_json(rows)
    else:
        console.records(rows, is_result=True)
    for extra, about in EXTRAS.items():
        if not is_installed(extra):
            console.say(f"the extra {extra} is not installed ({about.purpose}): {pip_command(extra)}")
    for one in broken():
        console.say(f"{one.distribution} {one.version} is left out: {one.problem}")
