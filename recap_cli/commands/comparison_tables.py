"""What `recap compare` prints: a line per cell as it ends, and the tables of the results."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recap_cli import console

Record = Mapping[str, Any]
RATIOS = {"prune_ratio": "r_p", "mask_ratio": "r_f"}
RATE = "lr"
STARTS = {"the warmed-up head": "warm_up", "chance": "chance"}
HELD = ("weights_bytes", "gradients_bytes", "optimizer_bytes")


def say_cell(record: Record) -> None:
    """Print on stderr the result of a cell, or why it has none."""
    name = record["state"].rpartition("/")[2]
    if record["status"] != "done":
        console.say(f"{name}: {record['status']}: {record['error']}")
        return
    took = console.duration(sum(seconds or 0.0 for seconds in record["seconds"].values()))
    console.say(f"{name}: {console.value_text('metric', record['value'])}, {took}")


def print_plan(records: Sequence[Record], path: Path) -> None:
    """Print which cells a comparison would run, and why it would not run the others."""
    rows = [[record["state"].rpartition("/")[2], _plan_text(record)] for record in records]
    console.table(["cell", "action"], rows, is_result=True)
    left = sum(record["status"] == "waiting" for record in records)
    impossible = sum(record["status"] == "impossible" for record in records)
    impossible_text = f", {impossible} are impossible" if impossible else ""
    console.say(f"{left} of {len(records)} cells would run in {path}{impossible_text}; nothing was written")


def print_results(results: Mapping[str, Any], path: Path) -> None:
    """Print the tables of a comparison on stdout, and on stderr its notes and its files."""
    from recap_cli.compare import rates
    from recap_cli.compare.schema import groups, metric_of
    from recap_cli.compare.shown import held_out_name

    rows, data = groups(results["cells"], metric_of(results)), held_out_name(results["cells"])
    varied = rates.are_varied(results["cells"])
    title = f"{results['recipe']}: means over the seeds" + (", each at its best rate on the validation data" if varied else "")
    console.table(*_quality(rows, _metrics(results["metric"], data), varied), title=title, is_result=True)
    for row in rows if varied else ():
        if note := rates.note(row, _name(row)):
            console.line(note)
    if data is not None:
        console.line(f"held out: {_tested(results['cells'], data)}; nothing was chosen by them")
    if any(row["memory"]["weights_bytes"] is not None for row in rows):
        title = "Memory of finetuning (activations and peak: predicted)"
        console.table(*_memory(rows), title=title, is_result=True)
    if left := [record for record in results["cells"] if record["status"] != "done"]:
        cells = [[record["state"].rpartition("/")[2], record["status"], record["error"] or ""] for record in left]
        console.table(["cell", "status", "why"], cells, title="Not done", is_result=True)
    if begun := _begun(rows, results["metric"]):
        console.line(begun)
    for row in rows:
        if row["warning"]:
            console.line(f"warning: {' '.join(filter(None, _place(row, _ratios(rows))))}, {row['warning']}")
    for note in results["notes"]:
        console.say(f"note: {note}")
    files = ["results.json", "results.csv", *results.get("pictures", ())]
    console.say(f"wrote {', '.join(files)} in {path}; for a page of it: recap report {shlex.quote(str(path))}")


def _begun(rows: Sequence[Record], metric: str) -> str | None:
    """Return the metric before round 1: of the warmed-up heads and of chance, each a mean."""
    known = {name: [row[key] for row in rows if row[key] is not None] for name, key in STARTS.items()}
    means = [f"{name} {console.value_text('metric', sum(values) / len(values))}" for name, values in known.items() if values]
    return f"before round 1: {metric} of {', of '.join(means)}" if means else None


def _plan_text(record: Record) -> str:
    if record["status"] == "impossible":
        return f"impossible: {record['error']}"
    if record["status"] == "done":
        return f"done before: {console.value_text('metric', record['value'])}"
    return "run, or continue where it stopped"


def _metrics(metric: str, data: str | None) -> dict[str, str]:
    """Return the heads of the columns of the metric: by the key of its mean, the main one first."""
    return {"value": metric} if data is None else {"test": f"{metric}, held out", "value": f"{metric}, validation"}


def _tested(cells: Sequence[Record], data: str) -> str:
    """Return what the held-out data are, and of how many examples."""
    counts = dict.fromkeys(cell["test"]["examples"] for cell in cells if cell["test"])
    return f"{data}, {' or '.join(f'{count:,}' for count in counts if count is not None)} examples"


def _name(row: Record) -> str:
    """Return a method with its ratios, as `recap, r_p 0.5, r_f 0.7`."""
    return ", ".join([row["method"], *(f"{short} {row[key]:.4g}" for key, short in RATIOS.items() if row[key] is not None)])


def _quality(rows: Sequence[Record], metrics: Mapping[str, str], varied: bool) -> tuple[list[str], list[list[str]]]:
    """Return the columns and the rows of the table. True `varied` adds the learning rate."""
    from recap_cli.compare.rates import text

    ratios = _ratios(rows)
    columns = [
        "method",
        *(RATIOS[key] for key in ratios),
        *([RATE] if varied else []),
        *(f"{name} ± s.d." for name in metrics.values()),
        "last round",
        "n",
        "steps",
        "time",
        "parameters",
        "size",
    ]
    cells = [
        [
            *_place(row, ratios),
            *([text(row["lr"]) if row["n"] else ""] if varied else []),
            *(_value_text(row, key, " ± " if len(metrics) == 1 else "±") for key in metrics),
            console.value_text("metric", row["last"]),
            f"{row['n']}" if row["n"] == row["of"] else f"{row['n']} of {row['of']}",
            "" if row["steps"] is None else f"{row['steps']:,.0f}",
            _seconds_text(row),
            console.value_text("parameters", row["parameters"]["product"]),
            console.value_text("bytes", row["product"]["bytes"]),
            console.value_text("latency", row["product"]["latency_seconds"]),
        ]
        for row in rows
    ]
    batch = next((row["product"]["latency_batch"] for row in rows if row["product"]["latency_batch"]), None)
    return [*columns, f"latency of {batch:g}" if batch else "latency"], cells


def _memory(rows: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    ratios = _ratios(rows)
    keys = [*HELD, "held_share", "activations_bytes", "peak_bytes"]
    keys += ["device_peak_bytes"] if any(row["memory"]["device_peak_bytes"] is not None for row in rows) else []
    names = {
        "optimizer_bytes": "optimizer state",
        "device_peak_bytes": "peak, measured",
        "held_share": "held, of full finetuning",
    }
    columns = ["method", *(RATIOS[key] for key in ratios), *(names.get(key) or console.heading(key) for key in keys)]
    return columns, [[*_place(row, ratios), *(console.value_text(key, row["memory"][key]) for key in keys)] for row in rows]


def _ratios(rows: Sequence[Record]) -> list[str]:
    return [key for key in RATIOS if any(row[key] is not None for row in rows)]


def _place(row: Record, ratios: Sequence[str]) -> list[str]:
    return [row["method"], *("" if row[key] is None else f"{row[key]:.4g}" for key in ratios)]


def _value_text(row: Record, key: str, between: str) -> str:
    """Return a mean with its deviation, and of how many seeds if a held-out one lacks some.

    What stands `between` the two is a sign, and in narrow columns no blanks: a cell is folded at these.
    """
    if row[key] is None:
        return ""
    deviation = row["test_deviation" if key == "test" else "deviation"]
    seeds = f" ({row['test_n']} of {row['n']})" if key == "test" and row["test_n"] < row["n"] else ""
    return f"{row[key]:.4f}" + ("" if deviation is None else f"{between}{deviation:.4f}") + seeds


def _seconds_text(row: Record) -> str:
    known = [seconds for seconds in row["seconds"].values() if seconds is not None]
    return console.duration(sum(known)) if known else ""
