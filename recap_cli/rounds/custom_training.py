"""A method's own training: put into the small model, stepped, and taken out again, with a plugin's mistakes caught."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from recap_cli.core.axes import Axis
from recap_cli.core.method import RoundPlan, Scores, TrainContext, TrainerHook
from recap_cli.errors import PluginError
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.plans import method_of, options_of
from recap_cli.rounds.rates import peak_lr
from recap_cli.rounds.selection import choose
from recap_cli.rounds.small_model import SmallModel
from recap_cli.trainable.build import Trainable, make_partial
from recap_cli.trainable.optim import Optimizer
from recap_cli.trainable.placement import Placement
from recap_cli.untrusted.code import guarded

HINT = "choose another method, or repair the plugin; see docs/plugins/method.md"


def attach(small: SmallModel, recipe: Recipe, round_plans: Sequence[RoundPlan]) -> TrainerHook:
    """Let the method of the recipe put its own training into a small model, in place, for the first of `round_plans`.

    Raises:
        PluginError: it fails, or gives something else than a `TrainerHook`.
    """
    method, axes, model = method_of(recipe), small.axes, small.model
    shapes = {cut.param: tuple(model.get_parameter(cut.param).shape) for axis in axes for cut in axis.cuts}
    options, lr = options_of(recipe, method), peak_lr(recipe, small.layout, small.round_plan)
    train_context = TrainContext(
        model, axes, small.layout.head, round_plans, lr, options, partial(choose, recipe, axes, shapes)
    )
    with guarded(f"the training of the method {recipe.method!r} failed", HINT):
        made: Any = None if method.training is None else method.training(train_context)
    if not isinstance(made, TrainerHook):
        raise PluginError(
            f"the training of the method {recipe.method!r} gave {type(made).__name__}, not TrainerHook", hint=HINT
        )
    return made


def make_hook_trainable(small: SmallModel, hook: TrainerHook, placement: Placement) -> list[Trainable]:
    """Make what a method's own training names trainable, and nothing else, as `make_trainable` does with a mask."""
    with guarded("`trains` of a method's training failed", HINT):
        names = {name for name, _ in small.model.named_parameters(remove_duplicate=False) if hook.trains(name)}
    return make_partial(
        small.model,
        {},
        frozen=lambda name: name not in names,
        used_rows=small.token_rows.used_rows() if small.token_rows and hook.keeps_tokens else None,
        placement=placement,
    )


def rates_of(hook: TrainerHook, trainables: Sequence[Trainable]) -> dict[str, float]:
    """The factor of each trainable tensor's learning rate."""
    with guarded("`rate` of a method's training failed", HINT):
        return {trainable.name: float(hook.rate(trainable.name)) for trainable in trainables}


def stepping(hook: TrainerHook | None, optimizer: Optimizer, steps: int) -> Callable[[int], None]:
    """What runs before each optimizer step: the training's own `before_step`, with the fp32 values of what is trained."""
    if hook is None:
        return lambda _: None
    trainables = {trainable.name: trainable for trainable in optimizer.trainables}

    def before(step: int) -> None:
        with guarded("`before_step` of a method's training failed", HINT):
            hook.before_step(step, steps, lambda name: trainables[name].master)

    return before


def result_of(
    hook: TrainerHook, values: Mapping[str, Tensor], before: Mapping[str, Tensor], axes: Sequence[Axis]
) -> tuple[dict[str, Tensor], Scores]:
    """What of the small model was trained, as whole tensors, and the scores that were learned for its `axes`.

    Raises:
        PluginError: the model does not have a tensor of them, or one of another shape.
    """
    with guarded("`result` of a method's training failed", HINT):
        trained, scores = (dict(part) for part in hook.result(values, before))
    for name, tensor in trained.items():
        if name not in before or not isinstance(tensor, Tensor) or tensor.shape != before[name].shape:
            raise PluginError(
                f"`result` of a method's training: {name} is no tensor of the model, or not of its shape", hint=HINT
            )
    for axis in axes if scores else ():
        found = scores.get(axis.name)
        if not isinstance(found, Tensor) or tuple(found.shape) != (axis.size,):
            raise PluginError(f"`result` of a method's training: no scores of shape ({axis.size},) for {axis.name}", hint=HINT)
    return trained, scores
