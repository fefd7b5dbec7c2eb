"""What `recap profile-memory` tells people: tables of bytes by kind, of parameters, and of what a budget asks for."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recap_cli import console

if TYPE_CHECKING:
    from recap_cli.stages.budget import Fit
    from recap_cli.state import State

KINDS = ("weights", "gradients", "optimizer", "activations", "temporary", "other")
Row = Mapping[str, Any]


def budget_json(fit: "Fit", asked: str) -> dict[str, Any]:
    """What was changed for a budget, as plain values."""
    from dataclasses import asdict

    return {"memory_budget": asked, "changes": [asdict(change) for change in fit.changes]}


def show(found: Mapping[str, Any], state: "State | None") -> None:
    """Print everything that was found, as the result."""
    if "budget" in found:
        _show_budget(found["budget"], found, state)
    rows = found["predicted"]
    console.table(*_bytes(rows), title=f"{found['recipe']}: predicted, in MB (10⁶ bytes)", is_result=True)
    console.table(*_parameters(rows), title="Parameters", is_result=True)
    for method, blocks in found.get("by_module", {}).items():
        console.table(*_blocks(blocks), title=f"{method}: held at the peak, in MB", is_result=True)
    if "measured" in found:
        console.table(*_measured(found["measured"]), title="Measured, a real step, in MB", is_result=True)
    for line in _closing(found):
        console.say(line)


def _settings(rows: Sequence[Row]) -> list[str]:
    """The columns that tell rows apart besides the method."""
    pruned = [row for row in rows if row["prune_ratio"]]
    keys = ["batch_size"] if len({row["batch_size"] for row in rows}) > 1 else []
    return [*keys, *(["prune_ratio"] if len({row["prune_ratio"] for row in pruned}) > 1 else [])]


def _label(row: Row, settings: Sequence[str]) -> list[str]:
    return [row["method"], *(console.value_text(key, row[key]) for key in settings)]


def _bytes(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    settings = _settings(rows)
    columns = ["method", *(console.heading(key) for key in settings), *KINDS, "sum of maxima", "peak instant", "scoring"]
    keys = [*(f"{kind}_bytes" for kind in KINDS), "sum_of_maxima_bytes", "training_peak_bytes", "evaluation_peak_bytes"]
    return columns, [[*_label(row, settings), *(_mb(row[key]) for key in keys)] for row in rows]


def _parameters(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    settings = [key for key in _settings(rows) if key == "prune_ratio"]
    seen = {tuple(_label(row, settings)): row for row in rows}
    keys = ("total_parameters", "resident_parameters", "trainable_parameters")
    columns = ["method", *(console.heading(key) for key in settings), "total", "resident", "trainable"]
    return columns, [[*label, *(console.millions(row[key]) for key in keys)] for label, row in seen.items()]


def _blocks(blocks: Mapping[str, Row]) -> tuple[list[str], list[list[str]]]:
    rows = [[path, *(_mb(kinds[kind]) for kind in KINDS), _mb(sum(kinds.values()))] for path, kinds in blocks.items()]
    return ["module", *KINDS, "sum"], rows


def _measured(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    reserved = any("max_reserved_bytes" in row for row in rows)
    keys = ["predicted_bytes", "measured_bytes", *(["max_reserved_bytes"] if reserved else [])]
    columns = ["method", "device", *(key.removesuffix("_bytes").replace("_", " ") for key in keys), "error", "process RSS"]
    return columns, [
        [
            row["method"],
            row["device"],
            *(_mb(row[key]) for key in keys),
            f"{row['error_share']:+.1%}",
            _mb(row["process"]["peak_rss_bytes"]),
        ]
        for row in rows
    ]


def _show_budget(budget: Row, found: Row, state: "State | None") -> None:
    changes = budget["changes"]
    peak = found["predicted"][-1]["peak_bytes"]
    if not changes:
        console.result(f"The recipe fits in {budget['memory_budget']} as it is.")
        return
    rows = [
        [c["key"], str(c["before"]).lower(), str(c["after"]).lower(), _mb(c["before_bytes"]), _mb(c["after_bytes"]), c["cost"]]
        for c in changes
    ]
    columns = ["setting", "was", "now", "peak before", "after", "what it costs"]
    console.table(columns, rows, title=f"To fit in {budget['memory_budget']} (MB)", is_result=True)
    sets = " ".join(f"--set {c['key']}={str(c['after']).lower()}" for c in changes)
    if state is not None:
        console.say(f"go on with these in the same state: recap run --state {shlex.quote(str(state.path))} {sets}")
    else:
        console.say(f"run with these: recap run {shlex.quote(found['target'])} {sets}")
        console.say(f"or let init find them: --set finetune.memory_budget={budget['memory_budget']} (peak {_mb(peak)} MB)")


def _closing(found: Row) -> Iterator[str]:
    yield from (f"note: {note}" for note in found["notes"])
    if "importance_peak_bytes" in found:
        yield f"importance on its device, the full model streamed: {_mb(found['importance_peak_bytes'])} MB at its peak"
    yield (
        "Columns are each kind's own maximum; their sum is how the paper counts, the peak instant is the most held at once. "
        "Scoring is the peak of evaluating."
    )
    yield (
        "Not in it, and on a GPU besides: cuBLAS's workspace (8 to 32 MiB), fragmentation of the allocator, and the CUDA "
        "context (some 100 MB, outside the allocator)."
    )
    for sentence in dict.fromkeys(s for row in found.get("measured", ()) for s in row["not_seen"]):
        yield f"not seen: {sentence}"
    for path in found.get("pictures", ()):
        yield f"wrote {path}"


def _mb(count: float) -> str:
    return f"{count / 1e6:,.1f}"
