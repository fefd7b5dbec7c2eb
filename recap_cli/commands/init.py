"""`recap init`: make a state from a recipe."""

from pathlib import Path
from typing import Annotated

import typer

from recap_cli import console
from recap_cli.commands.arguments import DryRunOption, RecipeArgument, SetOption


def init(
    recipe: RecipeArgument,
    state: Annotated[Path, typer.Option("--state", metavar="DIR", help="The new folder for the state.", show_default=False)],
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Make a state from a recipe: load the model, check that it can be pruned, warm up its head.

    Prints the state's folder, for the next stage of a pipe.

    Example: [bold]recap init quickstart --state runs/quick | recap prune | recap mask | recap finetune | recap merge[/bold]
    """
    from recap_cli.recipe.recipe import read

    checked = read(recipe, overrides or ())
    if dry_run:
        from recap_cli.rounds.status import describe

        for line in describe(checked):
            console.line(line)
        return
    from recap_cli.commands.tables import say_stage
    from recap_cli.stages import init as stage
    from recap_cli.state.manifest import quoted

    made = stage.init(checked, state, track=console.track)
    say_stage(made.manifest.history[-1])
    console.say(f"made {made.path}; next: recap prune {quoted(made.path)}")
    console.result(str(made.path))
