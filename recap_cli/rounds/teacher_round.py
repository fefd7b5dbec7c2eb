"""The round in which a run makes its own teacher (`distill.teacher: lora` or `full`) of the full model, a block at a time.

Nothing is pruned or masked. The weights stay on the CPU, and each block visits the device for its forward and its backward. So
the promise of RECAP holds here too: the device needs no room for the full model. Moments of what is in a block lie in main
memory. The model is in evaluation mode, as a block's backward runs it once more: there is no dropout.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from recap_cli.core.method import TrainerHook
from recap_cli.data.sampling import seed_for
from recap_cli.machine import accounting
from recap_cli.rounds.custom_training import attach
from recap_cli.rounds.device_policy import on_device
from recap_cli.rounds.plans import for_teacher
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.small_model import SmallModel, rule_of
from recap_cli.rounds.trainer import Trainer, carried_state
from recap_cli.trainable.build import Trainable
from recap_cli.trainable.optim import Optimizer

WHOLE = TrainerHook(trains=lambda _: True, result=lambda values, _: (dict(values), {}))


@contextmanager
def teaching(context: Context, number: int, full: SmallModel, device: torch.device) -> Iterator[Trainer]:
    """Inside, the full model can be trained by what is given: it takes and gives tensors on `device`.

    Args:
        context: The state.
        number: The round.
        full: What the round has cut, which is the full model.
        device: Where a block at a time runs.

    Raises:
        PluginError: LoRA cannot be put into the model, or its adapter does not say what the blocks are.
    """
    accounting.reset(device)
    recipe, settings, index_map = context.recipe, context.recipe.finetune, full.trainable_entries()
    torch.manual_seed(seed_for(recipe.seed, number, "training"))
    hook = WHOLE
    if recipe.distill.teacher == "lora":
        hook = attach(full, for_teacher(recipe), context.round_plans[number - 1 :])
    carried = carried_state(context, full, index_map)
    with on_device(full.model.eval(), full.layout.axes, device, context.spec.model_type):
        trainables = _trainables(full.model, hook)
        scale = dict.fromkeys(context.layout.head, context.head_lr(full.round_plan) / context.lr(full.round_plan))
        optimizer = Optimizer(trainables, rule_of(settings), weight_decay=settings.weight_decay, carried=carried, scale=scale)
        yield Trainer(number, full, optimizer, hook, device)


def _trainables(model: nn.Module, hook: TrainerHook) -> list[Trainable]:
    """Freeze all but what is trained; a record for each of its parameters, which is updated where it stands."""
    for name, param in model.named_parameters():
        param.requires_grad_(hook.trains(name))
    return [Trainable(name, param, param.detach()) for name, param in model.named_parameters() if param.requires_grad]
