"""The results of a comparison on disk: `results.json`, whole at any moment, and `results.csv`, a row per cell.

A folder belongs to one base recipe. A comparison that runs again keeps finished cells, also those that are not in its grid.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import Any

from recap_cli.compare import rate_axis
from recap_cli.compare.grid import AXES, Cell, Plan, place
from recap_cli.compare.schema import KIND, LARGEST, RESULTS, SCHEMA, Outcome, Seconds, Status, parse
from recap_cli.errors import DataError, RecapError, StateError
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.settings import EXECUTION
from recap_cli.state import files
from recap_cli.state.lock import HOLDER, LOCK
from recap_cli.state.manifest import COMMIT, quoted

TABLE = "results.csv"
VARIED = {"method": "recap", "options": {}, "seed": 0, "prune.ratio": 0.0, "mask.ratio": 0.0}  # not part of the base recipe
ELSEWHERE = "name another folder with --out"

Results = dict[str, Any]
Record = dict[str, Any]  # one of its cells


def read(out: Path) -> Results | None:
    """Return the results in a folder, or None if it is empty or does not exist.

    Raises:
        StateError: The folder holds something else, or results of another schema.
        StorageError: The folder cannot be read.
    """
    if (raw := _raw(out)) is None:
        return None
    try:
        found = parse(raw, out / RESULTS)
        for number, record in enumerate(found["cells"]):
            if record["state"] is None:
                raise DataError(f"{out / RESULTS}: cells[{number}] has no state to continue")
        return found
    except DataError as error:
        again = "; or move the file away: the same command then reads the finished cells of its grid again"
        raise StateError(error.message, hint=f"{ELSEWHERE}{again if (out / 'cells').is_dir() else ''}") from None


def _raw(out: Path) -> bytes | None:
    """Return the results file of a folder, or None if the folder is empty or does not exist."""
    with files.storage_errors(out):
        if not out.exists():
            return None
        if not out.is_dir():
            raise StateError(f"{out}: is a file, not a folder", hint=ELSEWHERE)
        names = {entry.name for entry in out.iterdir()} - {LOCK, HOLDER, f"{RESULTS}.tmp"}
        if RESULTS in names:
            return (out / RESULTS).read_bytes()
        if not names or "cells" in names:  # the finished cells are read again
            return None
        what = "is a state, not a comparison" if COMMIT in names else f"is not empty, and no comparison: it has no {RESULTS}"
        raise StateError(f"{out}: {what}", hint=ELSEWHERE)


def check(out: Path, found: Results, plan: Plan) -> None:
    """Check that the results in `out` have the base recipe and the settings of a plan.

    Raises:
        StateError: Their base recipe is another one, or a cell has other settings.
    """
    if found.get("recipe_digest") != digest(plan.base) and (keys := _differences(found, plan.base)):
        raise StateError(
            f"{out} holds a comparison of the recipe {found.get('recipe')} that differs from this one in {', '.join(keys)}",
            hint=f"keep it and name another folder: --out {quoted(out.with_name(f'{out.name}-2'))}",
        )
    by_method = {cell.method: cell for cell in plan.cells}
    for record in found["cells"]:
        if record["method"] not in by_method or record["status"] == "impossible":
            continue
        keys = _changed(record, by_method[record["method"]])
        if keys and not _may_change(out, record, keys):
            raise StateError(
                f"{out} has cells of {record['method']} with other settings: {', '.join(keys)}",
                hint=f"name another folder: --out {quoted(out.with_name(f'{out.name}-2'))}"
                + ("" if record["status"] == "done" else f"; or remove {quoted(out / record['state'])}, which is not done"),
            )


def digest(base: Recipe) -> str:
    """Return the SHA-256 of what all cells have in common."""
    return recipes.digest(recipes.changed(base, VARIED))


def merged(found: Results | None, plan: Plan, facts: Mapping[str, Any]) -> Results:
    """Return the results to start with: the finished cells, and all others of the plan as waiting."""
    cells = {record["state"]: record for record in found["cells"]} if found else {}
    for cell in plan.cells:
        if cells.get(state_of(cell), {}).get("status") != "done":
            cells[state_of(cell)] = _waiting(cell)
    records = sorted(cells.values(), key=_place)
    _rate_older(records, plan)
    base = recipes.changed(plan.base, VARIED)
    commands = [*str((found or {}).get("command") or "").splitlines(), str(facts.get("command", ""))]
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "recipe": plan.base.name,
        "metric": plan.base.metric.name,
        "better": plan.base.metric.better,
        "task": plan.base.task.kind,
        "created": (found or {}).get("created") or _now(),
        "updated": _now(),
        **facts,
        "command": "\n".join(dict.fromkeys(filter(None, commands))),
        "total_steps": None,
        "recipe_digest": digest(plan.base),
        "base": base.model_dump(mode="json"),
        "recipe_text": recipes.dump(plan.base),
        "grid": {
            "methods": list(dict.fromkeys(record["method"] for record in records)),
            "ratios": _values(records, "prune_ratio"),
            "mask_ratios": _values(records, "mask_ratio"),
            **({"lrs": lrs} if (lrs := _values(records, "lr")) else {}),
            "seeds": _values(records, "seed"),
        },
        "notes": _notes(found, records, facts),
        "cells": records,
    }


def write(out: Path, results: Results) -> None:
    """Replace `results.json` and `results.csv`, each as a whole.

    Raises:
        StorageError: A file cannot be written.
    """
    steps = {record["steps"] for record in results["cells"] if record["status"] == "done"}
    results |= {"updated": _now(), "total_steps": steps.pop() if len(steps) == 1 else None}
    files.replace_text(out / RESULTS, json.dumps(finite(results), indent=1, ensure_ascii=False) + "\n")
    files.replace_text(out / TABLE, table(results["cells"]))


def table(records: Sequence[Record]) -> str:
    """Return the cells as CSV, with a column for each value, in the order of the schema."""
    rows = [dict(_flat(record)) for record in records]
    written = StringIO()
    writer = csv.DictWriter(written, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def state_of(cell: Cell) -> str:
    """Return the folder of a cell's state, relative to that of the comparison."""
    return f"cells/{cell.name}"


