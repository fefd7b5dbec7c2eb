"""How a stage scores groups: the criterion that a recipe names, on the losses of a sample D_s (paper, sec. 3.1.2)."""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from recap_cli import registry
from recap_cli.core.criterion import Criterion, Losses
from recap_cli.data.sampling import batches, sample
from recap_cli.data.splits import Split
from recap_cli.progress import Track
from recap_cli.recipe.recipe import Recipe
from recap_cli.tasks import task as tasks


def load_criterion(name: str) -> Criterion:
    """The criterion plugin of a name."""
    return cast(Criterion, registry.load("criteria", name))


def losses_over(
    forward: Callable[[dict[str, Tensor]], Tensor],
    split: Split,
    indices: Tensor,
    *,
    batch_size: int,
    device: torch.device,
    track: Track,
    label: str,
) -> Losses:
    """The losses over D_s, the examples at `indices`: per batch, or per example, each with its share of D_s."""

    def losses(each: bool) -> Iterator[tuple[Tensor, float]]:
        size = 1 if each else batch_size
        steps = -(-len(indices) // size)
        for batch in track(batches(split, indices, size, device=device), label, steps):
            labels = batch["labels"]
            yield tasks.loss(forward(batch), labels), len(labels) / len(indices)

    return losses


def draw(recipe: Recipe, split: Split, round: int, stage: str) -> Tensor:
    """D_s: the examples on which a stage of a round estimates importance."""
    size = recipe.importance.batches * recipe.importance.batch_size
    return sample(len(split), size, seed=recipe.seed, round=round, stage=stage)
