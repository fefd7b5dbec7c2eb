"""How the settings of a recipe make a small model partly trainable: what `finetune` does, and what its prediction runs."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from recap_cli.core.axes import Axis, Choice, refine, shapes_of, shrink
from recap_cli.core.method import Turn
from recap_cli.core.surgery import Where, indices
from recap_cli.recipe.recipe import Finetune, Recipe
from recap_cli.rounds.context import Layout
from recap_cli.trainable.build import Slot, bring_forward, make_partial
from recap_cli.trainable.optim import Rule, adamw, sgd
from recap_cli.trainable.token_rows import Vocabulary
from recap_cli.training.loop import Batch, Forward


@dataclass(frozen=True)
class Resident:
    """How weights lie on the device: the type that the forward computes in, and whether frozen matrices are int8 codes."""

    dtype: torch.dtype
    int8: bool = False


RESIDENTS = {"fp32": Resident(torch.float32), "bf16": Resident(torch.bfloat16), "int8": Resident(torch.bfloat16, int8=True)}


def rule_of(settings: Finetune) -> Rule:
    """The update rule that a recipe names."""
    if settings.optimizer == "sgd":
        return sgd(momentum=settings.momentum)
    return adamw(betas=settings.betas, eps=settings.eps)


def fine_axes(layout: Layout, plan: Choice) -> list[Axis]:
    """The groups of the mask: one per hidden dimension of the small model that `plan` leaves."""
    return [refine(axis) for axis in shrink(layout.axes, plan)]


def moving(layout: Layout, plan: Choice, chosen: Choice, small: dict[str, Tensor], rows: Where | None = None) -> Where:
    """The entries of the small model's tensors that the mask lets move, and the `rows` of its embeddings; parameters that are
    not named move whole.
    """
    return indices(fine_axes(layout, plan), chosen, shapes_of(small)) | (rows or {})


def frozen_whole(layout: Layout, turn: Turn, name: str, table: str | None = None) -> bool:
    """Whether a parameter does not move at all: it is an embedding, or where the head alone moves, not of the head.

    `table` is the token table of a text model, if rows of it can move by themselves.
    """
    if turn.moves == "head":
        return name not in layout.head
    return name in layout.embeddings and not (name == table if turn.embeddings == "tokens" else turn.embeddings)


def make_trainable(
    model: nn.Module,
    layout: Layout,
    recipe: Recipe,
    turn: Turn,
    plan: Choice,
    chosen: Choice,
    device: torch.device | str,
    vocabulary: Vocabulary | None = None,
) -> list[Slot]:
    """Make a small model partly trainable, in place and on the device, in the types of the recipe; returns its slots.

    Of its token table no more is held than the `vocabulary` says, where that is known.
    """
    axes, resident = fine_axes(layout, plan), RESIDENTS[recipe.finetune.resident]
    where = bring_forward(model, axes, chosen, indices(axes, chosen, shapes_of(model.named_parameters())))
    frozen = partial(frozen_whole, layout, turn, table=vocabulary.table if vocabulary else None)
    return make_partial(
        model,
        where | (vocabulary.where(turn) if vocabulary else {}),
        frozen=frozen,
        looked_up=vocabulary.looked_up() if vocabulary else None,
        device=device,
        dtype=resident.dtype,
        int8=resident.int8,
        offload=recipe.finetune.offload,
    )


def in_dtype(call: Forward, resident: Resident) -> Forward:
    """The forward pass with floating-point inputs in the type that the residents compute in."""
    if resident.dtype == torch.float32:
        return call

    def cast(batch: Batch) -> Tensor:
        return call({name: t.to(resident.dtype) if t.is_floating_point() else t for name, t in batch.items()})

    return cast
