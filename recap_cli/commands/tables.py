"""The tables of `recap run` and `recap status`, from the summary of a state.

A summary is what `recap_cli.stages.schedule.summary` returns, plain values all through: `recipe`, `state`, `stage`, `round`,
`rounds_planned`, `next` (a stage, or None), `product` (a path, or None), `seconds`, and `rounds`, a record per round: `round`,
`best` (True: the best so far), `seconds` by stage, and the facts of the round's stages, one beside the other. A round that
is under way lacks the facts of the stages to come.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recap_cli import console

STAGES = ("prune", "mask", "finetune", "merge")
HELD = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
Row = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]  # headings, cells


def stage_line(facts: Mapping[str, Any]) -> str:
    """Return one line on a finished stage: its round, its time, and its plain facts."""
    told = ", ".join(
        f"{console.heading(key)} {console.value_text(key, value)}"
        for key, value in facts.items()
        if key not in ("round", "stage", "seconds", "finished") and isinstance(value, (int, float, str))
    )
    took = console.duration(facts["seconds"])
    return f"round {facts['round']} {facts['stage']}, {took}{f': {told}' if told else ''}"


def print_summary(summary: Mapping[str, Any], *, is_result: bool) -> None:
    """Print the tables of a summary and the lines below, on stdout where they are what was asked for, else on stderr."""
    rounds = summary["rounds"]
    if rounds:
        console.table(*_training(rounds), title="Rounds (* best)", is_result=is_result)
        console.table(*_sizes(rounds), title="What is left, layer by layer", is_result=is_result)
        console.table(*_memory(rounds), title="Bytes held while finetuning", is_result=is_result)
    line = console.result if is_result else console.say
    for text in _closing(summary):
        line(text)


def _training(rounds: Sequence[Row]) -> Table:
    metric = next((row["metric"] for row in rounds if "metric" in row), "metric")
    columns = ["round", metric, "full", "small", "of prunable", "may move", "of small", *STAGES]
    return columns, [_training_row(row, metric) for row in rounds]


def _training_row(row: Row, metric: str) -> list[str]:
    small, trainable = row.get("params_small"), row.get("trainable")
    return [
        f"{row['round']}{' *' if row.get('best') else ''}",
        console.value_text("metric", row.get(metric)),
        console.value_text("params", row.get("params_full")),
        console.value_text("params", small),
        console.value_text("share", row.get("kept_share_of_prunable")),
        console.value_text("params", trainable),
        console.value_text("share", trainable / small if small and trainable is not None else None),
        *(console.value_text("seconds", row["seconds"].get(stage)) for stage in STAGES),
    ]


def _sizes(rounds: Sequence[Row]) -> Table:
    kinds = list(dict.fromkeys(kind for row in rounds for kind in row.get("kept", {})))
    rows = [[str(row["round"]), *(_sizes_text(row, kind) for kind in kinds)] for row in rounds]
    return ["round", *kinds], rows


def _sizes_text(row: Row, kind: str) -> str:
    """Return what is left of each layer and of how many, as `8 7 9 of 12`; layers that are all alike are said once."""
    kept, of = (row.get(name, {}).get(kind, []) for name in ("kept", "of"))
    return f"{_series(kept)} of {_series(of)}" if kept and of else ""


def _series(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else " ".join(map(str, sizes))


def _memory(rounds: Sequence[Row]) -> Table:
    columns = ["round", "weights", "gradients", "optimizer", "sum", "full finetuning", "share of it"]
    rows = []
    for row in rounds:
        held, full = _sum(row), _sum(row.get("full_finetuning", {}))
        cells = [console.value_text("bytes", row.get(key)) for key in HELD]
        cells += [console.value_text("bytes", held), console.value_text("bytes", full)]
        rows.append([str(row["round"]), *cells, console.percent(held / full) if held and full else ""])
    return columns, rows


def _sum(held: Row) -> int | None:
    """Return the bytes of weights, gradients and optimizer state together, where all are known."""
    return sum(held[key] for key in HELD) if all(key in held for key in HELD) else None


def _closing(summary: Mapping[str, Any]) -> Iterator[str]:
    state = summary["state"]
    yield (
        f"{summary['recipe']}: {state}, round {summary['round']} of {summary['rounds_planned']}, "
        f"{summary['stage']} done, {console.duration(summary['seconds'])} in all"
    )
    if summary.get("product"):
        yield f"product: {summary['product']} (recap export {state} OUT makes it loadable)"
    if summary.get("next"):
        yield f"next: recap {summary['next']} {state}, or recap run --state {state} for all that is left"
