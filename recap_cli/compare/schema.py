"""The results of `recap compare`: what `results.json` holds, whoever has written it, and means over the seeds."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from recap_cli.errors import DataError

Status = Literal["done", "failed", "impossible", "waiting"]

SCHEMA, KIND = 1, "comparison"
RESULTS = "results.json"
LARGEST = 1e18  # sums and squares of such numbers are still numbers
DEEPEST = 50  # values within values; what goes through them, ours and others', calls itself for each
STATUSES: tuple[Status, ...] = get_args(Status)
HINT = "name a results.json as `recap compare` wrote it, or its folder"


def _number(found: object) -> object:
    if found is None or (isinstance(found, float) and not math.isfinite(found)):
        return None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError("no number")
    if abs(found) > LARGEST:
        raise ValueError("larger than anything that is counted here")
    return found


def _listed(found: object) -> object:
    return [] if found is None else found


Number = Annotated[int | float | None, BeforeValidator(_number)]  # None where it is not known, or not finite


class _Part(BaseModel):
    """A part of the results; what it holds beside what is named here is kept as it is."""

    model_config = ConfigDict(strict=True, extra="allow")


class Seconds(_Part):
    """Of each kind of stage, over all rounds."""

    init: Number = None
    prune: Number = None
    mask: Number = None
    finetune: Number = None
    merge: Number = None


class Memory(_Part):
    """Held in the round that holds most; activations and peak of a training step as predicted, the device's as measured.

    `full_held_bytes` is what full finetuning of every parameter holds, computed; `held_share` is the share of that.
    """

    weights_bytes: Number = None
    gradients_bytes: Number = None
    optimizer_bytes: Number = None
    activations_bytes: Number = None
    peak_bytes: Number = None
    device_peak_bytes: Number = None
    full_held_bytes: Number = None
    held_share: Number = None


class Parameters(_Part):
    """Counts: of the full model, of the product, and the most that moved in a round."""

    full: Number = None
    product: Number = None
    trainable: Number = None


class Product(_Part):
    """The bytes of the product's tensors, and the seconds of a forward of `latency_batch` examples."""

    bytes: Number = None
    latency_seconds: Number = None
    latency_batch: Number = None


class Outcome(_Part):
    """A cell: a method at its ratios with a seed, and what it gave."""

    method: str
    prune_ratio: Number = None
    mask_ratio: Number = None
    seed: int = Field(ge=0, lt=2**63)
    settings: dict[str, Any] = Field(default_factory=dict)
    state: str | None = None
    status: Status
    error: str | None = None
    value: Number = None
    last: Number = None
    warm_up: Number = None
    chance: Number = None
    warning: str | None = None
    product_round: Number = None
    per_round: Annotated[list[Number], BeforeValidator(_listed)] = Field(default_factory=list)
    steps: Number = None
    seconds: Seconds | None = None
    memory: Memory | None = None
    parameters: Parameters | None = None
    product: Product | None = None


class Contents(_Part):
    """What a comparison has written: its cells, and what they have in common."""

    metric: str
    recipe: str
    task: str
    command: str
    created: str
    grid: dict[str, Any]
    versions: dict[str, Any]
    machine: dict[str, Any]
    total_steps: Number = None
    notes: Annotated[list[str], BeforeValidator(_listed)] = Field(default_factory=list)
    cells: list[Outcome]


PARTS: dict[str, type[_Part]] = {"seconds": Seconds, "memory": Memory, "parameters": Parameters, "product": Product}
STAGES = tuple(Seconds.model_fields)
HELD = ("weights_bytes", "gradients_bytes", "optimizer_bytes")


def read(source: Path) -> dict[str, Any]:
    """Results and their `groups` (a method at its ratios, over the seeds), plain values; a number that is not finite is None,
    and a part that is null has numbers that are.

    Raises `DataError` if the file cannot be read, is no results file, or is of another schema.
    """
    place = source / RESULTS if source.is_dir() else source
    try:
        raw = place.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{place}: there is no such file", hint=HINT) from error
    except OSError as error:
        raise DataError(f"{place}: cannot be read: {error.strerror}", hint=HINT) from error
    found = parse(raw, place)
    cells = [cell | {part: cell[part] or kind().model_dump() for part, kind in PARTS.items()} for cell in found["cells"]]
    return {**found, "place": str(place), "cells": cells, "groups": groups(cells)}


