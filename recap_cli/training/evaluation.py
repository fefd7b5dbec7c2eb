"""Evaluation of a model on a split: its loss and all metrics, computed by torchmetrics."""

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
    """Evaluate a model.

    Args:
        forward: Maps a batch on the device to logits, (batch, labels). The model is in evaluation mode.
        split: The examples.
        task: The task.
        how: Batches and device.
        each: Collects the prediction and loss of each example.

    Returns:
        The mean loss over the examples, and the metrics of `score`, under the keys of `task.metric`.

    Raises:
        DataError: A label has no output of the head, or an image cannot be decoded.
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
    """For each example, in order: the predicted label, its probability, and the loss of the true label."""

    predicted: list[int] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (batch, labels), labels (batch,)."""
        logs = logits.float().log_softmax(dim=-1)
        self.predicted.extend(logits.argmax(dim=-1).tolist())
        self.probability.extend(logs.exp().amax(dim=-1).tolist())
        self.loss.extend((-logs.gather(1, labels[:, None])[:, 0]).tolist())


def chance(labels: Tensor, num_labels: int) -> dict[str, float]:
    """Return the figures of the best constant answer on these labels, under the keys of `evaluate`.

    The metrics are those of `score`, to the bit, so that a model with a constant answer is exactly at chance. The loss is the
    entropy of the labels; an evaluation rounds it differently.
    """
    counts = torch.bincount(labels, minlength=num_labels)  # (labels,)
    # The most frequent label is best by every metric except F1 of two labels, which is that of label 1.
    answers = {int(counts.argmax())} | ({1} if num_labels == 2 else set())
    found = [score(torch.full_like(labels, answer), labels, num_labels) for answer in answers]
    shares = counts[counts > 0].double() / len(labels)
    best = {name: max(one[name] for one in found) for name in found[0]}
    return {"loss": float(-(shares * shares.log()).sum()), **best}


def score(predictions: Tensor, labels: Tensor, num_labels: int) -> dict[str, float]:
    """Return accuracy, F1 and Matthews' correlation of predicted and true labels, both (examples,), int64.

    With two labels F1 is that of label 1, as in GLUE; with more it is the mean over the labels (macro). Matthews' correlation
    is 0 if all predictions, or all labels, are the same, as in scikit-learn and GLUE. torchmetrics would give 0.025 for a model
    that predicts 1 for every sentence of CoLA.
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
