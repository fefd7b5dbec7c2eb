"""The mean loss of a task, alone or with that of a teacher, and whether its targets are among the outputs of a head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recap_cli.core.task import IGNORED, TEACHER, TEACHER_STATES, Batch, Distillation, Outputs, Task
from recap_cli.errors import DataError, PluginError

if TYPE_CHECKING:
    from torch import Tensor

    from recap_cli.core.label_maps import LabelMaps
    from recap_cli.core.ragged import Ragged


def mean_loss(task: Task, outputs: Outputs, batch: Batch) -> "tuple[Tensor, int | Tensor]":
    """Return the mean loss of a batch, a float32 scalar, and of how many losses it is the mean.

    Where nothing is counted the mean is 0, with a gradient of 0.
    """
    count = task.count(batch)
    return task.loss(outputs, batch) / (max(count, 1) if isinstance(count, int) else count.clamp(min=1)), count


@dataclass(frozen=True)
class Lesson:
    """How much a student learns from its teacher.

    Attributes:
        weight: Of the teacher's loss; that of the labels has the rest.
        temperature: What both sides' logits are divided by.
        hidden_weight: Of the distance of hidden states, which is added.
        states: `states()` are the student's, block by block, in the last forward (`core.hidden_states`); None where they are
            not learned.
    """

    weight: float
    temperature: float
    hidden_weight: float = 0.0
    states: "Callable[[], Sequence[Tensor]] | None" = None


def training_loss(task: Task, outputs: Outputs, batch: Batch, lesson: Lesson | None) -> "tuple[Tensor, int | Tensor]":
    """Return the mean loss that a model is trained by, a float32 scalar, and of how many losses it is the mean.

    That is `(1 - w) · L(labels) + w · L(teacher)`, w being the `weight` of the lesson (Hinton et al., 2015); without a lesson
    it is `mean_loss`. Where hidden states are learned, `hidden_weight` times their mean squared distance is added.

    Raises:
        PluginError: the task does not give a row for each row of the teacher, or leaves out what a teacher gave for a part.
    """
    mean, count = mean_loss(task, outputs, batch)
    if lesson is None or task.distillation is None:
        return mean, count
    for key in (TEACHER,) if lesson.states is None else (TEACHER, TEACHER_STATES):
        if key not in batch:
            raise PluginError(
                f"the task has left out {key!r} of a part of a batch", hint="see `part` of Task in docs/plugins/task.md"
            )
    student = task.distillation.rows(outputs, batch)  # (rows, outputs)
    teacher = _rows(batch[TEACHER], task.distillation.rows_of_each(batch), len(student))  # (rows, outputs)
    if student.shape != teacher.shape:
        raise PluginError(
            f"the task gave rows of shape {tuple(student.shape)} for a student, and {tuple(teacher.shape)} for its teacher",
            hint="see Distillation in docs/plugins/task.md",
        )
    soft = task.distillation.loss(student.float(), teacher, lesson.temperature)
    taught_of = count if task.distillation.count is None else task.distillation.count(batch)
    soft = soft / (max(taught_of, 1) if isinstance(taught_of, int) else taught_of.clamp(min=1))
    taught = (1 - lesson.weight) * mean + lesson.weight * soft
    if lesson.states is not None:
        taught = taught + lesson.hidden_weight * _mean_distance(task.distillation, lesson.states(), batch)
    return taught, count


def _mean_distance(distillation: Distillation, states: "Sequence[Tensor]", batch: Batch) -> "Tensor":
    """Return the mean distance of hidden states; an example counts as often as it has rows, so that parts add up to a batch."""
    found = _distances(states, batch[TEACHER_STATES])  # (examples,)
    rows = distillation.rows_of_each(batch).to(found)  # (examples,)
    return (found * rows).sum() / rows.sum().clamp(min=1)


def _distances(student: "Sequence[Tensor]", teacher: "Tensor") -> "Tensor":
    """Return the squared distance of each example's hidden states, averaged over the blocks, float32, (examples,); at most 4.

    Args:
        student: (examples, width) each, of length 1.
        teacher: those of the teacher one after another, (examples, sum of widths).

    Raises:
        PluginError: they are not as wide.
    """
    import torch

    ours = torch.cat(list(student), 1)  # (examples, sum of widths)
    if ours.shape != teacher.shape:
        raise PluginError(
            f"the blocks give hidden states of {tuple(ours.shape)}, and {tuple(teacher.shape)} are kept of the teacher",
            hint="each forward must run the same blocks; or learn from the outputs alone: --set distill.hidden_weight=0",
        )
    return (ours - teacher).square().sum(1) / len(student)


def _rows(padded: "Tensor", lengths: "Tensor", count: int) -> "Tensor":
    """Return the rows of all examples, `count` in all, one after another, without the padding."""
    import torch

    if padded.shape[1] == 1 and len(padded) == count:  # no mask, whose size a device would have to tell the CPU
        return padded[:, 0]
    return padded[torch.arange(padded.shape[1], device=padded.device) < lengths.to(padded.device)[:, None]]


def soft_cross_entropy(student: "Tensor", teacher: "Tensor", temperature: float) -> "Tensor":
    """Return `T² · Σ KL(softmax(teacher / T) ‖ softmax(student / T))`, a float32 scalar, for logits (rows, outputs).

    `T²` keeps the size of the gradient when the temperature changes (Hinton et al., 2015, sec. 2).
    """
    import torch.nn.functional as F

    targets, logs = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)  # (rows, outputs) each
    return temperature**2 * F.kl_div(logs, targets, reduction="sum", log_target=True)


def soft_binary_cross_entropy(student: "Tensor", teacher: "Tensor", temperature: float) -> "Tensor":
    """Return the same as `soft_cross_entropy` where each output is a decision of its own: the sum over all of them."""
    import torch.nn.functional as F

    targets, logits = (teacher / temperature).sigmoid(), student / temperature  # (rows, outputs) each
    entropy = F.binary_cross_entropy_with_logits(teacher / temperature, targets, reduction="none")  # (rows, outputs)
    return temperature**2 * (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") - entropy).sum()


def squared_errors(student: "Tensor", teacher: "Tensor", _: float) -> "Tensor":
    """Return the sum of the squared differences, a float32 scalar; numbers have no temperature."""
    return (student - teacher).square().sum()


def check_targets(targets: "Tensor | Ragged | LabelMaps", outputs: int, origin: str) -> None:
    """Check that there are targets, and that those that are numbers of outputs have one of the head's.

    Raises:
        DataError: There are none, or one has no output. The message names the `origin`.
    """
    from recap_cli.core.label_maps import LabelMaps
    from recap_cli.core.ragged import Ragged

    if len(targets) == 0:
        raise DataError(f"{origin} holds no examples")
    if isinstance(targets, LabelMaps):  # whose pixels are checked when they are read
        return
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
