"""A method's own training: put into the small model, stepped, and taken out again, with a stranger's mistakes caught."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recap_cli.core.axes import Axis, Choice, shrink
from recap_cli.core.method import Attached, Frame, Scores, Turn
from recap_cli.errors import PluginError
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.context import Layout
from recap_cli.rounds.plans import method_of, options_of
from recap_cli.rounds.selection import choose
from recap_cli.rounds.small_model import RESIDENTS
from recap_cli.trainable.build import Slot, make_partial
from recap_cli.trainable.optim import Optimizer
from recap_cli.trainable.token_rows import Vocabulary
from recap_cli.untrusted.code import guarded

HINT = "choose another method, or repair the plugin; see docs/plugins.md"


def attach(model: nn.Module, layout: Layout, recipe: Recipe, plan: Choice, turns: Sequence[Turn]) -> Attached:
    """Let the method of the recipe put its own training into a small model, in place, for the first of `turns`.

    Raises `PluginError` if it fails, or gives something else than an `Attached`.
    """
    method, axes = method_of(recipe), shrink(layout.axes, plan)
    shapes = {cut.param: tuple(model.get_parameter(cut.param).shape) for axis in axes for cut in axis.cuts}
    options = options_of(recipe, method)
    frame = Frame(model, axes, layout.head, turns, recipe.finetune.lr, options, partial(choose, recipe, axes, shapes))
    with guarded(f"the training of the method {recipe.method!r} failed", HINT):
        made: Any = None if method.training is None else method.training(frame)
    if not isinstance(made, Attached):
        raise PluginError(f"the training of the method {recipe.method!r} gave {type(made).__name__}, not Attached", hint=HINT)
    return made


def make_own(
    model: nn.Module,
    attached: Attached,
    recipe: Recipe,
    device: torch.device | str,
    vocabulary: Vocabulary | None = None,
) -> list[Slot]:
    """Make what a method's own training names trainable, and nothing else, as `make_trainable` does with a mask."""
    resident = RESIDENTS[recipe.finetune.resident]
    with guarded("`moves` of a method's training failed", HINT):
        names = {name for name, _ in model.named_parameters(remove_duplicate=False) if attached.moves(name)}
    return make_partial(
        model,
        {},
        frozen=lambda name: name not in names,
        looked_up=vocabulary.looked_up() if vocabulary and attached.keeps_tokens else None,
        device=device,
        dtype=resident.dtype,
        int8=resident.int8,
        offload=recipe.finetune.offload,
    )


def rates_of(attached: Attached, slots: Sequence[Slot]) -> dict[str, float]:
    """The factor of each slot's learning rate."""
    with guarded("`rate` of a method's training failed", HINT):
        return {slot.name: float(attached.rate(slot.name)) for slot in slots}


def stepping(attached: Attached | None, optimizer: Optimizer, steps: int) -> Callable[[int], None]:
    """What runs before each optimizer step: the training's own `before_step`, with the fp32 values of what is trained."""
    if attached is None:
        return lambda _: None
    slots = {slot.name: slot for slot in optimizer.slots}

    def before(step: int) -> None:
        with guarded("`before_step` of a method's training failed", HINT):
            attached.before_step(step, steps, lambda name: slots[name].master)

    return before


def result_of(
    attached: Attached, values: Mapping[str, Tensor], before: Mapping[str, Tensor], axes: Sequence[Axis]
) -> tuple[dict[str, Tensor], Scores]:
    """What of the small model has moved, whole, and the scores that were learned for its `axes`.

    Raises `PluginError` for tensors that the model does not have or that are of another shape.
    """
    with guarded("`result` of a method's training failed", HINT):
        moved, scores = (dict(part) for part in attached.result(values, before))
    for name, tensor in moved.items():
        if name not in before or not isinstance(tensor, Tensor) or tensor.shape != before[name].shape:
            raise PluginError(
                f"`result` of a method's training: {name} is no tensor of the model, or not of its shape", hint=HINT
            )
    for axis in axes if scores else ():
        found = scores.get(axis.name)
        if not isinstance(found, Tensor) or tuple(found.shape) != (axis.size,):
            raise PluginError(f"`result` of a method's training: no scores of shape ({axis.size},) for {axis.name}", hint=HINT)
    return moved, scores
