"""How good a model is on a split: its loss and all metrics at once, computed by torchmetrics."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recap_cli.data.sampling import batches
from recap_cli.data.splits import Split
from recap_cli.progress import Track, silent
from recap_cli.tasks.task import Task, check_labels, loss


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


def evaluate(
    forward: Callable[[dict[str, Tensor]], Tensor], split: Split, task: Task, how: Pass, each: "Examples | None" = None
) -> dict[str, float]:
    """The mean loss over the examples of `split`, and the metrics that `score` gives, under the keys of `task.metric`.

    Args:
        forward: a batch on the device to logits, (batch, labels); its model is in evaluation mode.
        split: the examples.
        task: what they are scored by.
        how: batches and device.
        each: takes note of every example.

    Raises:
        DataError: a label has no output of the head, or an image cannot be decoded.
    """
    check_labels(split.labels, task.num_labels, split.origin)
    total_loss, predictions = 0.0, []
    steps = -(-len(split) // how.batch_size)
    with torch.inference_mode():
        for batch in how.track(batches(split, torch.arange(len(split)), how.batch_size, device=how.device), how.label, steps):
            logits = forward(batch)  # (batch, labels)
            total_loss += float(loss(logits, batch["labels"])) * len(logits)
            predictions.append(logits.argmax(dim=-1).cpu())
            if each is not None:
                each.add(logits, batch["labels"])
    return {"loss": total_loss / len(split), **score(torch.cat(predictions), split.labels, task.num_labels)}


@dataclass(frozen=True)
class Examples:
    """Of each example, in order: the label that is predicted, its probability, and the loss of the true one."""

    predicted: list[int] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take note of a batch: logits (batch, labels), labels (batch,)."""
        logs = logits.float().log_softmax(dim=-1)
        self.predicted.extend(logits.argmax(dim=-1).tolist())
        self.probability.extend(logs.exp().amax(dim=-1).tolist())
        self.loss.extend((-logs.gather(1, labels[:, None])[:, 0]).tolist())


def chance(labels: Tensor, num_labels: int) -> dict[str, float]:
    """What the best answer that is the same for every example gives on these labels, under the keys that `evaluate` has.

    The metrics are those of `score`, to the bit, so that a model of one answer is exactly at chance. The loss is that of the
    shares of the labels as probabilities, their entropy; an evaluation rounds it otherwise.
    """
    counts = torch.bincount(labels, minlength=num_labels)  # (labels,)
    # The most frequent label is best by every metric, but for F1 of two labels, which is that of label 1.
    answers = {int(counts.argmax())} | ({1} if num_labels == 2 else set())
    found = [score(torch.full_like(labels, answer), labels, num_labels) for answer in answers]
    shares = counts[counts > 0].double() / len(labels)
    best = {name: max(one[name] for one in found) for name in found[0]}
    return {"loss": float(-(shares * shares.log()).sum()), **best}


def score(predictions: Tensor, labels: Tensor, num_labels: int) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation of predicted against true labels, both (examples,), int64.

    F1 is that of label 1 if there are two labels, as GLUE has it, and otherwise the mean over the labels (macro). Matthews'
    correlation is 0 where all predictions, or all labels, are the same, as scikit-learn and GLUE have it; torchmetrics gives
    0.025 for a model that says 1 to every sentence of CoLA.
    """
    from torchmetrics.functional import classification as metrics

    if num_labels == 2:
        f1 = metrics.binary_f1_score(predictions, labels)
    else:
        f1 = metrics.multiclass_f1_score(predictions, labels, num_labels, average="macro")
    varies = bool((predictions != predictions[0]).any()) and bool((labels != labels[0]).any())
    return {
        "accuracy": float(metrics.multiclass_accuracy(predictions, labels, num_labels, average="micro")),
        "f1": float(f1),
        "matthews": float(metrics.multiclass_matthews_corrcoef(predictions, labels, num_labels)) if varies else 0.0,
    }
