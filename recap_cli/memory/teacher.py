"""What the round holds that makes the teacher (`distill.teacher: lora` or `full`): predicted on tensors without memory."""

import torch
from torch import Tensor, nn

from recap_cli.core.axes import all_units
from recap_cli.core.method import RoundPlan, TrainerHook
from recap_cli.core.streaming import streamed
from recap_cli.memory.fake_step import Fakes, Kernels
from recap_cli.memory.meta_model import MetaModel
from recap_cli.memory.predict import batch_of, with_hook
from recap_cli.models import build
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.device_policy import blocks_of, importance_batch_size
from recap_cli.rounds.plans import METHOD_OF_TEACHER
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.small_model import SmallModel, fine_axes, rule_of
from recap_cli.rounds.teacher_round import WHOLE
from recap_cli.tasks.calls import task_named
from recap_cli.tasks.losses import mean_loss


def teacher_bytes(model: MetaModel, recipe: Recipe, kernels: Kernels = "cuda") -> int:
    """The peak on the device of a step of a teacher that the run finetunes itself, its blocks there one at a time.

    Beside that step it has the moments of what stands outside the blocks and is trained. Moments of the blocks are not there.
    """
    fakes = Fakes()
    batch = fakes.like(batch_of(model.spec, recipe, importance_batch_size(recipe, torch.device("cuda"))))
    built = build.assemble(model.spec, fakes.like(model.tensors), model.adapter, {})
    axes, task = model.layout.axes, task_named(recipe.task.kind)
    hook = _hook(model, recipe, built, fakes)
    built.eval()  # what was put in, too
    blocks, forward = blocks_of(built, axes, model.spec.model_type), forward_of(model.spec, built)
    tables = {f"{name}." for name, module in built.named_modules() if isinstance(module, nn.Embedding)}
    away = tuple({*tables, *(f"{path}." for path in blocks)})
    for name, param in built.named_parameters():
        param.requires_grad_(hook.trains(name))
        if param.requires_grad and name.startswith(away):  # its gradient leaves for the CPU
            param.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]

    def step() -> None:
        with streamed(built, blocks, "cpu"):
            mean_loss(task, forward(batch), batch)[0].backward()  # type: ignore[no-untyped-call]

    peak = fakes.peak_bytes(step, host=[*built.parameters(), *built.buffers()], inputs=batch, kernels=kernels)
    stay = sum(param.nbytes for name, param in built.named_parameters() if param.requires_grad and not name.startswith(away))
    return peak + len(rule_of(recipe.finetune).idle_decay) * stay


def _hook(model: MetaModel, recipe: Recipe, built: nn.Module, fakes: Fakes) -> TrainerHook:
    if recipe.distill.teacher == "full":
        return WHOLE
    everything = all_units(model.layout.axes)
    fine = all_units(fine_axes(model.layout, everything))
    as_lora = recipe.model_copy(update={"method": METHOD_OF_TEACHER["lora"], "options": {}})
    plan = RoundPlan(trains="training")
    return with_hook(SmallModel(built, model.layout, plan, everything, fine), as_lora, [plan], fakes.like)


def _drop(param: Tensor) -> None:
    param.grad = None
