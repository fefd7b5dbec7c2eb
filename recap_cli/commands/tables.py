"""What `recap run`, `recap status` and the stages tell people: a line per finished stage, and the tables of a summary.

The summary of a state, and its record per round, come from `recap_cli.rounds.status.summary`. A round that is under way
lacks what belongs to the stages to come; its cells stay empty.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recap_cli import console

STAGES = ("prune", "mask", "finetune", "merge")
HELD = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
SILENT = (  # said otherwise, or in the tables at the end
    *("round", "stage", "seconds", "finished", "metric", "evaluated_in", "train_loss", "step_seconds", *HELD),
    *("params_full", "prunable_full", "prunable_small", "moving_prunable", "label_places", "label_words"),
)
Row = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]  # headings, cells


def say_stage(facts: Mapping[str, Any]) -> None:
    """Print on stderr what a finished stage did: its round, time and plain facts, and a line for each note."""
    plain = {key: value for key, value in facts.items() if key not in SILENT and isinstance(value, (int, float, str))}
    told = ", ".join(f"{console.heading(key)} {console.value_text(key, value)}" for key, value in plain.items())
    took = console.duration(facts["seconds"])
    console.say(f"round {facts['round']} {facts['stage']}, {took}{f': {told}' if told else ''}")
    if warmed := facts.get("warmed_up"):
        metric = facts["metric"]
        told = console.value_text("metric", warmed[metric])
        console.say(f"  warm-up: {metric} {told} (chance {console.value_text('metric', facts['chance'][metric])})")
    for note in facts.get("notes", ()):
        console.say(f"  note: {note}")
    if skipped := facts.get("not_pruned"):
        console.say(f"  not pruned: {', '.join(skipped)}")


def say_change(change: Mapping[str, Any]) -> None:
    """Print on stderr which settings of a state were changed, and from what."""
    console.say(f"{_change_text(change)}, in this state from now on")


def print_summary(summary: Mapping[str, Any], *, is_result: bool) -> None:
    """Print the tables of a summary and the lines below, on stdout where they are what was asked for, else on stderr."""
    rounds = summary["rounds"]
    if rounds:
        console.table(*_training(summary), title="Rounds (* the best); sizes in parameters", is_result=is_result)
        console.table(*_sizes(rounds), title="What is left, layer by layer", is_result=is_result)
        console.table(*_times(rounds), title="Time", is_result=is_result)
        if any(row.get(HELD[0]) is not None for row in rounds):
            console.table(*_memory(rounds), title="Held while finetuning", is_result=is_result)
    line = console.line if is_result else console.say
    for text in _closing(summary):
        line(text)


def _training(summary: Mapping[str, Any]) -> Table:
    rounds = summary["rounds"]
    metric = next((row["metric"] for row in rounds if "metric" in row), "metric")
    columns = ["round", metric, "full model", "small model", "kept", "may move", "of small"]
    first = summary.get("warm_up")
    warm_up = ["0 warm-up", console.value_text("metric", first), console.value_text("parameters", rounds[0]["full_parameters"])]
    before = [] if first is None else [[*warm_up, *[""] * (len(columns) - len(warm_up))]]
    return columns, before + [_training_row(row) for row in rounds]


def _training_row(row: Row) -> list[str]:
    return [
        f"{row['round']}{' *' if row['best'] else ''}",
        console.value_text("metric", row.get("value")),
        console.value_text("parameters", row["full_parameters"]),
        console.value_text("parameters", row["small_parameters"]),
        console.value_text("share", row["kept_share"]),
        console.value_text("entries", row.get("trainable_entries")),
        console.value_text("share", row.get("trainable_share")),
    ]


def _sizes(rounds: Sequence[Row]) -> Table:
    kinds = list(dict.fromkeys(kind for row in rounds for kind, layers in row["kept"].items() if layers))
    return ["round", *kinds], [[str(row["round"]), *(_sizes_text(row, kind) for kind in kinds)] for row in rounds]


def _sizes_text(row: Row, kind: str) -> str:
    """Return what is left of each layer and of how many, as `8 7 9 of 12`; layers that are all alike are said once."""
    return f"{_series(row['kept'][kind])} of {_series(row['of'][kind])}" if row["kept"][kind] else ""


def _series(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else " ".join(map(str, sizes))


def _times(rounds: Sequence[Row]) -> Table:
    rows = [[str(row["round"]), *(console.value_text("seconds", row["seconds"].get(s)) for s in STAGES)] for row in rounds]
    return ["round", *STAGES], rows


def _memory(rounds: Sequence[Row]) -> Table:
    columns = ["round", "weights", "gradients", "optimizer", "sum", "full finetuning", "share"]
    rows = []
    for row in rounds:
        held, full = _sum(row, ""), _sum(row, "full_")
        cells = [console.value_text("bytes", row.get(key)) for key in HELD]
        cells += [console.value_text("bytes", held), console.value_text("bytes", full)]
        rows.append([str(row["round"]), *cells, console.percent(held / full) if held and full else ""])
    return columns, rows


def _sum(row: Row, prefix: str) -> int | None:
    """Return the bytes of weights, gradients and optimizer state together, where all are known."""
    parts = [row.get(f"{prefix}{key}") for key in HELD]
    return None if None in parts else sum(part for part in parts if part is not None)


def _closing(summary: Mapping[str, Any]) -> Iterator[str]:
    state = shlex.quote(summary["state"])
    yield (
        f"{summary['recipe']}: {summary['state']}, round {summary['round']} of {summary['rounds_planned']}, "
        f"{summary['stage']} done, {console.duration(summary['seconds'])} in all"
    )
    for change in summary.get("changes", ()):
        yield f"changed {change['changed']}, after {change['stage']} of round {change['round']}: {_change_text(change)}"
    if text := summary.get("warning"):
        yield f"warning: {text}"
    if summary["product"]:
        yield f"product: {summary['product']} (recap export {state} OUT makes it loadable)"
    if summary["next"]:
        yield f"next: recap {summary['next']} {state}, or recap run --state {state} for all that is left"
    elif summary["finished"]:
        yield f"finished: {summary['finished']}"


def _change_text(change: Mapping[str, Any]) -> str:
    """Return what a change of settings changed, as `finetune.checkpointing false → true`."""
    before, after = change["before"], change["after"]
    return ", ".join(f"{key} {json.dumps(before.get(key))} → {json.dumps(after[key])}" for key in after)
