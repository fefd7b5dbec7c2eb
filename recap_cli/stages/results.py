"""The results of `recap compare`, read from a file that anybody may have written, and checked."""

import json
import math
from pathlib import Path
from typing import Any

from recap_cli.errors import DataError
from recap_cli.stages.comparison import KIND, RESULTS, SCHEMA, STATUSES, groups

# The numbers of a cell, by the part of it that they stand in; each may be null.
NUMBERS: dict[str, tuple[str, ...]] = {
    "": ("prune_ratio", "mask_ratio", "value", "last", "product_round", "steps"),
    "seconds": ("init", "prune", "mask", "finetune", "merge"),
    "memory": (
        *("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes", "peak_bytes"),
        "device_peak_bytes",
    ),
    "parameters": ("full", "product", "trainable"),
    "product": ("bytes", "latency_seconds", "latency_batch"),
}
KINDS: dict[str, type | tuple[type, ...]] = {
    "metric": str,
    "recipe": str,
    "task": str,
    "command": str,
    "created": str,
    "grid": dict,
    "versions": dict,
    "machine": dict,
}
HINT = "name a results.json as `recap compare` wrote it, or its folder"


def read(source: Path) -> dict[str, Any]:
    """Results and their `groups` (a method at its ratios, over the seeds), plain values; a number that is not finite is None.

    Raises `DataError` if the file cannot be read, is no results file, or is of another schema.
    """
    place = source / RESULTS if source.is_dir() else source
    found = _load(place)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise DataError(f"{place}: is no result of `recap compare`", hint=HINT)
    if found.get("schema") != SCHEMA:
        raise DataError(
            f"{place}: has schema {found.get('schema')!r}, and this recap knows schema {SCHEMA}",
            hint="use the version of recap that made it, or run `recap compare` again",
        )
    for name, kind in KINDS.items():
        if not isinstance(found.get(name), kind):
            raise _misfit(place, name, found.get(name))
    cells = found.get("cells")
    if not isinstance(cells, list):
        raise _misfit(place, "cells", cells)
    read_cells = [_cell(cell, f"cells[{index}]", place) for index, cell in enumerate(cells)]
    whole = {"total_steps": _number(found.get("total_steps"), "total_steps", place), "place": str(place)}
    return {**found, **whole, "cells": read_cells, "groups": groups(read_cells)}


def _load(place: Path) -> Any:
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{place}: there is no such file", hint=HINT) from error
    except OSError as error:
        raise DataError(f"{place}: cannot be read: {error.strerror}", hint=HINT) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is no text", hint=HINT) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}, line {error.lineno}: is no JSON: {error.msg}", hint=HINT) from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of more digits than Python reads
        raise DataError(f"{place}: is no JSON that can be read", hint=HINT) from error


def _cell(found: Any, where: str, place: Path) -> dict[str, Any]:
    """A cell with all of its parts, so that a part that is null has numbers that are None."""
    if not isinstance(found, dict):
        raise _misfit(place, where, found)
    cell = {name: found.get(name) for name in ("method", "seed", "status", "error", "state", "settings", "per_round")}
    if not isinstance(cell["method"], str) or cell["status"] not in STATUSES:
        name = "status" if isinstance(cell["method"], str) else "method"
        raise _misfit(place, f"{where}.{name}", cell[name])
    if not isinstance(cell["error"], str | None):
        raise _misfit(place, f"{where}.error", cell["error"])
    rounds = cell["per_round"] or []
    if not isinstance(rounds, list):
        raise _misfit(place, f"{where}.per_round", rounds)
    cell["per_round"] = [_number(value, f"{where}.per_round", place) for value in rounds]
    for part, names in NUMBERS.items():
        inside = found if not part else found.get(part) or {}
        if not isinstance(inside, dict):
            raise _misfit(place, f"{where}.{part}", inside)
        numbers = {name: _number(inside.get(name), f"{where}{f'.{part}' * bool(part)}.{name}", place) for name in names}
        cell |= {part: numbers} if part else numbers
    return cell


def _number(found: Any, where: str, place: Path) -> float | None:
    if found is None or (isinstance(found, float) and not math.isfinite(found)):
        return None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise _misfit(place, where, found)
    return found


def _misfit(place: Path, where: str, found: Any) -> DataError:
    said = "nothing" if found is None else repr(found)[:60]
    return DataError(f"{place}: {where} is not what it should be: found {said}", hint=HINT)
