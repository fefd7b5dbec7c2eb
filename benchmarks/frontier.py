"""Accuracy of products beside what they cost: latency, parameters, and what finetuning held; one table and one picture.

    python benchmarks/frontier.py --task cifar100 --point "full finetuning=runs/quality/cifar100-full-ft@0.4/cells/*"

A point is a name and finished states of one setting, a seed each, as `quality.py` and `healing.py` leave them. Scored are
examples that nothing was chosen by (`held_out.py`). Latency is that of a forward of 1 and of 32 examples on one thread, by
models that take turns, relative to the full model. Held is weights, gradients and optimizer state, the most of all rounds, as a
share of full finetuning's. A name that ends in `*` is drawn as RECAP. `--plot` draws what is in the JSON, without any state.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import distillation
import held_out
import quality
import torch
from record import parser, table, write

from recap_cli.data.sampling import sample
from recap_cli.memory.picture import FILE, Picture, picture, save
from recap_cli.memory.plot_parts import numbers, y_label
from recap_cli.memory.plot_style import INK, METHODS, SOFT
from recap_cli.progress import silent
from recap_cli.rounds.latency import forward_seconds
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.scoring import best_tensors
from recap_cli.rounds.status import finished
from recap_cli.state.store import State

BATCHES = (1, 32)


def point(task: str, name: str, states: Sequence[Path]) -> dict[str, Any]:
    """The figures of one setting: accuracy over its seeds, what is held the most of them, sizes and times of the first."""
    contexts = sorted((Context(State.open(path)) for path in states), key=lambda context: context.recipe.seed)
    if stopped := [context.state.path for context in contexts if not finished(context.recipe, context.state.manifest)]:
        raise SystemExit(f"{name}: {stopped[0]} is not finished")
    scores = [distillation.scored(context, task, held_out.split_of(context, task)) for context in contexts]
    first, metric = contexts[0], contexts[0].recipe.metric
    return {
        "name": name,
        "seeds": [context.recipe.seed for context in contexts],
        "validation": [(context.state.manifest.best or {})["value"] for context in contexts],
        "held_out": [score["held_out"] for score in scores],
        "parameters": int(scores[0]["parameters"]),
        "held_share": max(share for context in contexts for share in _held_shares(context)),
        "steps": sum(entry["steps"] for entry in first.state.manifest.history if entry["stage"] == "finetune"),
        "metric": metric.name,
        "latency": {str(batch): _latency(first, batch) for batch in BATCHES},
    }


def _held_shares(context: Context) -> Iterator[float]:
    for entry in context.state.manifest.history:
        if entry["stage"] == "finetune":
            held = sum(entry[key] for key in ("weights_bytes", "gradients_bytes", "optimizer_bytes"))
            yield held / sum(entry["full_finetuning"].values())


def _latency(context: Context, size: int) -> dict[str, float]:
    """Milliseconds of the product's forward and of the full model's, which take turns."""
    tensors, sizes, _ = best_tensors(context)
    models = [context.model(context.full_tensors()).eval(), context.model(tensors, sizes).eval()]
    _, validation = context.splits(silent)
    batch = validation.batch(sample(len(validation), size, seed=0, round=0, stage="latency"))
    full, product = forward_seconds(context.spec, models, batch, torch.device("cpu"))
    return {"full_ms": 1e3 * full, "product_ms": 1e3 * product, "ratio": product / full}


def mean(values: Sequence[float]) -> str:
    """A mean in per cent, with its standard error where there are several."""
    error = f" ± {100 * stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{error}"


def rows(points: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for one in points:
        yield [
            one["name"].removesuffix("*"),
            str(len(one["seeds"])),
            mean(one["held_out"]),
            f"{one['parameters'] / 1e6:.2f}",
            *(f"{one['latency'][str(batch)]['ratio']:.2f}" for batch in BATCHES),
            f"{one['held_share']:.0%}",
        ]


HEADER = ["setting", "seeds", "held out", "parameters, M", "latency, batch 1", "batch 32", "held"]


def drawn(points: Sequence[dict[str, Any]]) -> Picture:
    """The metric against the latency of the product, and against what finetuning held."""
    with picture(FILE, 3.6) as found:
        left, right = found.figure.subplots(1, 2, sharey=True)
        for axes, cost, label in (
            (left, lambda one: one["latency"]["32"]["ratio"], "latency of 32 examples, of the full model's (%)"),
            (right, lambda one: one["held_share"], "held while finetuning, of full finetuning's (%)"),
        ):
            places = [(100 * cost(one), 100 * fmean(one["held_out"])) for one in points]
            for one, (x, y) in zip(points, places, strict=True):
                ours = one["name"].endswith("*")
                look = METHODS["recap"] if ours else METHODS["full-ft"]
                axes.plot(x, y, look.marker, color=look.colour if ours else SOFT, markersize=6)
                crowded = any(0 < up - y < 2.5 and abs(across - x) < 12 for across, up in places)  # a label above is in the way
                text = {"textcoords": "offset points", "ha": "center", "va": "top" if crowded else "bottom", "fontsize": 7.5}
                axes.annotate(one["name"].removesuffix("*"), (x, y), (0, -6 if crowded else 5), color=INK, **text)
            numbers(axes.xaxis, label)
            axes.margins(x=0.34, y=0.14)
        numbers(left.yaxis, "")
        y_label(found, left, f"{points[0]['metric']} on held-out data (%)")
    return found


def main() -> None:
    command = parser(__doc__, "frontier_TASK")
    command.add_argument("--task", choices=held_out.SOURCES, required=True)
    command.add_argument("--point", action="append", default=[], metavar="NAME=STATES", help="may be given again")
    command.add_argument("--plot", type=Path, help="draw what the JSON has, too")
    args = command.parse_args()
    out = Path(str(args.out).replace("TASK", args.task))
    before = json.loads(out.read_text(encoding="utf-8"))["points"] if out.exists() else []
    points = {one["name"]: one for one in before}
    for given in args.point:
        name, _, pattern = given.partition("=")
        found = sorted(Path().glob(pattern)) if not pattern.startswith("/") else sorted(Path("/").glob(pattern[1:]))
        if not found:
            raise SystemExit(f"{name}: there is no state at {pattern}")
        points[name] = point(args.task, name, found)
        figures = {"metric": quality.TASKS[args.task]["task"]["metric"], "held_out": held_out.SOURCES[args.task]}
        write(out, f"frontier_{args.task}", {**figures, "points": [*points.values()]}, how="measured")
    print(table(HEADER, [*rows([*points.values()])]))
    if args.plot is not None:
        save(drawn([*points.values()]), args.plot)


if __name__ == "__main__":
    main()
