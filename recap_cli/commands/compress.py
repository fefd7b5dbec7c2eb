"""`recap compress`: a finetuned model made small, with its task and columns guessed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from recap_cli import console
from recap_cli.commands.arguments import DryRunOption, JsonOption, SetOption

MODEL = typer.Argument(metavar="MODEL", help="The finetuned model: a folder or a hub id.", show_default=False)
DATA = typer.Option(
    "--data", metavar="DATA", help="Training data: a file, a folder of images, or a hub id.", show_default=False
)
VALIDATION = typer.Option(
    "--validation", metavar="DATA", help="Validation data in the same form.", show_default="a tenth of the training data"
)
RATIO = typer.Option("--ratio", metavar="SHARE", help="Share of the prunable parameters to prune.")
STATE = typer.Option("--state", metavar="DIR", help="The state's folder, new or not.", show_default="runs/small-MODEL")
OUT = typer.Option("--out", metavar="DIR", help="Export the small model to this new folder.", show_default=False)


def compress(
    model: Annotated[str, MODEL],
    data: Annotated[str, DATA],
    validation: Annotated[str | None, VALIDATION] = None,
    ratio: Annotated[float, RATIO] = 0.5,
    state: Annotated[Path | None, STATE] = None,
    out: Annotated[Path | None, OUT] = None,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a finetuned model small: prune it, and let what is left learn from the whole.

    The task is read from the model's head, and the columns from the data; each guess is printed, and --set says it otherwise.
    After a stop, the same command continues.

    Example: [bold]recap compress my-bert --data train.csv --ratio 0.5 --out my-bert-small[/bold]
    """
    from recap_cli.rounds.guessed_recipe import guess_recipe

    guessed = guess_recipe(model, data, validation, ratio, overrides or ())
    console.say("guessed, and changed by --set KEY=VALUE:")
    for reason in guessed.reasons:
        console.say(f"  {reason}")
    if dry_run:
        from recap_cli.rounds.status import describe

        lines = describe(guessed.recipe)
        if as_json:
            console.emit_json({"recipe": guessed.recipe.model_dump(mode="json"), "guessed": guessed.reasons, "plan": lines})
        for line in () if as_json else lines:
            console.line(line)
        return
    from recap_cli.commands.tables import print_summary, say_change, say_stage
    from recap_cli.rounds.status import summary
    from recap_cli.stages import compress as stage
    from recap_cli.stages.export import export
    from recap_cli.stages.run import run

    path = state if state is not None else Path("runs") / guessed.recipe.name
    if out is not None:
        stage.check_place(out, path)
    overridden = {given.partition("=")[0].strip() for given in overrides or ()}
    done = run(guessed.recipe, path, track=console.track, on_stage=say_stage, on_change=say_change, overridden=overridden)
    print_summary(summary(done), is_result=False)
    found = stage.before_and_after(done, track=console.track)
    if out is not None:  # last, so that the same command goes on after a stop
        found["export"] = str(export(done, out, track=console.track)["path"])
    if as_json:
        console.emit_json(found)
        return
    _say(found)
    console.result(str(found.get("export") or found["product"]))


def _say(found: Mapping[str, Any]) -> None:
    """Print the table of the model before and after, and what training held."""
    latencies = [f"latency of {count}" for count in found["latency_batches"]]
    columns = ["", found["metric"], "parameters", "weights", *latencies]
    rows = [[name, *_cells(found[name])] for name in ("before", "after")]
    console.table(columns, [*rows, ["", *_ratios(found["before"], found["after"])]], title="Before and after", is_result=False)
    held, full = (console.value_text("bytes", found[key]) for key in ("held_bytes", "full_held_bytes"))
    share = console.percent(found["held_bytes"] / found["full_held_bytes"])
    console.say(f"measured on {found['latency_on']}; the metric is of the validation data, which chose the best round")
    console.say(f"training held {held} of weights, gradients and optimizer state; full finetuning holds {full} ({share})")


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        console.value_text("metric", row["value"]),
        console.value_text("parameters", row["parameters"]),
        console.value_text("bytes", row["bytes"]),
        *(console.value_text("latency", seconds) for seconds in row["latency_seconds"]),
    ]


def _ratios(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what the second row is in relation to the first: a difference, shares, and how many times as fast."""
    times = [
        f"{first / second:.2f} × as fast" if first and second else ""
        for first, second in zip(before["latency_seconds"], after["latency_seconds"], strict=True)
    ]
    shares = [console.percent(after[key] / before[key]) for key in ("parameters", "bytes")]
    return [f"{after['value'] - before['value']:+.4f}", *shares, *times]
