"""`recap eval`: score the full, the small and the best model of a state."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recap_cli import console
from recap_cli.commands.arguments import JsonOption, StateArgument, open_state
from recap_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
    by_label = _by_label(state, rows)
    apart = {"data", "examples"} | {f"{prefix}/{label}" for prefix, labels in by_label.items() for label in labels}
    shown = [{key: value for key, value in row.items() if key not in apart} for row in rows]
    if rows and "data" in rows[0]:
        console.line(f"{rows[0]['data']}, {rows[0]['examples']:,} examples")
    console.records(shown, is_result=True)
    for prefix, labels in by_label.items():
        cells = [[label, *(console.value_text("metric", value) for value in values)] for label, values in labels.items()]
        console.table(["class", *(row["model"] for row in rows)], cells, title=f"{prefix} by class", is_result=True)
    if predictions is not None:
        console.say(f"wrote {predictions}")


def _models(which: str) -> list[str]:
    names = [name.strip() for name in which.split(",")]
    for name in names:
        if name not in MODELS:
            raise UsageError(f"--which: there is no model {name!r} in a state", hint=f"the models are {', '.join(MODELS)}")
    return names


def _by_label(state: "State", rows: "Sequence[Mapping[str, Any]]") -> dict[str, dict[str, list[float | None]]]:
    """Return the figures that there is one of for each label, by prefix and label, with a value for each row or None."""
    if not any("/" in key for row in rows for key in row):
        return {}
    from recap_cli.rounds.run_context import Context

    objective = Context(state).objective
    found = [objective.task.figures_by_label(row) for row in rows]
    return {
        prefix: {label: [one[prefix].get(label) for one in found] for label in objective.labels}
        for prefix in objective.task.by_label
        if any(one[prefix] for one in found)
    }


def _present(state: "State") -> list[str]:
    """Return the names of the models that the state has so far."""
    return [name for name in MODELS if getattr(state.manifest, name)]
