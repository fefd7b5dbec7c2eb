"""What the page of a state shows beside the plain values: its pictures, its sizes, and where the state stands, in words."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recap_cli.report import map_page, state_plots
from recap_cli.report.inline_svg import inline
from recap_cli.report.template import duration, utc

STAGES = ("prune", "mask", "finetune", "merge")
HELD = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
CAPTIONS = {"heads": "Attention heads", "neurons": "Neurons of the feed-forward layers"}
ONE_BY_ONE = 64  # units of a layer, of which no more are drawn as a square each
Row = Mapping[str, Any]


def view(found: Mapping[str, Any]) -> dict[str, Any]:
    """The names that `state.html` uses beside those of `found`."""
    rounds: Sequence[Row] = found["rounds"]
    tuned = [row for row in rounds if "value" in row]
    best = next((row for row in rounds if row["best"]), None)
    return {
        "notice": notice(found),
        "maps": map_page.view(found.get("maps")),
        "maps_note": found.get("maps_note"),
        "label_tables": map_page.tables(found["label_figures"], found["labels"], found.get("maps")),
        "best_row": best,
        "held": None if best is None else held(best),
        "held_full": None if best is None else held(best, "full_"),
        "device_peak": _device_peak(found["memory"].values()),
        **_figures(found, tuned),
        "kept": _kept(found["picture"]),
        "kept_by_round": _kept_by_round(rounds),
        "stages": STAGES,
        "rows": [{**row, "held": held(row), "held_full": held(row, "full_")} for row in rounds],
    }


def notice(found: Mapping[str, Any]) -> str | None:
    """What a reader must know of a run that is not over; None where it is."""
    if found["next"] is None:
        return None
    merged = found["round"] if found["stage"] in ("merge", "init") else found["round"] - 1
    sentences = []
    if merged == 0:
        sentences.append("No round is merged yet, so there is no product and no result.")
    if found["stage"] not in ("merge", "init"):
        sentences.append(f"Round {found['round']} is under way: {found['stage']} is done, {found['next']} comes next.")
    sentences.append(f"{merged} of {found['rounds_planned']} rounds are merged; what stands here is of {utc(found['as_of'])}.")
    return " ".join(sentences)


def held(row: Row, prefix: str = "") -> int | None:
    """Bytes of weights, gradients and optimizer state together, or None before finetuning."""
    parts = [row.get(f"{prefix}{name}") for name in HELD]
    return None if None in parts else sum(part for part in parts if part is not None)


def _device_peak(memory: Iterable[Mapping[str, Any]]) -> int | None:
    """The highest peak that the allocator of an accelerator has seen in a training, or None."""
    peaks: list[int] = [peak["allocated_bytes"] for found in memory if (peak := found.get("training_peak"))]
    return max(peaks, default=None)


def _figures(found: Mapping[str, Any], tuned: Sequence[Row]) -> dict[str, str | None]:
    """The figures over the rounds, as SVG for the page; None for what there are no values of yet."""
    rounds, metric = found["rounds"], found["metric"]
    visited = "share of the full model's prunable parameters visited by updates, and of those kept the share kept before"
    held_label = "memory held while finetuning, by round, against full finetuning"
    figures = {
        "metric": (state_plots.metric_by_round(tuned, metric) if tuned else None, f"{metric} after each round"),
        "loss": (state_plots.loss_by_step(found["looks"]), "training loss over the steps of all rounds"),
        "change": (state_plots.change_by_round(rounds), visited),
        "memory": (state_plots.memory_by_round(tuned) if tuned else None, held_label),
        "time": (state_plots.time_by_round(rounds, duration) if rounds else None, "time of each round, by stage"),
    }
    return {f"{name}_figure": inline(one, name, label) if one else None for name, (one, label) in figures.items()}


def _kept(picture: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The figures of one plan, a kind each with its caption: heads, and others that are few, one by one; neurons as bars."""
    if picture is None:
        return []
    drawn = []
    for at, (kind, layers) in enumerate(picture["kept"].items()):
        one_by_one = kind == "heads" or (kind != "neurons" and max(map(len, layers)) <= ONE_BY_ONE)
        draw = state_plots.kept_squares if one_by_one else state_plots.kept_bars
        label = f"{kind} kept in each layer in round {picture['round']}"
        drawn.append((CAPTIONS.get(kind, kind.capitalize()), inline(draw(layers), f"kept{at}", label)))
    return drawn


def _kept_by_round(rounds: Sequence[Row]) -> list[tuple[str, str]]:
    """The figures of all plans, a kind each with its caption, where there is more than one round to compare."""
    kinds = [kind for kind, layers in rounds[0]["kept"].items() if layers] if len(rounds) > 1 else []
    labels = [f"{kind} kept in each layer, by round" for kind in kinds]
    figures = [state_plots.kept_by_round(rounds, kind) for kind in kinds]
    return [(label, inline(one, f"rounds{at}", label)) for at, (label, one) in enumerate(zip(labels, figures, strict=True))]
