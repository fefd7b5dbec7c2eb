"""`recap plugins`: list the installed criteria, adapters, methods, tasks and frozen weights, without importing any."""

from recap_cli import console
from recap_cli.commands.arguments import JsonOption


def plugins(as_json: JsonOption = False) -> None:
    """List the installed criteria, model adapters, methods, tasks and frozen weights, those of recap-cli and of other packages.

    Recipes name criteria, methods, tasks and frozen weights. An adapter's name is the model type that it is for.
    Standard error names the extras of recap-cli that are not installed.

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
        console.say(f"{one.distribution} {one.version} is ignored: {one.problem}")
