"""What `recap run`, `recap status` and the stages print: a line per finished stage, and the tables of a summary.

`recap_cli.rounds.status.summary` makes the summary of a state, with a row per round. A round that is under way has no values
for the stages to come; their cells stay empty.
"""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from recap_cli import console

STAGES = ("prune", "mask", "finetune", "merge")
LISTED = {  # of the facts of `init`
    "not_pruned": "not pruned",
    "whole_trained": "pruned, and trained whole beside the mask",
    "whole_frozen": "pruned, and frozen whole where a mask freezes anything",
}
HELD = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
Row = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]  # headings, cells


def say_stage(facts: Mapping[str, Any]) -> None:
    """Print on stderr what a finished stage did and how long it took, with a line for each note."""
    stage = facts["stage"]
    name = stage if stage == "init" else f"round {facts['round']} {stage}"
    console.say(f"{name}, {console.duration(facts['seconds'])}: {STAGE_TEXTS[stage](facts)}")
    if warmed := facts.get("warmed_up"):
        metric = facts["metric"]
        value, chance = (console.value_text("metric", figures[metric]) for figures in (warmed, facts["chance"]))
        console.say(f"  head warmed up: {metric} {value} (chance {chance})")
    if teacher := facts.get("teacher"):
        metric, size = facts["metric"], console.millions(teacher["parameters"])
        value = console.value_text("metric", teacher["figures"][metric])
        console.say(f"  teacher: {teacher['name']}, {size} parameters, {metric} {value}")
    for note in facts.get("notes", ()):
        console.say(f"  note: {note}")
    for key, text in LISTED.items():
        if names := facts.get(key):
            console.say(f"  {text}: {', '.join(names)}")


def _init_text(facts: Mapping[str, Any]) -> str:
    all_of_it, prunable = (console.millions(facts[key]) for key in ("parameters", "prunable_parameters"))
    head = "new head" if facts["head_new"] else "head of the checkpoint"
    return (
        f"{facts['adapter']} with {all_of_it} parameters, {prunable} prunable, {head}; "
        f"{facts['train_examples']:,} training examples, {facts['labels']:,} labels"
    )


def _prune_text(facts: Mapping[str, Any]) -> str:
    small, full = console.millions(facts["params_small"]), console.millions(facts["params_full"])
    if facts["plan"] == "same":
        return f"kept the groups of the round before; the small model has {small} of {full} parameters{_given_back(facts)}"
    if facts["prune_ratio"] == 0:
        return f"pruned nothing; the small model has all {full} parameters"
    share = console.percent(1 - facts["kept_share_of_prunable"])
    by = "learned scores" if facts["plan"] == "learned" else "importance"
    left = f"the small model has {small} of {full} parameters"
    return f"pruned {share} of the prunable parameters by {by}; {left}{_given_back(facts)}"


def _given_back(facts: Mapping[str, Any]) -> str:
    """What a compensated cut gives back, to stand at the end of a line."""
    found = facts.get("compensated")
    return f"; compensated: {console.percent(found['given_back_share'])} of what the cut took is given back" if found else ""


def _mask_text(facts: Mapping[str, Any]) -> str:
    if facts["trains"] == "head":
        return "only the task head is trainable"
    if facts["trains"] == "teacher":
        return "the full model is the teacher of the rounds after this one"
    if facts["trains"] == "training":
        return "the method chooses what is trainable"
    if facts["mask_ratio"] == 0:
        return "all prunable parameters of the small model are trainable"
    share = facts["trainable_share_of_prunable"]
    frozen = console.percent(1 - share)
    return f"{console.percent(share)} of the small model's prunable parameters are trainable, {frozen} are frozen"


def _finetune_text(facts: Mapping[str, Any]) -> str:
    metric = facts["metric"]
    value, loss = console.value_text("metric", facts[metric]), console.value_text("loss", facts["loss"])
    return (
        f"trained {console.millions(facts['trainable'])} parameters for {facts['steps']:,} steps; "
        f"validation: {metric} {value}, loss {loss}"
    )


def _merge_text(facts: Mapping[str, Any]) -> str:
    merged = f"wrote {console.millions(facts['trained'])} trained parameters into the full model"
    return merged if facts["best_round"] is None else f"{merged}; best round so far: {facts['best_round']}"


STAGE_TEXTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "init": _init_text,
    "prune": _prune_text,
    "mask": _mask_text,
    "finetune": _finetune_text,
    "merge": _merge_text,
}


def say_change(change: Mapping[str, Any]) -> None:
    """Print on stderr which settings of a state were changed, and from what."""
    console.say(f"changed in this state: {_change_text(change)}")


def print_summary(summary: Mapping[str, Any], *, is_result: bool) -> None:
    """Print the tables of a summary and the lines below them: on stdout if they are the result, else on stderr."""
    rounds = summary["rounds"]
    if rounds:
        console.table(*_training(summary), title="Rounds (* is the best); sizes in parameters", is_result=is_result)
        console.table(*_sizes(rounds), title="Kept per layer", is_result=is_result)
        console.table(*_times(rounds), title="Time", is_result=is_result)
        if any(row.get(HELD[0]) is not None for row in rounds):
            console.table(*_memory(rounds), title="Memory held while finetuning", is_result=is_result)
    line = console.line if is_result else console.say
    for text in _closing(summary):
        line(text)


def _training(summary: Mapping[str, Any]) -> Table:
    rounds = summary["rounds"]
    metric = next((row["metric"] for row in rounds if "metric" in row), "metric")
    columns = ["round", metric, "full model", "small model", "kept", "trainable", "of small"]
    first = summary.get("warm_up")
    warm_up = ["0 warm-up", console.value_text("metric", first), console.value_text("parameters", rounds[0]["full_parameters"])]
    before = [] if first is None else [[*warm_up, *[""] * (len(columns) - len(warm_up))]]
    cells = before + [_training_row(row) for row in rounds]
    if any("given_back_share" in row for row in rounds):  # with `prune.compensate`
        columns.append("given back")
        given_back = [console.value_text("share", row.get("given_back_share")) for row in rounds]
        cells = [[*line, text] for line, text in zip(cells, [""] * len(before) + given_back, strict=True)]
    return columns, cells


def _training_row(row: Row) -> list[str]:
    return [
        f"{row['round']}{' *' if row['best'] else ''}{' teacher' if row.get('teaches') else ''}",
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
    """Return the groups kept per layer and how many there were, as `8 7 9 of 12`. Equal numbers stand once."""
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
        f"{summary['stage']} done, {console.duration(summary['seconds'])} in total"
    )
    for change in summary.get("changes", ()):
        yield f"changed {change['changed']}, after {change['stage']} of round {change['round']}: {_change_text(change)}"
    if (teacher := summary.get("teacher")) is not None and summary["best"]:
        values = (console.value_text("metric", of) for of in (summary["best"]["value"], teacher))
        yield "{}: the best small model has {}, its teacher {}".format(summary["best"]["metric"], *values)
    if text := summary.get("warning"):
        yield f"warning: {text}"
    if summary["product"]:
        yield f"product: {summary['product']} (to load it in Python: recap export {state} OUT)"
    if summary["next"]:
        yield f"next: recap {summary['next']} {state}, or recap run --state {state} for all remaining stages"
    elif summary["finished"]:
        yield f"finished: {summary['finished']}"


def _change_text(change: Mapping[str, Any]) -> str:
    """Return the changed settings, as `finetune.checkpointing false → true`."""
    before, after = change["before"], change["after"]
    return ", ".join(f"{key} {json.dumps(before.get(key))} → {json.dumps(after[key])}" for key in after)
