"""How good a model is on a split: its loss and all metrics at once, computed by torchmetrics."""

from collections.abc import Callable

import torch
from torch import Tensor

from recap_cli.progress import Track, silent
from recap_cli.runtime.data import Split
from recap_cli.runtime.order import batches
from recap_cli.runtime.tasks import Task, check_labels, loss


def evaluate(
    forward: Callable[[dict[str, Tensor]], Tensor],
    split: Split,
    task: Task,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    track: Track = silent,
    label: str = "evaluate",
) -> dict[str, float]:
    """The mean loss over the examples of `split`, and the metrics that `score` gives, under the keys of `task.metric`.

    `forward` maps a batch on `device` to logits, (batch, labels), and has the model in evaluation mode.

    Raises `DataError` if a label has no output of the head, or an image cannot be decoded.
    """
    check_labels(split.labels, task.num_labels, split.origin)
    total_loss, predictions = 0.0, []
    steps = -(-len(split) // batch_size)
    with torch.inference_mode():
        for batch in track(batches(split, torch.arange(len(split)), batch_size, device=device), label, steps):
            logits = forward(batch)  # (batch, labels)
            total_loss += float(loss(logits, batch["labels"])) * len(logits)
            predictions.append(logits.argmax(dim=-1).cpu())
    return {"loss": total_loss / len(split), **score(torch.cat(predictions), split.labels, task.num_labels)}


def score(predictions: Tensor, labels: Tensor, num_labels: int) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation of predicted against true labels, both (examples,), int64.

    F1 is that of label 1 if there are two labels, as GLUE has it, and otherwise the mean over the labels (macro).
    """
    from torchmetrics.functional import classification as metrics

    if num_labels == 2:
        f1 = metrics.binary_f1_score(predictions, labels)
    else:
        f1 = metrics.multiclass_f1_score(predictions, labels, num_labels, average="macro")
    return {
        "accuracy": float(metrics.multiclass_accuracy(predictions, labels, num_labels, average="micro")),
        "f1": float(f1),
        "matthews": float(metrics.multiclass_matthews_corrcoef(predictions, labels, num_labels)),
    }
