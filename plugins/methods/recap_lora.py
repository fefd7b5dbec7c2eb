"""RECAP with low-rank updates: K rounds of prune and finetune, each of which merges the adapters of some blocks (LoRA).

For budgets in which even a small share of trainable entries is too much. It prunes as RECAP does. In the place of a mask,
`blocks` says in which share of the blocks a round trains adapters. They are drawn anew in each round.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

import torch

from recap_cli.api import Axis, Method, RoundPlan, Settings, TrainContext, TrainerHook
from recap_cli.plugins.methods import lora, recap


def round_plans(settings: Settings) -> list[RoundPlan]:
    """Return the rounds of RECAP without a ramp, which trains adapters in each."""
    lora.check_options(settings.options)
    _share(settings.options["blocks"])
    return [
        replace(round_plan, trains="training", embeddings=False)
        for round_plan in recap.round_plans(replace(settings, mask_ratio=0.0, ramp=1.0))
    ]


def attach(context: TrainContext) -> TrainerHook:
    """Add adapters to a share `blocks` of the small model's blocks, drawn by torch's generator, as `lora.attach` does."""
    has_target = [axis for axis in context.axes if lora.targets(context.model, [axis], context.options["targets"])]
    return lora.attach(replace(context, axes=drawn(has_target, _share(context.options["blocks"]))))


def drawn(axes: Sequence[Axis], share: float) -> list[Axis]:
    """Return the axes of a share of the blocks, at least one; the heads and the neurons of a block stand together."""
    blocks = list(dict.fromkeys(axis.name.rpartition(".")[0] for axis in axes))
    count = max(1, ceil(share * len(blocks) - 1e-9))
    chosen = {blocks[place] for place in torch.randperm(len(blocks))[:count].tolist()}
    return [axis for axis in axes if axis.name.rpartition(".")[0] in chosen]


def _share(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"options.blocks: expected a number above 0, and at most 1; found {value!r}")
    return float(value)


RECAP_LORA = Method(
    "RECAP with low-rank adapters in place of the mask: prune, train them, merge them, round by round; by peft.",
    round_plans,
    prunes=True,
    training=attach,
    options={"rank": 8, "alpha": 16, "targets": lora.PLACES, "blocks": 1.0},
    extra="lora",
    lr=2e-3,
)
