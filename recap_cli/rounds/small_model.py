"""How the settings of a recipe make a small model partly trainable: what `finetune` does, and what its prediction runs."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from recap_cli.core.axes import Axis, UnitMask, refine, shapes_of, shrink
from recap_cli.core.method import RoundPlan
from recap_cli.core.surgery import IndexMap, indices
from recap_cli.recipe.recipe import Finetune, Recipe
from recap_cli.rounds.layout import Layout
from recap_cli.trainable.build import Trainable, bring_forward, make_partial
from recap_cli.trainable.optim import UpdateRule, adamw, sgd
from recap_cli.trainable.placement import Placement
from recap_cli.trainable.token_rows import TokenRows
from recap_cli.training.loop import Batch, Forward


@dataclass(frozen=True)
class WeightDtype:
    """How weights lie on the device: the type that the forward computes in, and whether frozen matrices are int8 codes."""

    dtype: torch.dtype
    int8: bool = False


WEIGHT_DTYPES = {
    "fp32": WeightDtype(torch.float32),
    "bf16": WeightDtype(torch.bfloat16),
    "int8": WeightDtype(torch.bfloat16, int8=True),
}


def rule_of(settings: Finetune) -> UpdateRule:
    """The update rule that a recipe names."""
    if settings.optimizer == "sgd":
        return sgd(momentum=settings.momentum)
    return adamw(betas=settings.betas, eps=settings.eps)


def fine_axes(layout: Layout, plan: UnitMask) -> list[Axis]:
    """The groups of the mask: one per hidden dimension of the small model that `plan` leaves."""
    return [refine(axis) for axis in shrink(layout.axes, plan)]


def trainable_entries(
    layout: Layout, plan: UnitMask, chosen: UnitMask, small: dict[str, Tensor], rows: IndexMap | None = None
) -> IndexMap:
    """The entries of the small model's tensors that the mask lets move, and the `rows` of its embeddings; parameters that are
    not named move whole.
    """
    return indices(fine_axes(layout, plan), chosen, shapes_of(small)) | (rows or {})


def frozen_whole(layout: Layout, round_plan: RoundPlan, name: str, table: str | None = None) -> bool:
    """Whether a parameter does not move at all: it is an embedding, or where the head alone moves, not of the head.

    `table` is the token table of a text model, if rows of it can move by themselves.
    """
    if round_plan.trains == "head":
        return name not in layout.head
    return name in layout.embeddings and not (name == table if round_plan.embeddings == "tokens" else round_plan.embeddings)


def make_trainable(
    model: nn.Module,
    layout: Layout,
    recipe: Recipe,
    round_plan: RoundPlan,
    plan: UnitMask,
    chosen: UnitMask,
    device: torch.device | str,
    token_rows: TokenRows | None = None,
) -> list[Trainable]:
    """Make a small model partly trainable, in place and on the device, in the types of the recipe; returns its slots.

    Of its token table no more is held than the `token_rows` says, where that is known.
    """
    axes, weights = fine_axes(layout, plan), WEIGHT_DTYPES[recipe.finetune.weights]
    index_map = bring_forward(model, axes, chosen, indices(axes, chosen, shapes_of(model.named_parameters())))
    frozen = partial(frozen_whole, layout, round_plan, table=token_rows.table if token_rows else None)
    return make_partial(
        model,
        index_map | (token_rows.index_map(round_plan) if token_rows else {}),
        placement=Placement(device=device, dtype=weights.dtype, int8=weights.int8, offload=recipe.finetune.offload),
        frozen=frozen,
        used_rows=token_rows.used_rows() if token_rows else None,
    )


def in_dtype(call: Forward, weights: WeightDtype) -> Forward:
    """The forward pass with floating-point inputs in the type that the residents compute in."""
    if weights.dtype == torch.float32:
        return call

    def cast(batch: Batch) -> Tensor:
        return call({name: t.to(weights.dtype) if t.is_floating_point() else t for name, t in batch.items()})

    return cast
