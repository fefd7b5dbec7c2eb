"""`recap recipes`: list, show and copy the shipped recipes, and the JSON Schema of all recipes."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from recap_cli import console
from recap_cli.commands.arguments import JsonOption, complete_recipe
from recap_cli.errors import UsageError

app = typer.Typer(no_args_is_help=True, help="List, show and copy the shipped recipes.", rich_markup_mode="rich")

NameArgument = Annotated[
    str,
    typer.Argument(metavar="NAME", help="The name of a shipped recipe.", autocompletion=complete_recipe, show_default=False),
]
ToArgument = Annotated[Path | None, typer.Argument(metavar="TO", help="A file or a folder.", show_default="NAME.yaml")]
FilledOption = Annotated[bool, typer.Option("--filled", help="Fill in every default, and leave out the comments.")]


@app.command("ls")
def list_recipes(as_json: JsonOption = False) -> None:
    """List the shipped recipes.

    Example: [bold]recap recipes ls[/bold]
    """
    from recap_cli.recipe.recipe import shipped

    rows = [recipe._asdict() for recipe in shipped()]
    if as_json:
        console.emit_json(rows)
    else:
        console.records(rows, is_result=True)


@app.command()
def show(name: NameArgument, filled: FilledOption = False) -> None:
    """Print a shipped recipe.

    Example: [bold]recap recipes show quickstart[/bold]
    """
    from recap_cli.recipe.recipe import dump, read, shipped_text

    text = shipped_text(name)
    console.result((dump(read(name)) if filled else text).rstrip("\n"))


@app.command()
def copy(name: NameArgument, to: ToArgument = None) -> None:
    """Copy a shipped recipe, to change it, and print the path. Never overwrites a file.

    Example: [bold]recap recipes copy bert_base_cola mine.yaml[/bold]
    """
    from recap_cli.recipe.recipe import shipped_text

    text = shipped_text(name)
    path = Path(f"{name}.yaml") if to is None else to / f"{name}.yaml" if to.is_dir() else to
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:  # "x" checks and creates in one step
        raise UsageError(
            f"{path} exists already", hint=f"name another file: recap recipes copy {shlex.quote(name)} FILE"
        ) from None
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no folder {path.parent}", hint="make it first, or name another file") from None
    console.say(f"run it with: recap run {shlex.quote(str(path))}")
    console.result(str(path))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors.

    Example: [bold]recap recipes schema > recap.schema.json[/bold]
    """
    from recap_cli.recipe.recipe import json_schema

    console.emit_json(json_schema())