def parse(raw: bytes, place: Path) -> dict[str, Any]:
    """The results that a file has, checked, as plain values. Raises `DataError`, which names the `place`, if it has none."""
    found = _load(raw, place)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise DataError(f"{place}: is no result of `recap compare`", hint=HINT)
    if found.get("schema") != SCHEMA:
        raise DataError(
            f"{place}: has schema {found.get('schema')!r}, and this recap knows schema {SCHEMA}",
            hint="use the version of recap that made it, or run `recap compare` again",
        )
    try:
        return Contents.model_validate(found).model_dump()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"]).removeprefix(".")
        value = None if first["type"] == "missing" else first["input"]
        said = "nothing" if value is None else repr(value)[:60]
        raise DataError(f"{place}: {where} is not what it should be: found {said}", hint=HINT) from None


def _load(raw: bytes, place: Path) -> Any:
    try:
        found = json.loads(raw.decode("utf-8"))
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # a lone surrogate is JSON, and cannot be written again
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is no text", hint=HINT) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}, line {error.lineno}: is no JSON: {error.msg}", hint=HINT) from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of more digits than Python reads
        raise DataError(f"{place}: is no JSON that can be read", hint=HINT) from error
    if _is_deeper(found, than=DEEPEST):
        raise DataError(f"{place}: has values nested more than {DEEPEST} deep, as no result has", hint=HINT)
    return found


def _is_deeper(found: object, *, than: int) -> bool:
    """Whether lists and objects stand in each other more than so many deep."""
    if not isinstance(found, dict | list):
        return False
    return than == 0 or any(
        _is_deeper(value, than=than - 1) for value in (found.values() if isinstance(found, dict) else found)
    )


def groups(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method and its ratios, over the seeds that are done.

    `warm_up` and `chance` are what it began with, means too; `warning` is that of the seeds that came to nothing.
    `value` and `deviation` are the mean and the sample standard deviation of the product's metric (None for fewer than one, or
    two), `last` is the mean after the last round; seconds, steps, sizes and the latency are means; what is held is that of the
    seed that held most, and peaks are the largest; what no seed has is None. `n` of `of` are done; `statuses` counts all,
    `errors` are those of the others.
    """
    found: dict[tuple[str, float | None, float | None], list[Mapping[str, Any]]] = {}
    for cell in cells:
        found.setdefault((cell["method"], cell["prune_ratio"], cell["mask_ratio"]), []).append(cell)
    return [_group(*key, mine) for key, mine in found.items()]


def _group(method: str, ratio: float | None, mask_ratio: float | None, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    done = [cell for cell in cells if cell["status"] == "done"]
    values = [cell["value"] for cell in done if cell["value"] is not None]
    lasts = [cell["last"] for cell in done if cell.get("last") is not None]

    def over(take: Any, part: str) -> dict[str, Any]:
        there = [cell[part] for cell in done if cell[part]]
        keys = PARTS[part].model_fields
        return {key: take(known) if (known := [p[key] for p in there if p.get(key) is not None]) else None for key in keys}

    steps = [cell["steps"] for cell in done if cell["steps"] is not None]
    seconds, memory = over(fmean, "seconds"), over(max, "memory")
    parts: list[list[Any]] = [[(cell["memory"] or {}).get(key) for key in HELD] for cell in done]
    whole = [part for part in parts if None not in part]
    held = sorted(whole, key=sum)[-1] if whole else [None]  # of the run that held most
    memory |= dict(zip(HELD, held, strict=True)) if whole else {}
    return {
        "method": method,
        "prune_ratio": ratio,
        "mask_ratio": mask_ratio,
        "n": len(done),
        "of": len(cells),
        "last": fmean(lasts) if lasts else None,
        **{key: fmean(known) if (known := _known(done, key)) else None for key in ("warm_up", "chance")},
        "warning": _warning(done),
        "value": fmean(values) if values else None,
        "deviation": stdev(values) if len(values) > 1 else None,
        "steps": fmean(steps) if steps else None,
        "statuses": {status: sum(cell["status"] == status for cell in cells) for status in STATUSES},
        "errors": list(dict.fromkeys(cell["error"] for cell in cells if cell["error"])),
        "seconds": seconds,
        "seconds_whole": sum(found) if (found := [value for value in seconds.values() if value is not None]) else None,
        "memory": memory,
        "held_bytes": None if None in held else sum(held),
        "parameters": over(fmean, "parameters"),
        "product": over(fmean, "product"),
    }


def _known(cells: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [cell[key] for cell in cells if cell.get(key) is not None]


def _warning(done: Sequence[Mapping[str, Any]]) -> str | None:
    """What is said of the first seed that there is something to say of, and of how many."""
    said = [(cell["seed"], cell["warning"]) for cell in done if cell.get("warning")]
    if not said:
        return None
    seed, text = said[0]
    return f"seed {seed}: {text}" if len(said) == 1 else f"{len(said)} of {len(done)} seeds, as seed {seed}: {text}"
