"""`compare`: run the cells of a grid, each in a separate process, and write their results as they come."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import processor, python_version, system
from typing import Any

import psutil
import torch

from recap_cli import extras
from recap_cli.compare import cell as cells
from recap_cli.compare import plots, processes, store
from recap_cli.compare.grid import Cell, Plan
from recap_cli.compare.held_out import HeldOut
from recap_cli.compare.shown import comparison_of
from recap_cli.compare.store import Record, Results
from recap_cli.errors import MissingExtraError, RecapError
from recap_cli.progress import Track, silent
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.state import files
from recap_cli.state.lock import locked, plain

LIBRARIES = ("torch", "transformers", "timm", "safetensors", "peft")


def compare(
    plan: Plan,
    out: Path,
    *,
    jobs: int = 1,
    command: str = "",
    track: Track = silent,
    on_cell: Callable[[Record], None] = lambda _: None,
) -> Results:
    """Run every cell of a plan that is not done.

    A stopped cell continues after its last finished stage, and a failed one is tried again. The results include failed and
    impossible cells.

    Args:
        plan: The cells.
        out: The folder of the comparison.
        jobs: How many cells run at a time.
        command: The command line, for the results.
        track: Shows the progress.
        on_cell: Is called with the record of each cell that has ended.

    Returns:
        What `out/results.json` then holds.

    Raises:
        StateError: `out` holds something else, or a comparison of another recipe.
        StateLockedError: Another process is comparing there.
        StorageError: A file cannot be written.
    """
    out = plain(out)
    found = store.read(out)
    if found is not None:
        store.check(out, found, plan)
    with files.storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out, "compare"):
        results = store.merged(found, plan, {"versions": _versions(), "machine": machine(), "command": command})
        store.write(out, results)
        left = waiting(plan, results)
        records = {record["state"]: record for record in results["cells"]}
        with closing(_run(left, out, jobs)) as ended:
            for cell, facts in track(ended, "cells", len(left)) if left else ():
                record = records[store.state_of(cell)]
                record |= facts
                _predict(out, results, record)
                store.write(out, results)
                on_cell(record)
        _measure_products(out, results, track)
        _score_held_out(out, results, plan.held_out, track)
        _draw(out, results)
    return results


def waiting(plan: Plan, results: Results) -> list[Cell]:
    """Return the cells of a plan that have to run, in its order."""
    status = {record["state"]: record["status"] for record in results["cells"]}
    return [cell for cell in plan.cells if status[store.state_of(cell)] == "waiting"]


def describe(plan: Plan, out: Path) -> list[Record]:
    """Return the record of each cell that `compare` starts with, in the order of the runs. Writes nothing.

    Raises:
        StateError: As `compare` does.
    """
    out = plain(out)
    found = store.read(out)
    if found is not None:
        store.check(out, found, plan)
    results = store.merged(found, plan, {})
    records = {record["state"]: record for record in results["cells"]}
    return [records[store.state_of(cell)] for cell in plan.cells]


def machine() -> dict[str, Any]:
    """Return cores, processor, memory, system and accelerator, but no name of a host or a user."""
    return {
        "cores": processes.cores(),
        "cpu": _processor(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": system(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor())


def _versions() -> dict[str, str]:
    found = {"recap": version("recap-cli"), "python": python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # peft, of an extra: no cell has used it
            continue
    return found


def _run(left: Sequence[Cell], out: Path, jobs: int) -> Generator[tuple[Cell, dict[str, Any]]]:
    """Yield each cell with its figures, as it ends. Cells whose state is done come first, without a process."""
    for folder in ("cells", "recipes", "logs"):
        with files.storage_errors(out / folder):
            (out / folder).mkdir(exist_ok=True)
    begun: dict[str, Cell] = {}
    for cell in left:
        if cell.recipe is not None and cells.is_finished(cell.recipe, out / store.state_of(cell)):
            yield cell, _figures(cell, out)
        else:
            begun[cell.name] = cell
    commands = [_process(cell.name, cell.recipe, out) for cell in begun.values() if cell.recipe is not None]
    with closing(processes.run(commands, jobs)) as ended:
        for name, error in ended:
            yield begun[name], _figures(begun[name], out) if error is None else {"status": "failed", "error": error}


def _process(name: str, recipe: Recipe, out: Path) -> processes.Process:
    written = out / "recipes" / f"{name}.yaml"
    files.replace_text(written, recipes.dump(recipe))
    return processes.Process(name, cells.command(written, out / "cells" / name), out / "logs" / f"{name}.log")


def _figures(cell: Cell, out: Path) -> dict[str, Any]:
    try:
        return cells.figures(out / store.state_of(cell))
    except RecapError as error:  # the run succeeded, but its state cannot be read
        return {"status": "failed", "error": error.message}


def _predict(out: Path, results: Results, record: Record) -> None:
    """Add the predicted activations and peak of a finished cell."""
    if record["memory"] is None:
        return
    try:
        record["memory"] |= cells.predicted(out / record["state"])
    except Exception as error:  # noqa: BLE001  (the cell is done, even if its prediction fails)
        _note(results, f"{record['state']}: its training step was not predicted: {_message(error)}")


def _measure_products(out: Path, results: Results, track: Track) -> None:
    """Time the products that were not timed yet, one after another, while no cell runs."""
    left = [record for record in results["cells"] if record["status"] == "done" and record["product"] is None]
    left = [record for record in left if (out / record["state"]).exists() and record["product_round"] is not None]
    for record in track(sorted(left, key=lambda record: record["seed"]), "products", len(left)) if left else ():
        try:
            record["product"] = cells.measured_product(out / record["state"])
        except Exception as error:  # noqa: BLE001  (the cell is done, even if its product cannot be measured)
            _note(results, f"{record['state']}: its product was not measured: {_message(error)}")
        store.write(out, results)


def _score_held_out(out: Path, results: Results, held_out: HeldOut | None, track: Track) -> None:
    """Score the products on held-out data, those that were not scored on them yet; other scores go first."""
    done = [record for record in results["cells"] if record["status"] == "done"]
    if held_out is None:
        if any(record["test"] for record in done) and (count := sum(record["test"] is None for record in done)):
            _note(results, f"{count} of {len(done)} cells are not scored on held-out data: name these again with --test")
        return
    if others := [record for record in done if record["test"] and record["test"]["digest"] != held_out.digest]:
        before = ", ".join(dict.fromkeys(record["test"]["data"] for record in others))
        said = (
            f"{before} before, with other content" if before == held_out.name else f"{before} before, and {held_out.name} now"
        )
        _note(results, f"the held-out data are others: {said}; all cells are scored anew")
        for record in others:
            record["test"] = None
    left = [record for record in done if record["test"] is None]
    for record in track(left, "held-out scores", len(left)) if left else ():
        try:
            scores = cells.tested(out / record["state"], held_out.other)
            record["test"] = {**scores, "data": held_out.name, "digest": held_out.digest}
        except Exception as error:  # noqa: BLE001  (the cell is done, even if its product cannot be scored)
            why = "its state is gone" if not (out / record["state"]).exists() else _message(error)
            _note(results, f"{record['state']}: its product was not scored on {held_out.name}: {why}")
        store.write(out, results)


def _draw(out: Path, results: Results) -> None:
    shown = comparison_of(results)
    try:
        extras.require("plots")
        results["pictures"] = plots.draw(shown.rows, out, metric=shown.metric, title=shown.name)
    except Exception as error:  # noqa: BLE001  (matplotlib's errors, of fonts and files; the results need no pictures)
        _note(results, f"no pictures were drawn: {_message(error)}")
    store.write(out, results)


def _note(results: Results, text: str) -> None:
    results["notes"] = list(dict.fromkeys([*results["notes"], text]))


def _message(error: Exception) -> str:
    if isinstance(error, MissingExtraError):
        return f"{error.message}; {error.hint}"
    return error.message if isinstance(error, RecapError) else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def failures(records: Iterable[Mapping[str, Any]], plan: Plan) -> list[Mapping[str, Any]]:
    """Return the records of a plan's cells that are not done."""
    states = {store.state_of(cell) for cell in plan.cells}
    return [record for record in records if record["state"] in states and record["status"] != "done"]
