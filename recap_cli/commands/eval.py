"""`recap eval`: score the full, the small and the best model of a state."""

from typing import TYPE_CHECKING, Annotated

import typer

from recap_cli import console
from recap_cli.commands.arguments import JsonOption, StateArgument, open_state
from recap_cli.errors import UsageError

if TYPE_CHECKING:
    from recap_cli.state import State

MODELS = ("full", "small", "best")

WhichOption = Annotated[
    str | None,
    typer.Option("--which", metavar="NAMES", help="Of full, small, best, with commas between.", show_default="all there are"),
]


def evaluate(folder: StateArgument = None, which: WhichOption = None, as_json: JsonOption = False) -> None:
    """Score the models of a state on the recipe's validation data.

    Example: [bold]recap eval runs/cola --which full,best[/bold]
    """
    wanted = None if which is None else _models(which)
    state = open_state(folder)
    from recap_cli.stages import eval as stage

    rows = stage.evaluate(state, which=wanted or _present(state), track=console.track)
    if as_json:
        console.emit_json(rows)
    else:
        console.records(rows, is_result=True)


def _models(which: str) -> list[str]:
    names = [name.strip() for name in which.split(",")]
    for name in names:
        if name not in MODELS:
            raise UsageError(f"--which: there is no model {name!r} in a state", hint=f"the models are {', '.join(MODELS)}")
    return names


def _present(state: "State") -> list[str]:
    """Return the names of the models that the state holds by now."""
    return [name for name in MODELS if getattr(state.manifest, name)]
