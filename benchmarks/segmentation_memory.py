"""Predicted memory of Mask2Former with Swin-base and Swin-large at batch 1 with SGD, beside the paper's Table 2.

    python benchmarks/segmentation_memory.py
    python benchmarks/segmentation_memory.py --models base --sides 512

    python benchmarks/segmentation_memory.py --step base 512 recap

The paper states no crop. `--sides` are squares of so many pixels; 0 stands for the largest at which full finetuning with a
fused backward (fp32, SGD) holds no more than the paper's. `plain` is that; `full` samples again in its backward, as RECAP does.
Every figure is one training step on tensors without memory, with CUDA's kernels (`recap profile-memory`), from the
configuration alone: random weights, the 19 classes of Cityscapes all in the image. Nothing here ran on a GPU, which would add
cuBLAS's workspace and the allocator's fragmentation. `--step` takes a real step on this CPU, with random weights, and compares
the growth of the process's resident set with the prediction for CPU kernels. It does so with glibc's threshold for blocks of
their own at 64 KiB: what is freed goes back to the system at once, as a GPU's allocator would have it for the next tensor.
"""

import json
import os
import sys
import time
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from record import forget_peak, parser, status_bytes, table, write

from recap_cli.memory import measure, meta_model, predict
from recap_cli.memory.fake_step import take_step
from recap_cli.memory.meta_model import MetaModel
from recap_cli.memory.predict import Prediction
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.trainable import build

LABELS = [f"class {i}" for i in range(19)]
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SWIN: dict[str, dict[str, Any]] = {  # as facebook/mask2former-swin-{base,large}-IN21k-* have it
    "base": {"embed_dim": 128, "num_heads": [4, 8, 16, 32]},
    "large": {"embed_dim": 192, "num_heads": [6, 12, 24, 48]},
}
PAPER = {  # MB
    "base": {"full": 3924, "head": 1648, "lora": 1815, "pre-ft": 3079, "recap": 2577},
    "large": {"full": 6092, "head": 2324, "lora": 2640, "pre-ft": 4712, "recap": 3647},
}
QUERIES = {"base": 100, "large": 200}
LEAN = {"finetune.fused_backward": True}
BF16 = {**LEAN, "finetune.weights": "bf16", "finetune.checkpointing": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": LEAN,
    "bf16, checkpoints": BF16,
    "fp32, checkpoints": {**LEAN, "finetune.checkpointing": True},
    "fp32, attention again": {**LEAN, "finetune.checkpointing": "attention"},
    "bf16, checkpoints, offloaded": {**BF16, "finetune.offload": True},
}
METHODS = ("plain", "full", "head", "lora", "pre-ft", "recap", "recap-lora")
RIVALS = ("full", "lora", "recap", "recap-lora")  # of the last three settings
MB = 1e6
MALLOC = "MALLOC_MMAP_THRESHOLD_"
HOW = "predicted; the real steps measured"


def recipe_of(size: str, side: int, **settings: Any) -> Recipe:
    """The recipe of the paper's row at batch 1, with images of a side in pixels."""
    swin = {"model_type": "swin", "depths": [2, 2, 18, 2], "window_size": 12, "out_features": STAGES, **SWIN[size]}
    config = {"model_type": "mask2former", "num_queries": QUERIES[size], "backbone_config": swin}
    given = {"model.config": config, "model.name": None, "data.image_size": side, "finetune.batch_size": 1}
    given |= {"finetune.micro_batch_size": None, "evaluate.batch_size": 1, "finetune.optimizer": "sgd", **settings}
    return recipes.read(f"mask2former_swin_{size}_cityscapes", [f"{key}={json.dumps(value)}" for key, value in given.items()])


def model_of(size: str, side: int) -> MetaModel:
    return meta_model.of_recipe(recipe_of(size, side), LABELS)


