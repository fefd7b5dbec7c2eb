"""How groups of different size should compete: the rules of `prune.rank_by` on a model whose stages differ in width.

A small Swin (three stages of 32, 64 and 128 channels) is trained from scratch on a part of CIFAR-100. It is pruned by each
rule, in four gradual steps by eq. (1), at each ratio. Its accuracy is measured right after the cut, and after all that is left
was finetuned on half of the training images. A seed is another D_s and another order of the examples; all rules of a seed start
from the same model and see the same examples.

    RECAP_SHARED=DIR python benchmarks/ranking.py --work DIR
"""

import argparse
import copy
import json
import os
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch
import torch.nn.functional as F
from record import cpu_seconds, parser, table, write
from torch import Tensor, nn

from recap_cli.core import gradual
from recap_cli.core.adapter import find_axes, resize
from recap_cli.core.axes import Axis, UnitMask, kept_per_layer, prunable_params, shapes_of
from recap_cli.core.importance import Scores, group_scores
from recap_cli.core.ranking import Limits, RankBy
from recap_cli.plugins.adapters.swin import SWIN
from recap_cli.plugins.criteria.taylor import TAYLOR

ROOT = Path(__file__).parents[1]
CIFAR100 = Path(os.environ.get("RECAP_SHARED", ROOT.parent / "shared")) / "data" / "cifar100"
RULES: tuple[RankBy, ...] = get_args(RankBy)
RATIOS = (1 / 3, 0.5, 0.7)
CLASSES, BATCH, RATE = 10, 64, 1e-3
SIZES: dict[str, Any] = {
    **{"image_size": 32, "patch_size": 4, "window_size": 2, "embed_dim": 32, "depths": [2, 2, 2], "num_heads": [4, 8, 16]},
    **{"drop_path_rate": 0.0, "num_labels": CLASSES},
}
Examples = tuple[Tensor, Tensor]  # images (count, 3, 32, 32), labels (count,)


def read(folder: Path, split: str) -> Examples:
    """The images of the first `CLASSES` classes of CIFAR-100, normalized."""
    from datasets import Image, load_dataset

    data = load_dataset("parquet", data_files={split: str(folder / f"{split}.parquet")}, split=split)
    label = next(name for name in ("fine_label", "label") if name in data.column_names)
    image = next(name for name in ("image", "img") if name in data.column_names)
    data = data.filter(lambda value: value < CLASSES, input_columns=label).cast_column(image, Image()).with_format("torch")
    images = torch.stack([row[image] for row in data]).float().div_(255)  # (count, 3, 32, 32)
    return (images - 0.5) / 0.25, torch.as_tensor(data[label][:])


def shifted(images: Tensor, random: torch.Generator) -> Tensor:
    """Each batch moved by up to four pixels, and mirrored or not, (batch, 3, 32, 32)."""
    down, right = (int(n) for n in torch.randint(-4, 5, (2,), generator=random))
    moved = torch.roll(images, (down, right), (2, 3))
    return moved.flip(3) if bool(torch.rand((), generator=random) < 0.5) else moved


