"""The results of `recap compare`: the schema of `results.json`, and the means over the seeds."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from recap_cli.compare import rates
from recap_cli.core.task import Better, Metric
from recap_cli.errors import DataError

Status = Literal["done", "failed", "impossible", "waiting"]

SCHEMA, KIND = 1, "comparison"
RESULTS = "results.json"
LARGEST = 1e18  # sums and squares of such numbers do not overflow
DEEPEST = 50  # levels of values; code that visits them is recursive
STATUSES: tuple[Status, ...] = get_args(Status)
HINT = "name a results.json as `recap compare` wrote it, or its folder"


def _number(found: object) -> object:
    if found is None or (isinstance(found, float) and not math.isfinite(found)):
        return None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError("no number")
    if abs(found) > LARGEST:
        raise ValueError("larger than any result")
    return found


def _listed(found: object) -> object:
    return [] if found is None else found


Number = Annotated[int | float | None, BeforeValidator(_number)]  # None if it is unknown, or not finite


class _Part(BaseModel):
    """A part of the results. Further keys are kept unchanged."""

    model_config = ConfigDict(strict=True, extra="allow")


class Seconds(_Part):
    """The seconds of each kind of stage, over all rounds."""

    init: Number = None
    prune: Number = None
    mask: Number = None
    finetune: Number = None
    merge: Number = None


class Memory(_Part):
    """Memory in the round that holds most.

    `activations_bytes` and `peak_bytes` are predicted, and `device_peak_bytes` is measured. `full_held_bytes` is what full
    finetuning holds, computed; `held_share` is the share of that.
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
    """Numbers of parameters: of the full model, of the product, and the most that were trainable in a round."""

    full: Number = None
    product: Number = None
    trainable: Number = None


class Product(_Part):
    """The bytes of the product's tensors, and the seconds of a forward of `latency_batch` examples."""

    bytes: Number = None
    latency_seconds: Number = None
    latency_batch: Number = None


class Tested(_Part):
    """The product's metric on held-out data, and what these are: their name, and the SHA-256 of their content."""

    value: Number = None
    examples: Number = None
    data: str
    digest: str | None = None


class Outcome(_Part):
    """A cell: a method with its ratios, a learning rate and a seed, and its results.

    `lr` is the rate of the grid, None if the cell has that of the recipe. `rate` is the one that it trains at.
    """

    method: str
    prune_ratio: Number = None
    mask_ratio: Number = None
    lr: Number = None
    rate: Number = None
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
    test: Tested | None = None


def metric_of(found: Mapping[str, Any]) -> Metric:
    """The metric that results compare by."""
    return Metric(found["metric"], found["better"])


class Contents(_Part):
    """All of `results.json`: the cells, and what they have in common."""

    metric: str
    better: Better
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
    """Read results as plain values, and add their `groups`: a method with its ratios, over the seeds.

    Numbers that are not finite are None. A part that is null has all its keys, each None.

    Raises:
        DataError: The file cannot be read, is no results file, or has another schema.
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
    return {**found, "place": str(place), "cells": cells, "groups": groups(cells, metric_of(found))}


def parse(raw: bytes, place: Path) -> dict[str, Any]:
    """Check the results in a file and return them as plain values.

    Raises:
        DataError: There are none, or they have another schema. The message names the `place`.
    """
    found = _load(raw, place)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise DataError(f"{place}: is no result of `recap compare`", hint=HINT)
    if found.get("schema") != SCHEMA:
        raise DataError(
            f"{place}: has schema {found.get('schema')!r}, and this recap reads only schema {SCHEMA}",
            hint="use the version of recap that made it, or run `recap compare` again",
        )
    try:
        return Contents.model_validate(found).model_dump()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"]).removeprefix(".")
        value = None if first["type"] == "missing" else first["input"]
        shown = "nothing" if value is None else repr(value)[:60]
        raise DataError(f"{place}: {where} is not what it should be: found {shown}", hint=HINT) from None


def _load(raw: bytes, place: Path) -> Any:
    try:
        found = json.loads(raw.decode("utf-8"))
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # JSON may hold a lone surrogate, which cannot be written again
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is no text", hint=HINT) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}, line {error.lineno}: is no JSON: {error.msg}", hint=HINT) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number with more digits than Python reads
        raise DataError(f"{place}: is no JSON that can be read", hint=HINT) from error
    if _is_deeper(found, than=DEEPEST):
        raise DataError(f"{place}: has values nested more than {DEEPEST} deep", hint=HINT)
    return found


def _is_deeper(found: object, *, than: int) -> bool:
    """Whether lists and objects are nested deeper than this."""
    if not isinstance(found, dict | list):
        return False
    return than == 0 or any(
        _is_deeper(value, than=than - 1) for value in (found.values() if isinstance(found, dict) else found)
    )


def groups(cells: Iterable[Mapping[str, Any]], metric: Metric) -> list[dict[str, Any]]:
    """Return a row for each method with its ratios, over the seeds that are done. A value that no seed has is None.

    Of several learning rates a row has the one with the best validation metric (`rates.choose`).

    The keys of a row:

    - `lr`, `rates`, `edge`: the rate, all that were tried, and whether it is the lowest or the highest of these.
    - `n`, `of`: how many cells are done, and how many there are.
    - `statuses`, `errors`: the number of cells by status, and the errors of those that are not done.
    - `value`, `deviation`: mean and sample standard deviation of the product's metric (None for fewer than one, or two, seeds).
    - `test`, `test_deviation`, `test_n`: those of the metric on held-out data, and of how many seeds.
    - `last`: mean metric after the last round.
    - `warm_up`, `chance`: mean metric of the warmed-up head, and of chance.
    - `warning`: the warning of seeds that ended no better than they began.
    - `seconds`, `steps`, `parameters`, `product`: means.
    - `memory`: weights, gradients and optimizer state of the seed that held most; the largest peaks.
    """
    by_group: dict[tuple[str, float | None, float | None], list[Mapping[str, Any]]] = {}
    for cell in cells:
        by_group.setdefault((cell["method"], cell["prune_ratio"], cell["mask_ratio"]), []).append(cell)
    rows = []
    for key, of_group in by_group.items():
        chosen = rates.choose(of_group, metric)
        at_rate = {"lr": chosen.lr, "rates": chosen.rates, "edge": chosen.edge}
        rows.append(_group(*key, chosen.cells) | at_rate)
    return rows


def _group(method: str, ratio: float | None, mask_ratio: float | None, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    done = [cell for cell in cells if cell["status"] == "done"]
    values = [cell["value"] for cell in done if cell["value"] is not None]
    lasts = [cell["last"] for cell in done if cell.get("last") is not None]
    tests = [cell["test"]["value"] for cell in done if cell.get("test") and cell["test"]["value"] is not None]

    def over(take: Any, part: str) -> dict[str, Any]:
        parts = [cell[part] for cell in done if cell[part]]
        keys = PARTS[part].model_fields
        return {key: take(known) if (known := [p[key] for p in parts if p.get(key) is not None]) else None for key in keys}

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
        "test": fmean(tests) if tests else None,
        "test_deviation": stdev(tests) if len(tests) > 1 else None,
        "test_n": len(tests),
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
    """Return the first seed's warning, and how many seeds have one."""
    warnings = [(cell["seed"], cell["warning"]) for cell in done if cell.get("warning")]
    if not warnings:
        return None
    seed, text = warnings[0]
    return f"seed {seed}: {text}" if len(warnings) == 1 else f"{len(warnings)} of {len(done)} seeds, as seed {seed}: {text}"
