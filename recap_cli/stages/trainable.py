"""How the settings of a recipe make a small model partly trainable: what `finetune` does, and what its prediction runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from recap_cli.core.groups import Axis, Choice, refine, shapes_of, shrink
from recap_cli.core.method import Attached, Frame, Turn
from recap_cli.core.optim import Rule, adamw, sgd
from recap_cli.core.partial import Slot, bring_forward, make_partial
from recap_cli.core.surgery import Where, indices
from recap_cli.errors import PluginError
from recap_cli.recipe import Finetune, Recipe
from recap_cli.runtime.training import Batch, Forward
from recap_cli.stages.context import Layout
from recap_cli.stages.prune import choose
from recap_cli.stages.turns import method_of, options_of


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


def moving(layout: Layout, plan: Choice, chosen: Choice, small: dict[str, Tensor]) -> Where:
    """The entries of the small model's tensors that the mask lets move; parameters that are not named move whole."""
    return indices(fine_axes(layout, plan), chosen, shapes_of(small))


def frozen_whole(layout: Layout, turn: Turn, name: str) -> bool:
    """Whether a parameter does not move at all: it is an embedding, or where the head alone moves, not of the head."""
    if turn.moves == "head":
        return name not in layout.head
    return name in layout.embeddings and not turn.embeddings


def attach(model: nn.Module, layout: Layout, recipe: Recipe, plan: Choice, turns: Sequence[Turn]) -> Attached:
    """Let the method of the recipe put its own training into a small model, in place, for the first of `turns`.

    Raises `PluginError` if it fails.
    """
    method = method_of(recipe)
    axes = shrink(layout.axes, plan)
    shapes = {cut.param: tuple(model.get_parameter(cut.param).shape) for axis in axes for cut in axis.cuts}
    options = options_of(recipe, method)
    frame = Frame(model, axes, layout.head, turns, recipe.finetune.lr, options, partial(choose, recipe, axes, shapes))
    try:
        if method.training is None:
            raise ValueError("has no training of its own")
        return method.training(frame)
    except Exception as error:  # a method is a stranger's code: it may raise anything
        raise PluginError(
            f"the method {recipe.method!r} cannot be attached to this model: {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}",
            hint="choose another method, or repair the plugin; see docs/plugins.md",
        ) from error


def make_own(model: nn.Module, attached: Attached, recipe: Recipe, device: torch.device | str) -> list[Slot]:
    """Make what a method's own training names trainable, and nothing else, as `make_trainable` does with a mask."""
    resident = RESIDENTS[recipe.finetune.resident]
    return make_partial(
        model,
        {},
        frozen=lambda name: not attached.moves(name),
        device=device,
        dtype=resident.dtype,
        int8=resident.int8,
        offload=recipe.finetune.offload,
    )


def make_trainable(
    model: nn.Module, layout: Layout, recipe: Recipe, turn: Turn, plan: Choice, chosen: Choice, device: torch.device | str
) -> list[Slot]:
    """Make a small model partly trainable, in place and on the device, in the types of the recipe; returns its slots."""
    axes, resident = fine_axes(layout, plan), RESIDENTS[recipe.finetune.resident]
    where = bring_forward(model, axes, chosen, indices(axes, chosen, shapes_of(model.named_parameters())))
    frozen = partial(frozen_whole, layout, turn)
    return make_partial(
        model,
        where,
        frozen=frozen,
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
