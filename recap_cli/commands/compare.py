"""`recap compare`: a grid of methods, ratios, learning rates and seeds; each cell is a run in a separate process."""

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from recap_cli import console, extras
from recap_cli.commands.arguments import DryRunOption, JsonOption, RecipeArgument
from recap_cli.errors import ComparisonError, MissingExtraError, UsageError

if TYPE_CHECKING:
    from recap_cli.compare.grid import Plan

Value = TypeVar("Value", int, float, str)
Wanted = tuple[str, str]  # what a list is of, and an example

METHODS: Wanted = ("names of methods, each once", "full-ft,recap")
RATIOS: Wanted = ("shares from 0 to below 1, each once", "0.166,0.333,0.5")
RATES: Wanted = ("positive numbers of at most a million, each once", "1e-4,3e-4,1e-3")
SEEDS: Wanted = ("whole numbers from 0, each once", "0,1,2")
MOST_SEED = 2**32 - 1
MOST_RATE = 1e6
MethodsOption = Annotated[
    str | None,
    typer.Option("--methods", metavar="LIST", help="Methods to compare, as in full-ft,pre-ft,recap.", show_default="all"),
]
RatiosOption = Annotated[
    str | None,
    typer.Option("--ratios", metavar="LIST", help="Prune ratios r_p, for methods that prune.", show_default="the recipe's"),
]
MaskRatiosOption = Annotated[
    str | None,
    typer.Option("--mask-ratios", metavar="LIST", help="Mask ratios r_f, for methods that mask.", show_default="the recipe's"),
]
LrsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lrs",
        metavar="[METHOD:]LIST",
        help="Learning rates, for all methods or for one; each method is shown at its best one on the validation data. "
        "May be repeated.",
        show_default="the recipe's",
    ),
]
SeedsOption = Annotated[str, typer.Option("--seeds", metavar="LIST", help="Seeds; results are means over them.")]
JobsOption = Annotated[int, typer.Option("--jobs", metavar="N", min=1, help="Cells that run at a time.")]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The comparison's folder, new or existing.", show_default="runs/compare-<name>"),
]
TestOption = Annotated[
    Path | None,
    typer.Option("--test", metavar="FILE", help="Held-out data, a file or a folder: every product is scored on them as well."),
]
TestSplitOption = Annotated[
    str | None,
    typer.Option(
        "--test-split", metavar="NAME", help="The split of the folder --test, or of the recipe's data set on the hub."
    ),
]
CellSetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="[METHOD:]KEY=VALUE",
        help="Override a value of the recipe, for all cells or for those of one method. May be repeated.",
    ),
]


