"""Predicted peaks of RECAP beside LoRA and full finetuning at batch 32, where activations decide.

    python benchmarks/activations.py
    python benchmarks/activations.py --models vit-tiny --settings fp32

All with the default settings of their methods at r_p = 33 %: AdamW, LoRA of rank 8 on query and value. Every figure is one
training step on tensors without memory, with CUDA's kernels (`recap profile-memory`), from the configuration alone. Nothing
here ran on a GPU.
"""

import json
import time
from typing import Any

from record import parser, table, write

from recap_cli.memory import meta_model, predict
from recap_cli.memory.meta_model import MetaModel
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe

BATCH, PRUNE = 32, 0.333
VIT = {"model_type": "vit", "image_size": 96, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
MINILM = {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536, "vocab_size": 12000}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # a recipe, its model, and what else is set
    "vit-tiny": ("vit_base_cifar100", VIT, {"data.image_size": 96}),
    "minilm": ("bert_base_cola", MINILM, {"data.max_length": 40}),
    "electra-base": ("bert_base_cola", {"model_type": "electra", **{"hidden_size": 768, "embedding_size": 768}}, {}),
    "vit-base": ("vit_base_cifar100", {"model_type": "vit"}, {}),
    "bert-base": ("bert_base_cola", {"model_type": "bert"}, {}),
}
LABELS = {"vit_base_cifar100": 100, "bert_base_cola": 2}
MORE = {"electra-base": {"num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}}
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"finetune.weights": "bf16"},
    "fp32, attention again": {"finetune.checkpointing": "attention"},
    "bf16, attention again": {"finetune.weights": "bf16", "finetune.checkpointing": "attention"},
    "fp32, checkpoints": {"finetune.checkpointing": True},
    "bf16, checkpoints": {"finetune.weights": "bf16", "finetune.checkpointing": True},
}
CASES = {"full": ("full", 0.5), "lora": ("lora", 0.5), "recap 50 %": ("recap", 0.5), "recap 87.5 %": ("recap", 0.875)}
MB = 1e6


def recipe_of(name: str, mask: float, settings: dict[str, Any]) -> Recipe:
    """The recipe of a model's shape with a batch of 32."""
    recipe, config, more = MODELS[name]
    given = {
        **{"model.config": {**config, **MORE.get(name, {})}, "data.max_length": 128, **more, "prune.ratio": PRUNE},
        **{"mask.ratio": mask, "finetune.batch_size": BATCH, "finetune.micro_batch_size": None, "evaluate.batch_size": BATCH},
        **{"finetune.optimizer": "adamw", **settings},
    }
    if recipe.startswith("vit"):
        del given["data.max_length"]
    return recipes.read(recipe, [f"{key}={json.dumps(value)}" for key, value in given.items()])


def model_of(name: str) -> MetaModel:
    """The model without weights."""
    return meta_model.of_recipe(recipe_of(name, 0.5, {}), [f"label {i}" for i in range(LABELS[MODELS[name][0]])])


def main() -> None:
    command = parser(__doc__, "activations")
    command.add_argument("--models", default=",".join(MODELS))
    command.add_argument("--settings", default=";".join(SETTINGS), help="separated by semicolons")
    args = command.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.models.split(","):
        model = model_of(name)
        for settings in args.settings.split(";"):
            for case, (method, mask) in CASES.items():
                started = time.perf_counter()
                found = predict.predict(model, recipe_of(name, mask, SETTINGS[settings]), method)
                values = {"peak_bytes": found.usage.peak_bytes, "maxima": found.usage.maxima, "at_peak": found.usage.at_peak}
                seconds = time.perf_counter() - started
                rows.append({"model": name, "settings": settings, "case": case, **values, "seconds": seconds})
    peaks = {(row["model"], row["settings"], row["case"]): row["peak_bytes"] for row in rows}
    for row in rows:
        row["of_lora"] = row["peak_bytes"] / peaks[row["model"], row["settings"], "lora"]
    shown = {
        (model, settings): [
            f"{peaks[model, settings, case] / MB:.0f}" + (f" ({found:.2f})" if case.startswith("recap") else "")
            for case in CASES
            for found in [peaks[model, settings, case] / peaks[model, settings, "lora"]]
        ]
        for model, settings, _ in peaks
    }
    print(table(["model", "settings", *CASES], [[*key, *cells] for key, cells in shown.items()]))
    write(args.out, "activations", {"batch": BATCH, "prune_ratio": PRUNE, "cells": rows}, how="predicted")


if __name__ == "__main__":
    main()
