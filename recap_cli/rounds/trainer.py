"""What trains a round: the small model made trainable on its device, and the optimizer with the moments that it carries on."""

from dataclasses import dataclass

import torch

from recap_cli.core.method import TrainerHook
from recap_cli.core.surgery import IndexMap, compose_index_maps, indices
from recap_cli.data.sampling import seed_for
from recap_cli.machine import accounting
from recap_cli.rounds.custom_training import attach, make_hook_trainable, rates_of
from recap_cli.rounds.plans import teaches
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.small_model import SmallModel, enable_recomputing, make_trainable, placement_of, rule_of
from recap_cli.trainable.moments import take_moments
from recap_cli.trainable.optim import CarriedState, Optimizer


@dataclass(frozen=True)
class Trainer:
    """The small model of round `number` on its device, with what trains it.

    `hook` is that of a method that trains in its own way; None where the mask says what is trainable.
    """

    number: int
    small: SmallModel
    optimizer: Optimizer
    hook: TrainerHook | None
    device: torch.device

    @property
    def teaches(self) -> bool:
        """Whether this is the round that makes the teacher of those after it."""
        return teaches(self.small.round_plan)


def make_trainer(context: Context, number: int, small: SmallModel, device: torch.device) -> Trainer:
    """Make a small model trainable, in place and on the device, with the moments that its entries had."""
    accounting.reset(device)
    recipe, settings = context.recipe, context.recipe.finetune
    index_map = small.trainable_entries()  # of the model as it is: what follows changes it
    enable_recomputing(small.model, settings, small.layout, context.spec.model_type)  # by the names of its parameters as it is
    hook = None
    if small.round_plan.trains == "training":
        torch.manual_seed(seed_for(recipe.seed, number, "training"))
        hook = attach(small, recipe, context.round_plans[number - 1 :])
    carried = carried_state(context, small, index_map)
    if hook is None:
        trainables = make_trainable(small, placement_of(settings, device))
        scale = {trainable.name: 1.0 for trainable in trainables}
    else:
        trainables = make_hook_trainable(small, hook, placement_of(settings, device))
        scale = rates_of(hook, trainables)
    if (rate := context.head_lr(small.round_plan)) != (lr := context.lr(small.round_plan)):
        scale |= {name: scale[name] * rate / lr for name in scale.keys() & set(context.layout.head)}
    optimizer = Optimizer(trainables, rule_of(settings), weight_decay=settings.weight_decay, carried=carried, scale=scale)
    return Trainer(number, small, optimizer, hook, device)


def carried_state(context: Context, small: SmallModel, index_map: IndexMap) -> CarriedState:
    """The moments and step counts that the entries at `index_map` of a small model have in the full one."""
    in_full = compose_index_maps(indices(context.layout.axes, small.plan, context.layout.shapes), index_map)
    moments, steps = take_moments(context.full_moments(tuple(rule_of(context.recipe.finetune).idle_decay)), in_full)
    return CarriedState(moments, steps, small.along)
