"""Time of a finetuning step of the small model (r_p = 50 %) against one of plain full finetuning of the full model.

ViT-base at 224 pixels and BERT-base at 128 tokens, random weights, fp32, AdamW, the training loop of `recap finetune`.
r_f is 87.5 % for the image model and 50 % for the text model; embeddings do not move in the small model, everything
does in the full one. Groups are chosen by random scores, which scatters the rows and columns that move as much as can
be. The steps of the two alternate in one process; the figure is the median of the pairs' ratios of CPU seconds.
"""

import copy
import time
from statistics import median
from typing import Any, NamedTuple

import torch
from record import parser, ratio, table, write
from torch import Tensor, nn

from recap_cli.core.adapter import Adapter, find_axes, matches, resize
from recap_cli.core.axes import UnitMask, chosen_params, counts, mask_axes, prunable_params, shapes_of, shrink, unit_params
from recap_cli.core.ranking import Limits, select
from recap_cli.core.surgery import cut_model, indices
from recap_cli.plugins.adapters.bert import BERT
from recap_cli.plugins.adapters.vit import VIT
from recap_cli.plugins.tasks.classification import TEXT_CLASSIFICATION
from recap_cli.trainable.build import make_partial
from recap_cli.trainable.neuron_order import bring_forward
from recap_cli.trainable.optim import Optimizer, adamw
from recap_cli.training.loop import Steps, train

PRUNED = 0.5
BAR = 1.6


class Case(NamedTuple):
    """A model with random weights, its adapter, a batch, and the share of the small model that does not move (r_f)."""

    model: nn.Module
    adapter: Adapter
    batch: dict[str, Tensor]
    frozen: float


class Side(NamedTuple):
    """One of the two that are compared."""

    model: nn.Module
    optimizer: Optimizer

    def step(self, batch: dict[str, Tensor]) -> float:
        """CPU seconds of one step of the training loop."""

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            logits: Tensor = self.model(**{name: x for name, x in inputs.items() if name != "labels"}).logits
            return logits

        started = time.process_time()
        train(forward, TEXT_CLASSIFICATION, self.optimizer, [batch], steps=Steps(rate=lambda _: 1e-5))
        return time.process_time() - started


def vit(batch: int) -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(num_labels=100))
    return Case(model, VIT, {"pixel_values": torch.randn(batch, 3, 224, 224), "labels": torch.randint(100, (batch,))}, 0.875)


def bert(batch: int) -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig())
    tokens = {
        "input_ids": torch.randint(1000, 30000, (batch, 128)),
        "attention_mask": torch.ones(batch, 128, dtype=torch.int64),
    }
    return Case(model, BERT, {**tokens, "labels": torch.randint(2, (batch,))}, 0.5)


def random_choice(axes: list[Any], shapes: dict[str, Any], keep: float, least: int) -> UnitMask:
    """A share of the prunable parameters, chosen by random scores within each kind."""
    sizes = {axis.name: axis.size for axis in axes}
    units = {axis.name: unit_params(axis, shapes) for axis in axes}
    return select(
        axes, {n: torch.rand(s) for n, s in sizes.items()}, units, limits=Limits(least=least), original=sizes, keep_share=keep
    )


def full_side(case: Case) -> Side:
    """Everything is trainable."""
    model = copy.deepcopy(case.model)
    return Side(model.train(), Optimizer(make_partial(model, {}, frozen=lambda _: False), adamw(betas=(0.9, 0.999), eps=1e-8)))


def small_side(case: Case) -> tuple[Side, dict[str, float]]:
    """The pruned model, of which only what the mask chooses is trainable, as `prune`, `mask` and `finetune` make it."""
    model, axes = case.model, find_axes(case.adapter, case.model)
    shapes = shapes_of(model.named_parameters())
    plan = random_choice(axes, shapes, 1 - PRUNED, least=1)
    cut_model(model, indices(axes, plan, shapes))
    resize(case.adapter, model, counts(plan))
    small = shapes_of(model.named_parameters())
    fine = mask_axes(shrink(axes, plan))
    mask = random_choice(fine, small, 1 - case.frozen, least=0)
    index_map = bring_forward(model, fine, mask, indices(fine, mask, small))
    trainables = make_partial(model, index_map, frozen=lambda name: matches(name, case.adapter.embeddings))
    kept = chosen_params(axes, shapes, plan) / prunable_params(axes, shapes)
    trains = chosen_params(fine, small, mask) / prunable_params(fine, small)
    return Side(model.train(), Optimizer(trainables, adamw(betas=(0.9, 0.999), eps=1e-8))), {
        "kept_share": kept,
        "moving_share": trains,
    }


def main() -> None:
    args_parser = parser(__doc__, "step_speed")
    args_parser.add_argument("--pairs", type=int, default=7)
    args = args_parser.parse_args()
    torch.set_num_threads(2)
    results, rows = [], []
    for name, build, size in (("ViT-base, 224 px", vit, 4), ("BERT-base, 128 tokens", bert, 8)):
        torch.manual_seed(0)
        case = build(size)
        full = full_side(case)
        small, shares = small_side(case)
        times: dict[str, list[float]] = {"full": [], "small": []}
        for round_plan in range(args.pairs + 1):  # the first warms up
            pair = [("full", full), ("small", small)][:: 1 if round_plan % 2 else -1]
            for side, it in pair:
                taken = it.step(case.batch)
                if round_plan:
                    times[side].append(taken)
        speedup = ratio(times["full"], times["small"])
        results.append(
            {
                "model": name,
                "batch": size,
                "r_p": PRUNED,
                "r_f": case.frozen,
                **shares,
                "speedup": speedup,
                "cpu_seconds": times,
            }
        )
        rows.append([name, size, f"{case.frozen:.1%}", median(times["full"]), median(times["small"]), f"{speedup:.2f}×"])
    print(table(["model", "batch", "r_f", "full, CPU s", "small, CPU s", "full ÷ small"], rows))
    write(args.out, "step_speed", {"bar": BAR, "pairs": args.pairs, "results": results}, how="measured: CPU seconds, paired")


if __name__ == "__main__":
    main()