def cell(size: str, side: int, method: str, settings: str) -> dict[str, Any]:
    """The prediction of a method, by kind. `plain` is full finetuning with all that torch and transformers keep."""
    started = time.perf_counter()
    with patch.object(build, "recompute_samples", lambda _: None) if method == "plain" else nullcontext():
        name = "full" if method == "plain" else method
        found = predict.predict(model_of(size, side), recipe_of(size, side, **SETTINGS[settings]), name)
    return {
        "model": size,
        "side": side,
        "method": method,
        "settings": settings,
        **figures(found),
        "seconds": time.perf_counter() - started,
    }


def figures(found: Prediction) -> dict[str, Any]:
    keys = ("training_peak_bytes", "sum_of_maxima_bytes", "trainable_parameters", "held_parameters", "total_parameters")
    values = found.to_json()
    return {**{key: values[key] for key in keys}, "maxima": found.usage.maxima, "at_peak": values["at_peak"]}


def real_step(size: str, side: int, method: str) -> dict[str, Any]:
    """The growth of this process's resident set over a real step on the CPU, beside the prediction for the CPU's kernels."""
    recipe, model = recipe_of(size, side, **LEAN), model_of(size, side)
    expected = predict.predict(model, recipe, method, kernels="cpu").usage
    before = status_bytes("VmRSS")
    forget_peak()
    torch.manual_seed(0)
    step, _ = predict.prepare(model, recipe, method, measure.random_tensors)
    measure.show_all_classes(step, len(LABELS))
    started = time.perf_counter()
    take_step(step)
    grown = status_bytes("VmHWM") - before
    row = {"model": size, "side": side, "method": method, "predicted_bytes": expected.peak_bytes, "resident_bytes": grown}
    return {**row, "share": grown / expected.peak_bytes, "seconds": time.perf_counter() - started}


def crop_of(size: str) -> int:
    """The largest side, a multiple of 32, at which lean full finetuning holds no more than the paper's."""
    low, high = 2, 40  # times 32 pixels
    while high - low > 1:
        middle = (low + high) // 2
        held = cell(size, 32 * middle, "plain", "fp32")["training_peak_bytes"]
        low, high = (middle, high) if held <= PAPER[size]["full"] * MB else (low, middle)
    return 32 * low


def main() -> None:
    command = parser(__doc__, "segmentation_memory")
    command.add_argument("--models", default="base,large")
    command.add_argument("--sides", default="0,512,1024")
    command.add_argument("--step", nargs=3, metavar=("MODEL", "SIDE", "METHOD"), help="a real step, and nothing else")
    args = command.parse_args()
    before = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    if args.step and MALLOC not in os.environ:  # read when a process begins
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, MALLOC: "65536"})
    if args.step:
        size, side, method = args.step
        steps = [one for one in before.get("steps", []) if [one["model"], str(one["side"]), one["method"]] != args.step]
        steps.append(real_step(size, int(side), method))
        print(json.dumps(steps[-1]))
        known = {key: before[key] for key in ("paper_mb", "crops", "cells") if key in before}
        write(args.out, "segmentation_memory", {**known, "steps": steps}, how=HOW)
        return
    kept = {"steps": before["steps"]} if "steps" in before else {}
    cells: list[dict[str, Any]] = []
    crops: dict[str, int] = {}
    for size in args.models.split(","):
        for given in map(int, args.sides.split(",")):
            side = given or crops.setdefault(size, crop_of(size))
            for settings in SETTINGS:
                for method in METHODS if settings in list(SETTINGS)[:2] else RIVALS:
                    cells.append(cell(size, side, method, settings))
                    print(size, side, settings, method, round(cells[-1]["training_peak_bytes"] / MB), flush=True)
                    write(args.out, "segmentation_memory", {"paper_mb": PAPER, "crops": crops, "cells": cells, **kept}, how=HOW)
    full = {(c["model"], c["side"], c["settings"]): c["training_peak_bytes"] for c in cells if c["method"] == "plain"}
    rows = []
    for c in cells:
        share = c["training_peak_bytes"] / full[c["model"], c["side"], "fp32"]
        named = [c["model"], c["side"], c["settings"], c["method"]]
        rows.append([*named, f"{c['training_peak_bytes'] / MB:.0f}", f"{100 * share:.0f} %"])
    print(table(["model", "side", "settings", "method", "MB", "of full"], rows))


if __name__ == "__main__":
    main()
