"""Semantic segmentation on CamVid: a DPT on the pretrained ViT-tiny, and a small Mask2Former with Swin from random weights.

    python benchmarks/segmentation.py --model dpt --cases full-ft,lora-ft,pre-ft:0.333,post-ft:0.333,recap:0.333,recap:0.5
    python benchmarks/segmentation.py --model mask2former --cases full-ft,recap:0.333 --seeds 0,1

A case is a method, with its prune ratio where it prunes, `+RULE` for another `prune.rank_by`, and `@RATE` for another learning
rate than the table's. All take the same number of optimizer steps, after the same warm-up of the head. The round is chosen by
the 101 validation images; the 233 test images, which nothing was chosen by, give the figures. Classes are the eleven of
Badrinarayanan et al. (2015), at 360 × 480 pixels, from images that the model sees as squares of `SIDE`.

Goes on where it stopped, below `--work`. Wants the data folder (RECAP_SHARED).
"""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from quality import shared
from record import cpu_seconds, parser, write
from safetensors.torch import load_file, save_file

from recap_cli.core.axes import counts
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.scoring import OtherData, best_tensors, read_others
from recap_cli.stages.run import run
from recap_cli.training.evaluation import Pass, evaluate

SIDE = {"dpt": 160, "mask2former": 128}
RATES = {  # of AdamW
    "dpt": {"full-ft": 2e-4, "lora-ft": 2e-3, "pre-ft": 5e-4, "post-ft": 5e-4, "recap": 5e-4},
    "mask2former": {"full-ft": 5e-4, "lora-ft": 2e-3, "pre-ft": 5e-4, "post-ft": 5e-4, "recap": 5e-4},
}
ROUNDS, EPOCHS, BATCH = 4, 2, 8
SWIN = {
    **{"model_type": "swin", "image_size": 128, "patch_size": 4, "embed_dim": 48, "depths": [2, 2, 2, 2]},
    **{"num_heads": [2, 4, 8, 16], "window_size": 4, "drop_path_rate": 0.0},
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
MASK2FORMER = {
    **{"model_type": "mask2former", "feature_size": 96, "mask_feature_size": 96, "hidden_dim": 96, "num_attention_heads": 4},
    **{"encoder_layers": 2, "encoder_feedforward_dim": 256, "decoder_layers": 4, "dim_feedforward": 512},
    **{"num_queries": 24, "train_num_points": 2048, "backbone_config": SWIN},
}
DPT = {
    **{"model_type": "dpt", "backbone_out_indices": [2, 5, 8, 11], "neck_hidden_sizes": [24, 48, 96, 192]},
    **{"fusion_hidden_size": 48, "use_auxiliary_head": False, "semantic_classifier_dropout": 0.1},
}
SAME = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
    "num_channels",
)
SAME += ("hidden_act", "layer_norm_eps", "qkv_bias")


