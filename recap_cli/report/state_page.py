"""What the page of a state shows beside the plain values: its pictures, its sizes, and where the state stands, in words."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recap_cli.report import charts
from recap_cli.report.charts import Point, Series
from recap_cli.report.template import duration, megabytes, metric, percent, utc

STAGES = ("prune", "mask", "finetune", "merge")
HELD = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
LABELS = {"weights_bytes": "weights", "gradients_bytes": "gradients", "optimizer_bytes": "optimizer state"}
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
        "best_row": best,
        "held": None if best is None else held(best),
        "held_full": None if best is None else held(best, "full_"),
        "last_row": tuned[-1] if tuned else None,
        "device_peak": _device_peak(found["memory"].values()),
        "metric_chart": _metric_chart(found, tuned) if tuned else None,
        "change_chart": _change_chart(rounds),
        "kept": _kept(found["picture"]),
        "shades": [charts.shades(rounds, kind, f"{kind} kept in each layer, by round") for kind in _alike(rounds)],
        "memory_chart": _memory_chart(tuned) if tuned else None,
        "time_chart": _time_chart(rounds) if rounds else None,
        "stages": STAGES,
        "stage_seconds": {stage: sum(row["seconds"].get(stage, 0.0) for row in rounds) for stage in STAGES},
        "rows": [{**row, "held": held(row), "held_full": held(row, "full_")} for row in rounds],
    }


def notice(found: Mapping[str, Any]) -> str | None:
    """What a reader must know of a run that is not over; None where it is."""
    if found["next"] is None:
        return None
    merged = found["round"] if found["stage"] in ("merge", "init") else found["round"] - 1
    said = []
    if merged == 0:
        said.append("No round is merged yet, so there is no product and no result.")
    if found["stage"] not in ("merge", "init"):
        said.append(f"Round {found['round']} is under way: {found['stage']} is done, {found['next']} comes next.")
    said.append(f"{merged} of {found['rounds_planned']} rounds are merged; what stands here is of {utc(found['as_of'])}.")
    return " ".join(said)


def held(row: Row, prefix: str = "") -> int | None:
    """Bytes of weights, gradients and optimizer state together, or None before finetuning."""
    parts = [row.get(f"{prefix}{name}") for name in HELD]
    return None if None in parts else sum(part for part in parts if part is not None)


def _device_peak(memory: Iterable[Mapping[str, Any]]) -> int | None:
    """The highest peak that the allocator of an accelerator has seen in a training, or None."""
    peaks: list[int] = [peak["allocated_bytes"] for found in memory if (peak := found.get("training_peak"))]
    return max(peaks, default=None)


def _metric_chart(found: Mapping[str, Any], tuned: Sequence[Row]) -> dict[str, Any]:
    points = [Point(row["round"], row["value"], f"round {row['round']}: {metric(row['value'])}") for row in tuned]
    series = [Series(found["metric"], "m-recap", "o", points)]
    if best := [Point(*point) for row, point in zip(tuned, points, strict=True) if row["best"]]:
        series.append(Series("the best, which is the product", "m-best", "s", best, None))
    return _by_round(series, f"{found['metric']} after each round", found["metric"], tuned, lambda value: f"{value:.4g}")


def _change_chart(rounds: Sequence[Row]) -> dict[str, Any] | None:
    looks = {
        "coverage": ("visited by updates so far", "m-lora", "s", "none"),
        "overlap": ("kept in the round before too", "m-pre", "D", "6 3"),
    }
    series = []
    for key, (label, css, shape, dash) in looks.items():
        known = [row for row in rounds if row[key] is not None]
        points = [Point(row["round"], row[key], f"round {row['round']}: {percent(row[key])} {label}") for row in known]
        series += [Series(label, css, shape, points, dash)] if points else []
    title = "share of the full model's prunable parameters visited by updates, and of those kept the share kept before"
    return _by_round(series, title, "share", rounds, lambda value: f"{value:.0%}", zero=True, top=1.0) if series else None


def _by_round(
    series: Sequence[Series], title: str, y_label: str, rows: Sequence[Row], y_text: charts.Label, **settings: Any
) -> dict[str, Any]:
    """A chart over the rounds there are."""
    marks = [row["round"] for row in rows]
    given: dict[str, Any] = {"title": title, "y_label": y_label, "x_text": "{:.0f}".format, "y_text": y_text, **settings}
    return charts.plane(series, x_label="round", x_marks=marks, **given)


def _kept(picture: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The pictures of one plan, a kind each with its caption: heads, and others that are few, one by one; neurons as bars."""
    if picture is None:
        return []
    drawn = []
    for kind, layers in picture["kept"].items():
        one_by_one = kind == "heads" or (kind != "neurons" and max(map(len, layers)) <= ONE_BY_ONE)
        draw, title = charts.heads if one_by_one else charts.levels, f"{kind} kept in each layer in round {picture['round']}"
        drawn.append({"chart": draw(layers, title), "one_by_one": one_by_one, "caption": CAPTIONS.get(kind, kind.capitalize())})
    return drawn


def _alike(rounds: Sequence[Row]) -> list[str]:
    """The kinds that there are, where there is more than one round to compare."""
    return [kind for kind, layers in rounds[0]["kept"].items() if layers] if len(rounds) > 1 else []


def _memory_chart(tuned: Sequence[Row]) -> dict[str, Any]:
    rows: list[tuple[str, Mapping[str, float | None], float | None]] = [
        (f"round {row['round']}", {LABELS[name]: row[name] for name in HELD}, None) for row in tuned
    ]
    full = tuned[-1]
    rows.append(("full finetuning", {LABELS[name]: full[f"full_{name}"] for name in HELD}, None))
    return charts.stacks(rows, megabytes, "memory held while finetuning, by round, against full finetuning", beside=84)


def _time_chart(rounds: Sequence[Row]) -> dict[str, Any]:
    rows = [(f"round {row['round']}", {stage: row["seconds"].get(stage) for stage in STAGES}, None) for row in rounds]
    return charts.stacks(rows, duration, "time of each round, by stage", beside=84)
