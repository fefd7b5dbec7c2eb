"""How a stage scores groups: the criterion that a recipe names, on the losses of a sample D_s (paper, sec. 3.1.2)."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from recap_cli import registry
from recap_cli.core.axes import Axis
from recap_cli.core.criterion import Criterion, Losses
from recap_cli.core.importance import Scores, group_scores
from recap_cli.data.sampling import batches, sample, seed_for, seeded
from recap_cli.data.split import Split
from recap_cli.machine import devices
from recap_cli.progress import Track
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.device_policy import importance_batch_size, on_device
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.run_context import Context
from recap_cli.tasks.losses import mean_loss


def load_criterion(name: str) -> Criterion:
    """The criterion plugin of a name."""
    return cast(Criterion, registry.load("criteria", name))


@dataclass(frozen=True)
class Sample:
    """D_s, and how it is run.

    Attributes:
        split: the training examples.
        indices: those of them that are drawn, int64.
        batch_size: examples at a time, where a criterion does not want them one by one.
        device: where the model runs.
        label: what it is for, as the progress says it.
    """

    split: Split
    indices: Tensor
    batch_size: int
    device: torch.device
    label: str


def draw_sample(recipe: Recipe, split: Split, round: int, stage: str, label: str) -> Sample:
    """The sample of a stage of a round, on the device that the recipe has for importance."""
    device = devices.pick(recipe.importance.device)
    return Sample(split, draw(recipe, split, round, stage), importance_batch_size(recipe, device), device, label)


def score_units(
    context: Context, model: nn.Module, axes: Sequence[Axis], criterion: str, sample: Sample, track: Track
) -> Scores:
    """The importance of every group of `axes` of a model on the CPU, by the criterion of that name on a sample."""
    loaded, losses = load_criterion(criterion), losses_over(context, model, sample, track)
    with on_device(model, axes, sample.device, context.spec.model_type):
        return group_scores(model, axes, loaded, losses, named=criterion)


def losses_over(context: Context, model: nn.Module, sample: Sample, track: Track) -> Losses:
    """The losses over D_s: per batch, or per example, each with its share of all that the task counts in D_s."""
    forward, task = forward_of(context.spec, model), context.objective.task
    whole = float(task.count(sample.split.labels(sample.indices)))

    def losses(each: bool) -> Iterator[tuple[Tensor, float]]:
        size = 1 if each else sample.batch_size
        steps = -(-len(sample.indices) // size)
        every = track(batches(sample.split, sample.indices, size, device=sample.device), sample.label, steps)
        for number, batch in enumerate(every):
            with _seeded(context, sample, number) if task.draws else nullcontext():
                mean, count = mean_loss(task, forward(batch), batch)
            yield mean, float(count) / max(whole, 1.0)

    return losses


def _seeded(context: Context, sample: Sample, number: int) -> AbstractContextManager[None]:
    return seeded(seed_for(context.recipe.seed, number, sample.label), sample.device)


def draw(recipe: Recipe, split: Split, round: int, stage: str) -> Tensor:
    """D_s: the examples on which a stage of a round estimates importance."""
    size = recipe.importance.batches * recipe.importance.batch_size
    return sample(len(split), size, seed=recipe.seed, round=round, stage=stage)