def encoder(work: Path) -> Path:
    """A folder with ViT-tiny's encoder under the names that DPT has for it; neck and head are left out, and so are new."""
    source, folder = shared() / "vit_tiny_patch16_224", work / "dpt-vit-tiny"
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    vit = json.loads((source / "config.json").read_text(encoding="utf-8"))
    values = {**DPT, **{key: vit[key] for key in SAME if key in vit}, "architectures": ["DPTForSemanticSegmentation"]}
    weights = {name: tensor for name, tensor in load_file(source / "model.safetensors").items() if name.startswith("vit.")}
    renamed = {f"dpt.{name.removeprefix('vit.')}": tensor.contiguous() for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    (folder / "preprocessor_config.json").write_bytes((source / "preprocessor_config.json").read_bytes())
    return folder


def recipe_of(model: str, case: str, seed: int, work: Path, epochs: int = EPOCHS) -> Recipe:
    """The recipe of a case."""
    name, _, rate = case.partition("@")
    name, _, rule = name.partition("+")
    method, _, ratio = name.partition(":")
    data = shared() / "camvid"
    values: dict[str, Any] = {
        "name": f"camvid_{model}",
        "seed": seed,
        "method": method,
        "rounds": ROUNDS,
        "model": {"name": str(encoder(work))} if model == "dpt" else {"config": MASK2FORMER},
        "task": {"kind": "semantic-segmentation"},
        "data": {
            **{"train": str(data / "train.parquet"), "validation": str(data / "validation.parquet"), "image": "image"},
            **{"label_map": "label", "classes": str(data / "classes.json"), "ignore_index": 11, "image_size": SIDE[model]},
            "augment": "flip",
        },
        "head": {"warmup_epochs": 1, "batch_size": BATCH},
        "importance": {"batches": 10, "batch_size": BATCH},
        "mask": {"ratio": 0.5},
        "finetune": {"epochs": epochs, "batch_size": BATCH, "lr": float(rate or RATES[model][method]), "fused_backward": True},
        "evaluate": {"batch_size": 16},
    }
    if ratio:
        values["prune"] = {"ratio": float(ratio), **({"rank_by": rule} if rule else {})}
    return recipes.parse(yaml.safe_dump(values), values["name"])


def cell(model: str, case: str, seed: int, work: Path, epochs: int) -> dict[str, Any]:
    """The figures of a case: what its product has on the validation and on the test images, its time and memory."""
    started = cpu_seconds()
    recipe = recipe_of(model, case, seed, work, epochs)
    state = run(recipe, work / f"{model}-{epochs}-{case.replace(':', '-').replace('@', '-')}-{seed}")
    context = Context(state)
    rounds = [entry for entry in state.manifest.history if entry["stage"] == "finetune"]
    tensors, sizes, best = best_tensors(context)
    product = context.model(tensors, sizes).eval()
    test = read_others(context, OtherData(shared() / "camvid/test.parquet", None), lambda _: None, lambda steps, *_: steps)
    found = evaluate(forward_of(context.spec, product), test.split, context.objective, Pass(16))
    batch = test.split.batch(torch.arange(1))
    chosen = f"round-{best['round']:03d}"
    return {
        "case": case,
        "seed": seed,
        "epochs": epochs * ROUNDS,
        "steps": sum(entry["steps"] for entry in rounds),
        "per_round": [entry["miou"] for entry in rounds],
        "round": best["round"],
        "validation": context.metrics(chosen),
        "test": found,
        "warmed_up": (state.manifest.made.get("warmed_up") or {}).get("miou"),
        "parameters": sum(param.numel() for param in product.parameters()),
        "kept": sum(counts(context.plan(best["folder"])).values()),
        "memory": context.memory(chosen),
        "milliseconds": latency(forward_of(context.spec, product), batch),
        "cpu_seconds": cpu_seconds() - started,
    }


def latency(forward: Any, batch: dict[str, Any]) -> float:
    """The median time of one image in milliseconds, of ten runs after three."""
    import time

    seconds = []
    with torch.inference_mode():
        for _ in range(13):
            started = time.perf_counter()
            forward(batch)
            seconds.append(time.perf_counter() - started)
    return 1000 * sorted(seconds[3:])[5]


def main() -> None:
    command = parser(__doc__, "segmentation_MODEL")
    command.add_argument("--model", choices=SIDE, required=True)
    command.add_argument("--cases", required=True)
    command.add_argument("--seeds", default="0")
    command.add_argument("--epochs", type=int, default=EPOCHS, help="of each of the rounds")
    command.add_argument("--work", type=Path, default=Path("runs/segmentation"), help="where the states are")
    args = command.parse_args()
    out = Path(str(args.out).replace("MODEL", args.model))
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"cells": []}
    cells = {(one["case"], one["seed"], one["epochs"]): one for one in before["cells"]}
    for seed in map(int, args.seeds.split(",")):
        for case in args.cases.split(","):
            if (case, seed, args.epochs * ROUNDS) not in cells:
                found = cell(args.model, case, seed, args.work, args.epochs)
                cells[case, seed, args.epochs * ROUNDS] = found
                print(case, seed, found["per_round"], found["test"]["miou"], found["cpu_seconds"], flush=True)
                figures = {"side": SIDE[args.model], "rounds": ROUNDS, "batch": BATCH, "cells": [*cells.values()]}
                write(out, f"segmentation_{args.model}", figures, how="measured")


if __name__ == "__main__":
    main()
