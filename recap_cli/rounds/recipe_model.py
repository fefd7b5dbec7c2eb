"""The model and the task that a recipe names: what makes them, what they are scored by, and how they are called."""

from collections.abc import Sequence

from torch import nn

from recap_cli.core.task import Batch, Objective, Outputs
from recap_cli.errors import ModelError
from recap_cli.models import build
from recap_cli.models.build import ModelSpec
from recap_cli.models.source import ModelSource
from recap_cli.recipe.recipe import Recipe
from recap_cli.tasks.calls import task_named
from recap_cli.training.loop import Forward

OTHER_INDICES = (
    "its buffers hold indices that are not its own: restore the state from a copy, or start a new one with recap init"
)


def source_of(recipe: Recipe, label_names: Sequence[str] = ()) -> ModelSource:
    """What a recipe's model is made from, for data with these labels."""
    kind = recipe.task.kind
    return ModelSource(
        **recipe.model.model_dump(),
        task=task_named(kind),
        task_kind=kind,
        label_names=label_names,
        image_size=recipe.data.image_size,
    )


def objective_of(recipe: Recipe, spec: ModelSpec) -> Objective:
    """What the model is trained and scored for."""
    return Objective(task_named(recipe.task.kind), tuple(spec.label_names), recipe.metric)


def forward_of(spec: ModelSpec, model: nn.Module) -> Forward:
    """A function from a batch to the model's outputs, as its task reads them.

    It raises `ModelError` where the model looks up what is not there, as with an index that a damaged file holds.
    """
    call, task, wanted = build.forward(spec), task_named(spec.task_kind), build.inputs_of(spec, model)

    def forward(batch: Batch) -> Outputs:
        try:
            return task.read(call(model, {**batch, **task.feed(batch, wanted, spec.num_labels)}))
        except (IndexError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "is out of bounds" not in str(error):  # of `gather`
                raise
            raise ModelError(f"the model looks up a row that it does not have ({error})", hint=OTHER_INDICES) from error

    return forward