def finite(value: Any) -> Any:
    """Return the value with None for numbers that are not finite, which JSON lacks."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _waiting(cell: Cell) -> Record:
    status: Status = "waiting" if cell.recipe is not None else "impossible"
    return Outcome(
        method=cell.method,
        prune_ratio=cell.prune_ratio,
        mask_ratio=cell.mask_ratio,
        lr=cell.lr,
        rate=cell.rate,
        seed=cell.seed,
        settings=dict(cell.settings),
        state=state_of(cell),
        status=status,
        error=cell.error,
        seconds=Seconds(),
    ).model_dump()


def _rate_older(records: Iterable[Record], plan: Plan) -> None:
    """Add the rate of cells that older versions have run, which had that of the recipe."""
    keys = {cell.method: cell.rate_key for cell in plan.cells}
    for record in records:
        if record["rate"] is None and record["status"] == "done" and (key := keys.get(record["method"])) is not None:
            own = [record["settings"][name] for name in (key, rate_axis.LR) if name in record["settings"]]
            rate = own[0] if own else rate_axis.rate_of(plan.base, key)
            record["rate"] = rate if isinstance(rate, int | float) and rate <= LARGEST else None  # settings may hold `auto`


def _changed(record: Record, cell: Cell) -> list[str]:
    """Return the settings of a cell's method that are others in a record of it, without those that the grid varies."""
    before, now = record["settings"], cell.settings
    varied = {*AXES, *rate_axis.keys_in(before, record["lr"]), *rate_axis.keys_in(now, cell.lr)}
    return [key for key in {**before, **now} if key not in varied and before.get(key) != now.get(key)]


def _may_change(out: Path, record: Record, keys: Iterable[str]) -> bool:
    """Whether a cell may run with other settings: it is not done, and its state is new or only execution settings differ."""
    if record["status"] == "done":
        return False
    return not (out / record["state"] / COMMIT).exists() or all(key in EXECUTION for key in keys)


def _differences(found: Results, base: Recipe) -> list[str]:
    """Return the keys in which the base recipe differs from that of the results. Missing keys have their defaults."""
    try:
        before = recipes.parse(json.dumps(found.get("base")), RESULTS)
    except RecapError:  # it has other keys, or was edited by hand
        return ["keys that this version does not know"]
    return recipes.differences(before, recipes.changed(base, VARIED))


def _place(record: Record) -> tuple[Any, ...]:
    ratios = record["prune_ratio"] or 0.0, record["mask_ratio"] or 0.0
    return (*place(record["method"]), *ratios, record["lr"] or 0.0, record["seed"])


def _values(records: Iterable[Record], key: str) -> list[Any]:
    return sorted({record[key] for record in records if record[key] is not None})


def _notes(found: Results | None, records: Iterable[Record], facts: Mapping[str, Any]) -> list[str]:
    """Return the notes that stay, and one if cells of another machine or of other versions are kept."""
    if found is None:
        return []
    notes = [note for note in found.get("notes", ()) if note.startswith("cells of ")]
    changed = [key for key in ("machine", "versions") if found.get(key) != facts.get(key)]
    if changed and any(record["status"] == "done" for record in records):
        values = "; ".join(f"{key} {json.dumps(found.get(key))}" for key in changed)
        notes.append(f"cells of {found.get('updated')} and before were run with other {values}")
    return list(dict.fromkeys(notes))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if key == "settings":
            yield key, json.dumps(value, ensure_ascii=False)
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", " ".join(map(str, value))
        elif key == "latency_seconds":  # tables are for people, and show milliseconds
            yield f"{prefix}latency_ms", None if value is None else float(f"{value * 1e3:.6g}")
        elif value is not None or key not in ("memory", "parameters", "product", "test"):  # other rows have their columns
            yield f"{prefix}{key}", value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
