"""Arguments of several subcommands: the recipe, the state's folder (also through a pipe), `--set`, `--json`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recap_cli import console
from recap_cli.errors import PipeError, UsageError

if TYPE_CHECKING:
    from recap_cli.state.store import State


def complete_recipe(incomplete: str) -> list[tuple[str, str]]:
    """Return the shipped recipes whose names begin with `incomplete`, with their titles, for the shell."""
    from recap_cli.recipe.recipe import shipped

    return [(recipe.name, recipe.title) for recipe in shipped() if recipe.name.startswith(incomplete)]


RECIPE_HELP = "A YAML file, or the name of a shipped recipe (recap recipes ls)."
STATE_HELP = "The state's folder. Left out in a pipe: the first line of standard input."

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help=RECIPE_HELP, autocompletion=complete_recipe)]
StateArgument = Annotated[Path | None, typer.Argument(metavar="DIR", help=STATE_HELP, show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe, as in prune.ratio=0.5. May be repeated."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would happen; load, write and train nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def open_state(folder: Path | None) -> "State":
    """Return the state in `folder`, or in the folder that the first line of standard input names.

    Raises:
        UsageError: No folder was named, or standard input holds something else.
        PipeError: Standard input is empty.
        StateError: There is no state in the folder, or it cannot be used.
    """
    path = folder if folder is not None else _piped()
    from recap_cli.state.store import State

    return State.open(path)


def _piped() -> Path:
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise UsageError("no state was named", hint="name its folder, as in `recap status runs/quickstart`")
    line = sys.stdin.readline().rstrip("\r\n")
    if not line:
        raise PipeError(
            "no state was named, and standard input is empty: in a pipe, the stage before this one has failed",
            hint="its message stands above; outside a pipe, name the state's folder, as in `recap status runs/quickstart`",
        )
    if line.startswith(("{", "[")):
        raise UsageError("standard input is JSON, not a state's folder", hint="leave out --json on the stage before this one")
    return Path(line)


def report_stage(state: "State", facts: Mapping[str, Any], as_json: bool) -> None:
    """Print what a finished stage did on stderr, and on stdout the state's folder for the next stage, or JSON."""
    from recap_cli.commands.tables import say_stage

    say_stage(facts)
    if as_json:
        console.emit_json(facts)
    else:
        console.result(str(state.path))
