"""`recap eval`: score the full, the small and the best model of a state."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recap_cli import console
from recap_cli.commands.arguments import JsonOption, StateArgument, open_state
from recap_cli.errors import UsageError

if TYPE_CHECKING:
    from recap_cli.state.store import State

MODELS = ("full", "small", "best")

WhichOption = Annotated[
    str | None,
    typer.Option("--which", metavar="NAMES", help="Of full, small, best, with commas between.", show_default="all that exist"),
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", metavar="FILE", help="Other data: a file or a folder.", show_default="the recipe's validation data"),
]
SplitOption = Annotated[
    str | None,
    typer.Option("--split", metavar="NAME", help="The split of the folder --data, or of the recipe's data set on the hub."),
]
PredictionsOption = Annotated[
    Path | None,
    typer.Option("--predictions", metavar="FILE", help="Write a row per model and example: a csv, jsonl or parquet file."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite an existing file of predictions.")]


def evaluate(
    folder: StateArgument = None,
    which: WhichOption = None,
    data: DataOption = None,
    split: SplitOption = None,
    predictions: PredictionsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score the models of a state on the recipe's validation data, or on other data.

    Other data are read like those of the recipe: same columns, preprocessing, labels.
    Data without labels still give --predictions.

    Example: [bold]recap eval runs/cola --which full,best --data test.csv --predictions out.csv[/bold]
    """
    wanted = None if which is None else _models(which)
    if force and predictions is None:
        raise UsageError("--force: there is no --predictions to write", hint="add --predictions FILE, or leave out --force")
    state = open_state(folder)
    from recap_cli.rounds.scoring import OtherData, PredictionFile
    from recap_cli.stages.eval import evaluate as score

    rows = score(
        state,
        which=wanted or _present(state),
        other=None if data is None and split is None else OtherData(data, split),
        predictions=None if predictions is None else PredictionFile(predictions, force),
        say=console.say,
        track=console.track,
    )
    if as_json:
        console.emit_json(rows)
        return
    shown = [{key: value for key, value in row.items() if key not in ("data", "examples")} for row in rows]
    if rows and "data" in rows[0]:
        console.line(f"{rows[0]['data']}, {rows[0]['examples']:,} examples")
    console.records(shown, is_result=True)
    if predictions is not None:
        console.say(f"wrote {predictions}")


def _models(which: str) -> list[str]:
    names = [name.strip() for name in which.split(",")]
    for name in names:
        if name not in MODELS:
            raise UsageError(f"--which: there is no model {name!r} in a state", hint=f"the models are {', '.join(MODELS)}")
    return names


def _present(state: "State") -> list[str]:
    """Return the names of the models that the state has so far."""
    return [name for name in MODELS if getattr(state.manifest, name)]
