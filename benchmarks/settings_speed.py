"""What each memory setting costs in time: a RECAP step with it beside the same step without, on the CPU.

    python benchmarks/settings_speed.py

AdamW, fp32 unless it says otherwise, random weights; the sides of a pair take turns. A CPU is not a GPU: bf16 and int8 save
bandwidth there, and here they are emulated in part, so those ratios say what a CPU user pays and nothing about a GPU.
"""

import gc
from statistics import median
from typing import Any

import torch
from memory import CASES
from record import cpu_seconds, parser, ratio, table, write

from recap_cli.memory import measure, predict
from recap_cli.memory.fake_step import Step, take_step
from recap_cli.recipe import recipe as recipes

CASE_SIZES = (("ViT-base", 4), ("BERT-base", 4))
SETTINGS: dict[str, dict[str, Any]] = {
    "fused backward": {"finetune.fused_backward": True},
    "checkpoints": {"finetune.checkpointing": True},
    "micro-batches of 1": {"finetune.micro_batch_size": 1},
    "masters and moments offloaded": {"finetune.offload": True},
    "bf16 residents": {"finetune.weights": "bf16"},
    "int8 for frozen matrices": {"finetune.weights": "int8"},
}


def seconds(step: Step) -> float:
    """CPU seconds of one step."""
    started = cpu_seconds()
    take_step(step)
    return cpu_seconds() - started


def main() -> None:
    command = parser(__doc__, "settings_speed")
    command.add_argument("--pairs", type=int, default=5)
    args = command.parse_args()
    torch.set_num_threads(2)
    results, rows = [], []
    for name, batch in CASE_SIZES:
        model, plain = CASES[name].of_recipe(), CASES[name].settings(batch_size=batch, optimizer="adamw")
        for saving, changes in SETTINGS.items():
            sides = {
                side: predict.prepare(model, recipe, "recap", measure.random_tensors)[0]
                for side, recipe in (("with", recipes.changed(plain, changes)), ("without", plain))
            }
            times: dict[str, list[float]] = {"with": [], "without": []}
            for round_plan in range(args.pairs + 1):  # the first warms up
                for side in list(sides)[:: 1 if round_plan % 2 else -1]:
                    taken = seconds(sides[side])
                    if round_plan:
                        times[side].append(taken)
            slower = ratio(times["with"], times["without"])
            results.append({"model": name, "batch": batch, "saving": saving, "ratio": slower, "cpu_seconds": times})
            rows.append([name, batch, saving, median(times["without"]), median(times["with"]), f"{slower:.2f}×"])
            del sides
            gc.collect()
    print(table(["model", "batch", "saving", "without, CPU s", "with, CPU s", "with ÷ without"], rows))
    write(args.out, "settings_speed", {"pairs": args.pairs, "results": results}, how="measured: CPU seconds, paired")


if __name__ == "__main__":
    main()
