"""The mean loss of a task, and whether its targets are among the outputs of a head."""

from typing import TYPE_CHECKING

from recap_cli.core.task import IGNORED, Batch, Outputs, Task
from recap_cli.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from recap_cli.core.ragged import Ragged


def mean_loss(task: Task, outputs: Outputs, batch: Batch) -> "tuple[Tensor, int | Tensor]":
    """Return the mean loss of a batch, a float32 scalar, and of how many losses it is the mean.

    Where nothing is counted the mean is 0, with a gradient of 0.
    """
    count = task.count(batch)
    return task.loss(outputs, batch) / (max(count, 1) if isinstance(count, int) else count.clamp(min=1)), count


def check_targets(targets: "Tensor | Ragged", outputs: int, origin: str) -> None:
    """Check that there are targets, and that those that are numbers of outputs have one of the head's.

    Raises:
        DataError: There are none, or one has no output. The message names the `origin`.
    """
    from recap_cli.core.ragged import Ragged

    if len(targets) == 0:
        raise DataError(f"{origin} holds no examples")
    values = targets.values if isinstance(targets, Ragged) else targets
    if values.is_floating_point() or values.numel() == 0:
        return
    counted = values[values != IGNORED]
    low, high = (int(counted.min()), int(counted.max())) if counted.numel() else (0, 0)
    if low < 0 or high >= outputs:
        raise DataError(
            f"the labels of {origin} go from {low} to {high}, but the head has {outputs} outputs (0 … {outputs - 1})",
            hint="evaluate the model on data with its labels, or make a new state for this data with `recap init`",
        )
