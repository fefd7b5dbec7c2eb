"""`recap run`: all rounds, or those that a state has left."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recap_cli import console
from recap_cli.commands.arguments import RECIPE_HELP, DryRunOption, JsonOption, SetOption, complete_recipe
from recap_cli.errors import UsageError

if TYPE_CHECKING:
    from recap_cli.recipe.recipe import Recipe

OptionalRecipe = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help=f"{RECIPE_HELP} Left out: the recipe of the state named by --state.",
        show_default=False,
        autocompletion=complete_recipe,
    ),
]
StateOption = Annotated[
    Path | None,
    typer.Option("--state", metavar="DIR", help="The state's folder, new or not.", show_default="runs/<the recipe's name>"),
]


def run(
    recipe: OptionalRecipe = None,
    state: StateOption = None,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run all rounds of prune, mask, finetune and merge, and print the path of the product.

    After a stop, the same command continues after the last finished stage.
    Execution settings may change then, as in --set finetune.checkpointing=true.

    Example: [bold]recap run quickstart --set rounds=3[/bold]
    """
    checked = _recipe(recipe, state, overrides or ())
    if dry_run:
        from recap_cli.rounds.status import describe

        for line in describe(checked):
            console.line(line)
        return
    from recap_cli.commands.tables import print_summary, say_change, say_stage
    from recap_cli.rounds.status import summary
    from recap_cli.stages import run as stage

    path = state if state is not None else Path("runs") / checked.name
    overridden = None if recipe is None else {given.partition("=")[0] for given in overrides or ()}
    done = stage.run(checked, path, track=console.track, on_stage=say_stage, on_change=say_change, overridden=overridden)
    finished = summary(done)
    print_summary(finished, is_result=False)
    if as_json:
        console.emit_json(finished)
    elif finished["product"]:
        console.result(str(finished["product"]))


def _recipe(source: str | None, state: Path | None, overrides: Sequence[str]) -> "Recipe":
    """Return the recipe that was named, or that of the state that was named."""
    from recap_cli.recipe import recipe

    if source is not None:
        return recipe.read(source, overrides)
    if state is None:
        raise UsageError("no recipe was named", hint="`recap run quickstart`; `recap recipes ls` lists the others")
    from recap_cli.state.store import State

    opened = State.open(state)
    return recipe.parse(opened.recipe_text, str(state / opened.manifest.recipe), overrides)