def compare(
    recipe: RecipeArgument,
    methods: MethodsOption = None,
    ratios: RatiosOption = None,
    mask_ratios: MaskRatiosOption = None,
    lrs: LrsOption = None,
    seeds: SeedsOption = "0,1,2",
    test: TestOption = None,
    test_split: TestSplitOption = None,
    jobs: JobsOption = 1,
    out: OutOption = None,
    overrides: CellSetOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe with several methods, ratios, learning rates and seeds; write the results as JSON and CSV, and draw them.

    Each cell of the grid is a state below DIR/cells.
    After a stop, the same command continues; a larger grid adds cells.
    With --lrs each method is shown at its best rate, chosen on the validation data; with --test, on data that nothing chose.
    The exit code is 18 if a cell failed or is impossible. The results have all others.

    Example: [bold]recap compare quickstart --methods full-ft,pre-ft,recap --seeds 0,1[/bold]
    """
    given: dict[str, Any] = {
        "methods": _list("--methods ", methods, str.strip, METHODS, lambda name: name != ""),
        "ratios": _list("--ratios ", ratios, float, RATIOS, lambda ratio: 0 <= ratio < 1),
        "mask_ratios": _list("--mask-ratios ", mask_ratios, float, RATIOS, lambda ratio: 0 <= ratio < 1),
        "seeds": _list("--seeds ", seeds, int, SEEDS, lambda seed: 0 <= seed <= MOST_SEED),
    }
    rates = _rates(lrs or ())
    from recap_cli.commands import comparison_tables as tables
    from recap_cli.compare import grid, held_out
    from recap_cli.compare import runner as stage
    from recap_cli.compare.schema import groups, metric_of
    from recap_cli.rounds.scoring import OtherData

    plan = grid.plan(recipe, overrides or (), grid.Grid(**given, lrs=rates))
    path = out if out is not None else Path("runs") / f"compare-{plan.base.name}"
    records = stage.describe(plan, path)
    for note in (*plan.notes, *_no_pictures()):
        console.say(f"note: {note}")
    if test is not None or test_split is not None:
        found = held_out.checked(plan.base, OtherData(test, test_split))
        held_out.say(found, console.say)
        plan = replace(plan, held_out=found)
    if dry_run:
        if as_json:
            console.emit_json(records)
        else:
            tables.print_plan(records, path)
        return
    tested: dict[str, list[Any]] = {"--test": [test] if test else [], "--test-split": [test_split] if test_split else []}
    command = _command(recipe, given, jobs, path, {"--lrs": lrs or [], **tested, "--set": overrides or []})
    done = sum(record["status"] == "done" for record in records)
    console.say(f"{len(plan.cells)} cells in {path}, {done} of them done already; logs are in {path / 'logs'}")
    results = stage.compare(plan, path, jobs=jobs, command=command, track=console.track, on_cell=tables.say_cell)
    if as_json:
        console.emit_json({**results, "groups": groups(results["cells"], metric_of(results))})
    else:
        tables.print_results(results, path)
    _check_done(results, plan, path, command)


def _no_pictures() -> Iterator[str]:
    """What to tell before anything runs if no pictures will be drawn; the results need none."""
    try:
        extras.require("plots")
    except MissingExtraError as error:
        yield f"no pictures will be drawn: {error.message}; {error.hint}, and the same command, run again, draws them"


def _check_done(results: Mapping[str, Any], plan: "Plan", path: Path, command: str) -> None:
    """Raise `ComparisonError` if cells of the plan are not done."""
    from recap_cli.compare.runner import failures

    left = failures(results["cells"], plan)
    if not left:
        return
    statuses = [record["status"] for record in left]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    logs = f"see the logs in {path / 'logs'}; `{command}` tries them again" if "failed" in statuses else None
    raise ComparisonError(
        f"{len(left)} of {len(plan.cells)} cells are not done: {counts}",
        hint=logs or "leave out the ratios or settings that are named above",
    )


def _rates(given: Sequence[str]) -> dict[str | None, list[float]]:
    """Return the rates of `--lrs`, by method, and under None those for every other one. Lists of one method are joined.

    Raises:
        UsageError: As in `_list`.
    """
    found: dict[str | None, list[str]] = {}
    for text in given:
        method, colon, listed = text.rpartition(":")
        found.setdefault(method if colon else None, []).append(listed)
    return {
        method: _list(
            f"--lrs {method}:" if method is not None else "--lrs ",
            ",".join(texts),
            _rate,
            RATES,
            lambda lr: 0 < lr <= MOST_RATE,
        )
        for method, texts in found.items()
    }


def _rate(part: str) -> float:
    """Return a rate to as many digits as the names of cells have, so that two of them are two cells."""
    return float(f"{float(part):.12g}")


def _list(
    option: str, text: str | None, kind: Callable[[str], Value], wanted: Wanted, fits: Callable[[Value], bool]
) -> list[Value]:
    """Return the values of a list with commas. `option` ends where the list begins.

    Raises:
        UsageError: A value cannot be read, does not fit, or occurs twice.
    """
    if text is None:
        return []
    words, example = wanted
    hint = f"as in {option}{example}"
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:  # a part that is no number
        found = []
    if not found or not all(map(fits, found)):
        raise UsageError(f"{option}{text or repr(text)}: expected {words}, with commas between them", hint=hint)
    if twice := [value for at, value in enumerate(found) if value in found[:at]]:
        raise UsageError(f"{option}{text}: {twice[0]} occurs twice", hint=hint)
    return found


def _command(
    recipe: str, given: Mapping[str, Sequence[Any]], jobs: int, out: Path, repeated: Mapping[str, Iterable[Any]]
) -> str:
    """Return the command line that makes the same comparison, for the results and for hints.

    `given` are the lists with commas, and `repeated` the other options with a word each time.
    """
    words = ["recap", "compare", recipe]
    for name, values in given.items():
        if values:
            words += [f"--{name.replace('_', '-')}", ",".join(f"{value}" for value in values)]
    words += ["--jobs", str(jobs)] if jobs > 1 else []
    words += ["--out", str(out)]
    for option, texts in repeated.items():
        for text in texts:
            words += [option, str(text)]
    return shlex.join(words)
