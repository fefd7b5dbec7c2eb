"""The model and the task that a recipe names: what makes them, what they are scored by, and how they are called."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from recap_cli.models import build
from recap_cli.models.build import ModelSpec
from recap_cli.models.source import ModelSource
from recap_cli.recipe.recipe import Recipe
from recap_cli.tasks.task import Task


def source_of(recipe: Recipe, label_names: Sequence[str] = ()) -> ModelSource:
    """What a recipe's model is made from, for data with these labels."""
    return ModelSource(
        **recipe.model.model_dump(), task_kind=recipe.task.kind, label_names=label_names, image_size=recipe.data.image_size
    )


def task_of(recipe: Recipe, spec: ModelSpec) -> Task:
    """What the model is trained for."""
    return Task(recipe.task.kind, recipe.task.metric, spec.num_labels)


def forward_of(spec: ModelSpec, model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    """A function from a batch to logits, (batch, labels)."""
    call = build.forward(spec)
    return lambda batch: call(model, batch)
