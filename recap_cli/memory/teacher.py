"""What the round holds that makes the teacher (`distill.teacher: lora` or `full`): predicted on tensors without memory."""

import torch
from torch import Tensor, nn

from recap_cli.core.axes import all_units
from recap_cli.core.method import RoundPlan, TrainerHook
from recap_cli.core.streaming import streamed
from recap_cli.core.task import Batch
from recap_cli.memory.fake_step import Fakes, Kernels
from recap_cli.memory.meta_model import MetaModel
from recap_cli.memory.predict import batch_of, with_hook
from recap_cli.models import build
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.device_policy import blocks_of, importance_batch_size
from recap_cli.rounds.plans import for_teacher
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
    built, hook = _made(model, recipe, fakes)
    blocks = blocks_of(built, model.layout.axes, model.spec.model_type)
    tables = {f"{name}." for name, module in built.named_modules() if isinstance(module, nn.Embedding)}
    away = tuple({*tables, *(f"{path}." for path in blocks)})
    for name, param in built.named_parameters():
        param.requires_grad_(hook.trains(name))
        if param.requires_grad and name.startswith(away):  # its gradient leaves for the CPU
            param.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
    batch = fakes.like(batch_of(model.spec, recipe, importance_batch_size(recipe, torch.device("cuda"))))
    peak = _peak_bytes(model, recipe, built, batch, fakes, kernels)
    stay = sum(param.nbytes for name, param in built.named_parameters() if param.requires_grad and not name.startswith(away))
    return peak + len(rule_of(recipe.finetune).idle_decay) * stay


def teacher_scoring_bytes(model: MetaModel, recipe: Recipe, kernels: Kernels = "cuda") -> int:
    """The peak on the device of a batch that such a teacher is scored on, or gives its outputs for."""
    fakes = Fakes()
    built, _ = _made(model, recipe, fakes)
    batch = fakes.like(batch_of(model.spec, recipe, recipe.evaluate.batch_size))
    with torch.no_grad():
        return _peak_bytes(model, recipe, built, batch, fakes, kernels)


def _made(model: MetaModel, recipe: Recipe, fakes: Fakes) -> tuple[nn.Module, TrainerHook]:
    built = build.assemble(model.spec, fakes.like(model.tensors), model.adapter, {})
    hook = _hook(model, recipe, built, fakes)
    return built.eval(), hook  # what was put in, too


def _peak_bytes(model: MetaModel, recipe: Recipe, built: nn.Module, batch: Batch, fakes: Fakes, kernels: Kernels) -> int:
    """The peak of a forward of a batch and, with gradients on, of its backward."""
    blocks = blocks_of(built, model.layout.axes, model.spec.model_type)
    task, forward = task_named(recipe.task.kind), forward_of(model.spec, built)

    def run() -> None:
        with streamed(built, blocks, "cpu"):
            loss = mean_loss(task, forward(batch), batch)[0]
            if torch.is_grad_enabled():
                loss.backward()  # type: ignore[no-untyped-call]

    return fakes.peak_bytes(run, host=[*built.parameters(), *built.buffers()], inputs=batch, kernels=kernels)


def _hook(model: MetaModel, recipe: Recipe, built: nn.Module, fakes: Fakes) -> TrainerHook:
    if recipe.distill.teacher == "full":
        return WHOLE
    everything = all_units(model.layout.axes)
    fine = all_units(fine_axes(model.layout, everything))
    plan = RoundPlan(trains="training")
    return with_hook(SmallModel(built, model.layout, plan, everything, fine), for_teacher(recipe), [plan], fakes.like)


def _drop(param: Tensor) -> None:
    param.grad = None