def train(model: Any, data: Examples, epochs: int, rate: float, seed: int) -> None:
    """All weights, by AdamW with a linear decay after a warm-up of a twentieth."""
    images, labels = data
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / (0.05 * steps), 1 - s / steps))
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=random).split(BATCH)[: len(labels) // BATCH]:
            F.cross_entropy(model(shifted(images[chosen], random)).logits, labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: Any, data: Examples) -> float:
    parts = zip(data[0].split(250), data[1].split(250), strict=True)
    return sum(int((model(images).logits.argmax(1) == labels).sum()) for images, labels in parts) / len(data[1])


def trained(work: Path, data: Examples, epochs: int, seed: int) -> nn.Module:
    """The model of a seed, trained from scratch; kept in the folder `work` for the next call."""
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(seed)
    model: nn.Module = SwinForImageClassification(SwinConfig(**SIZES))
    file = work / f"swin-{seed}-{epochs}.pt"
    if not file.exists():
        train(model, data, epochs, RATE, seed)
        work.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def pruned(model: nn.Module, data: Examples, rule: RankBy, ratio: float, seed: int) -> tuple[list[Axis], UnitMask]:
    """Cut the model in place, as `recap prune` does by its defaults but for the rule; its axes, and the plan."""
    images, labels = data
    random = torch.Generator().manual_seed(seed)

    def score(small: Any, axes: Any, _: UnitMask) -> Scores:
        drawn = torch.randperm(len(labels), generator=random)[:320].split(32)

        def losses(each: bool) -> Iterator[tuple[Tensor, float]]:
            for chosen in drawn:
                yield F.cross_entropy(small(images[chosen]).logits, labels[chosen]), 1 / len(drawn)

        return group_scores(small, axes, TAYLOR, losses)

    axes = find_axes(SWIN, model)
    plan, _ = gradual.prune(
        model,
        axes,
        gradual.Step(score, lambda small, sizes: resize(SWIN, small, sizes)),
        keep_shares=gradual.shares_left(ratio, 4),
        limits=Limits(floor=0.15, rank_by=rule),
    )
    return axes, plan


def one_run(
    model: nn.Module, train_data: Examples, test_data: Examples, rule: RankBy, ratio: float, seed: int
) -> dict[str, Any]:
    small = copy.deepcopy(model)
    axes, plan = pruned(small, train_data, rule, ratio, seed)
    prunable = prunable_params(find_axes(SWIN, small), shapes_of(small.named_parameters()))
    cut = accuracy(small, test_data)
    half = len(train_data[1]) // 2
    train(small, (train_data[0][:half], train_data[1][:half]), 1, RATE / 2, seed)
    return {
        "rank_by": rule,
        "ratio": ratio,
        "seed": seed,
        "prunable_left": prunable,
        "after_cut": cut,
        "after_finetuning": accuracy(small, test_data),
        "kept": kept_per_layer(axes, {name: int(kept.sum()) for name, kept in plan.items()}),
    }


def summary(runs: list[dict[str, Any]]) -> str:
    """Means over models and seeds, in percent, and each figure."""
    rows = []
    for ratio in sorted({run["ratio"] for run in runs}):
        for rule in RULES:
            of = [run for run in runs if (run["rank_by"], run["ratio"]) == (rule, ratio)]
            if of:
                rows.append(
                    [f"{ratio:.0%}", rule, *(_percents([r[key] for r in of]) for key in ("after_cut", "after_finetuning"))]
                )
    return table(["ratio", "rank_by", "after the cut", "after finetuning"], rows)


def _percents(values: list[float]) -> str:
    return f"{100 * mean(values):.1f} ({', '.join(f'{100 * value:.1f}' for value in values)})"


def finished(out: Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that `out` has already, of the same models and data: a benchmark that was stopped goes on."""
    found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    return found["runs"] if all(found.get(key) == value for key, value in about.items()) else []


def main() -> None:
    made: argparse.ArgumentParser = parser(__doc__, "ranking")
    made.add_argument("--data", type=Path, default=CIFAR100, help="the folder of CIFAR-100: train.parquet and test.parquet")
    made.add_argument("--work", type=Path, required=True, help="where trained models are kept")
    made.add_argument("--epochs", type=int, default=16, help="of training from scratch")
    made.add_argument("--models", type=int, default=2, help="trained from scratch")
    made.add_argument("--seeds", type=int, default=2, help="of pruning and finetuning, for each model")
    args = made.parse_args()
    torch.set_num_threads(1)
    train_data, test_data = read(args.data, "train"), read(args.data, "test")
    about = {"sizes": SIZES, "train": len(train_data[1]), "test": len(test_data[1]), "epochs": args.epochs}
    runs = finished(args.out, about)
    known = {(run["model"], run["seed"], run["ratio"], run["rank_by"]) for run in runs}
    full = []
    for number in range(args.models):
        model = trained(args.work, train_data, args.epochs, number)
        full.append(accuracy(model, test_data))
        print(f"model {number}: {full[-1]:.3f} unpruned, {cpu_seconds():.0f} s", flush=True)
        for seed, ratio, rule in product(range(args.seeds), RATIOS, RULES):
            if (number, seed, ratio, rule) not in known:
                runs.append({"model": number, **one_run(model, train_data, test_data, rule, ratio, seed)})
                print(json.dumps(runs[-1]), flush=True)
                write(
                    args.out, "ranking", {**about, "unpruned": full, "runs": runs}, how="measured: accuracy on the test images"
                )
    print(summary(runs))


if __name__ == "__main__":
    main()
