"""Evaluation of a model on a split: its mean loss, and the metrics of its task."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from recap_cli.core.task import Batch, Objective, Outputs
from recap_cli.data.sampling import batches, seeded
from recap_cli.data.split import Split
from recap_cli.progress import Track, silent
from recap_cli.tasks.losses import check_targets, mean_loss
from recap_cli.training.loop import Forward

SEED = 0  # of an evaluation whose loss draws random numbers: equal models have equal losses


@dataclass(frozen=True)
class Pass:
    """How a model goes over the examples of a split.

    Attributes:
        batch_size: examples at a time.
        device: where the model is.
        track: hears of progress.
        label: what it is for, as the progress says it.
    """

    batch_size: int
    device: torch.device | str = "cpu"
    track: Track = silent
    label: str = "evaluate"


@dataclass(frozen=True)
class Predictions:
    """The columns of a table of predictions, a row for each example in order, as the task writes them."""

    columns: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, columns: dict[str, list[Any]]) -> None:
        """Add the rows of a batch."""
        for name, values in columns.items():
            self.columns.setdefault(name, []).extend(values)


def evaluate(
    forward: Forward, split: Split, objective: Objective, how: Pass, each: Predictions | None = None
) -> dict[str, float]:
    """Evaluate a model.

    Args:
        forward: Maps a batch on the device to the model's outputs. The model is in evaluation mode.
        split: The examples.
        objective: The task, with the names of the outputs.
        how: Batches and device.
        each: Collects the predictions.

    Returns:
        The mean loss over all that is counted, and the metrics of the task by name.

    Raises:
        DataError: A label has no output of the head, or an image cannot be decoded.
        PluginError: The task fails.
    """
    check_targets(split.targets, len(objective.labels), split.origin)
    task, total, counted = objective.task, 0.0, 0.0
    steps = -(-len(split) // how.batch_size)

    def outputs() -> Iterator[tuple[Outputs, Batch]]:
        nonlocal total, counted
        for batch in how.track(batches(split, torch.arange(len(split)), how.batch_size, device=how.device), how.label, steps):
            found = forward(batch)
            mean, count = mean_loss(task, found, batch)
            total, counted = total + float(mean) * float(count), counted + float(count)
            if each is not None:
                each.add(task.predict(found, batch, objective.labels))
            yield found, batch

    with torch.inference_mode(), seeded(SEED, how.device) if task.draws else nullcontext():
        metrics = task.score(outputs(), objective.labels)
    return {"loss": total / max(counted, 1.0), **metrics}
