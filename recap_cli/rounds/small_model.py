"""The small model of a round, and how the settings of a recipe make it trainable: for `finetune`, and for its prediction."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from recap_cli.core.axes import Axis, UnitMask, mask_axes, shapes_of, shrink
from recap_cli.core.method import RoundPlan
from recap_cli.core.surgery import IndexMap, indices
from recap_cli.core.task import Batch, Outputs
from recap_cli.models.recomputing import enable_checkpointing, recompute_attention
from recap_cli.recipe.recipe import Finetune, Recipe
from recap_cli.rounds.device_policy import blocks_of
from recap_cli.rounds.frozen_weights import frozen_weight_of
from recap_cli.rounds.layout import Layout
from recap_cli.trainable.build import Trainable, make_partial
from recap_cli.trainable.full_precision import own_loss
from recap_cli.trainable.neuron_order import bring_forward
from recap_cli.trainable.optim import UpdateRule, adamw, sgd
from recap_cli.trainable.placement import Placement
from recap_cli.trainable.token_rows import TokenRows
from recap_cli.training.loop import Forward

FEW = 8  # examples: fewer are not taken in parts


@dataclass(frozen=True)
class SmallModel:
    """The small model of a round, and what says which of it is trainable.

    Attributes:
        model: cut to `plan`; `make_trainable` changes it in place.
        layout: of the full model.
        round_plan: what the round does.
        plan: the groups of the full model that are left.
        mask: the fine groups of the small model that are trainable.
        token_rows: the rows of its token table that the data use; None where that is not known, and all rows are held.
    """

    model: nn.Module
    layout: Layout
    round_plan: RoundPlan
    plan: UnitMask
    mask: UnitMask
    token_rows: TokenRows | None = None

    @property
    def axes(self) -> list[Axis]:
        """The axes of the small model, whose units are what `plan` leaves."""
        return shrink(self.layout.axes, self.plan)

    @property
    def along(self) -> dict[str, int]:
        """The dimension that each parameter is cut, or chosen, along."""
        return self.layout.along | (self.token_rows.along() if self.token_rows else {})

    @property
    def rows(self) -> IndexMap:
        """The trainable rows of the token table, where these are neither all nor none."""
        return self.token_rows.index_map(self.round_plan) if self.token_rows else {}

    def trainable_entries(self) -> IndexMap:
        """The trainable entries of the model, as it is before `make_trainable`."""
        return trainable_entries(self.layout, self.plan, self.mask, dict(self.model.named_parameters()), self.rows)

    def is_frozen(self, name: str) -> bool:
        """Whether a parameter is frozen whole."""
        return frozen_whole(
            self.layout, self.round_plan, name, table=self.token_rows.table if self.token_rows is not None else None
        )


def placement_of(settings: Finetune, device: torch.device | str = "cpu") -> Placement:
    """Where a model lives while it is finetuned on a device, by the recipe. Raises `PluginError` as `frozen_weight_of` does."""
    return Placement(device, frozen_weight_of(settings.weights), offload=settings.offload)


def rule_of(settings: Finetune) -> UpdateRule:
    """The update rule that a recipe names."""
    if settings.optimizer == "sgd":
        return sgd(momentum=settings.momentum)
    return adamw(betas=settings.betas, eps=settings.eps)


def micro_batch_size_of(recipe: Recipe, round_plan: RoundPlan, model: nn.Module) -> int | None:
    """How many examples of a batch a round takes at a time, if not all of them: the recipe's number, or the round's parts.

    A model with a loss of its own is given what the recipe says. So is a batch of few examples: the gradients that are held
    between its parts would be more than the activations that are not.
    """
    size = recipe.finetune.micro_batch_size or recipe.finetune.batch_size
    parts = round_plan.batch_parts if own_loss(model) is None and size >= FEW else 1
    return recipe.finetune.micro_batch_size if parts == 1 else max(1, size // parts)


def enable_recomputing(model: nn.Module, settings: Finetune, layout: Layout, model_type: str) -> None:
    """Let a model recompute what the recipe says. Raises `ModelError` as `models.recomputing` does."""
    if settings.checkpointing == "attention":
        recompute_attention(model, layout.axes)
    elif settings.checkpointing:
        enable_checkpointing(model, lambda: blocks_of(model, layout.axes, model_type))


def fine_axes(layout: Layout, plan: UnitMask) -> list[Axis]:
    """The groups of the mask: one per hidden dimension of the small model that `plan` leaves."""
    return mask_axes(shrink(layout.axes, plan), layout.whole)


def trainable_entries(
    layout: Layout, plan: UnitMask, chosen: UnitMask, small: dict[str, Tensor], rows: IndexMap | None = None
) -> IndexMap:
    """The trainable entries of the small model's tensors: those of the mask, and the `rows` of its embeddings.

    Parameters that are not named are trainable whole.
    """
    return indices(fine_axes(layout, plan), chosen, shapes_of(small)) | (rows or {})


def frozen_whole(layout: Layout, round_plan: RoundPlan, name: str, table: str | None = None) -> bool:
    """Whether a parameter is frozen whole.

    It is an embedding, or cut and too large to be trained whole beside a mask (`Layout.whole_frozen`). Where the head alone is
    trainable, it is what is not of the head. `table` is the token table of a text model, if rows of it can be trainable by
    themselves.
    """
    if round_plan.trains == "head":
        return name not in layout.head
    if name in layout.whole_frozen and round_plan.mask_ratio > 0:
        return True
    return name in layout.embeddings and not (name == table if round_plan.embeddings == "tokens" else round_plan.embeddings)


def make_trainable(small: SmallModel, placement: Placement) -> list[Trainable]:
    """Make a small model trainable where its mask says so, in place; returns a record for each trainable tensor.

    Of its token table no more is held than its token rows say, where these are known. Where nothing is pruned and nothing
    masked, training is torch's to the bit.
    """
    index_map = indices(fine_axes(small.layout, small.plan), small.mask, shapes_of(small.model.named_parameters()))
    index_map = bring_forward(small.model, small.axes, small.mask, index_map)
    return make_partial(
        small.model,
        index_map | small.rows,
        frozen=small.is_frozen,
        used_rows=small.token_rows.used_rows() if small.token_rows else None,
        placement=placement,
        lean=small.round_plan.prune_ratio > 0 or small.round_plan.mask_ratio > 0,
    )


def in_dtype(call: Forward, dtype: torch.dtype) -> Forward:
    """The forward pass with floating-point inputs in the type that the weights are read in."""
    if dtype == torch.float32:
        return call

    def cast(batch: Batch) -> Outputs:
        return call(tree_map(lambda leaf: leaf.to(dtype) if _is_float(leaf) else leaf, batch))

    return cast


def _is_float(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
