"""One class for each text or image: cross entropy, accuracy, F1 and Matthews' correlation."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from recap_cli.api import (
    Batch,
    Distillation,
    LabelColumn,
    Labels,
    Metric,
    Target,
    Task,
    label_numbers,
    may_be_classes,
    read_labels,
    repeats,
    soft_cross_entropy,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor


def learn(columns: Sequence[LabelColumn]) -> Labels:
    """Return the classes of a column: its names sorted, or its whole numbers."""
    (column,) = columns
    return read_labels(column.values, column.names, column.place, words=column.words)


def encode(columns: Sequence[LabelColumn], labels: Labels) -> "pa.ChunkedArray":
    """Return the number of each example's class, int64."""
    (column,) = columns
    return label_numbers(column.values, labels, column.names, column.place)


def loss(logits: "Tensor", batch: Batch) -> "Tensor":
    """Return the sum of the cross entropies, a float32 scalar, for `logits` (batch, labels) of any type."""
    import torch.nn.functional as F

    return F.cross_entropy(logits.float(), batch["labels"], reduction="sum")


def score(stream: Iterable[tuple["Tensor", Batch]], labels: Sequence[str]) -> dict[str, float]:
    """Return the metrics of the most probable classes."""
    import torch

    pairs = [(logits.argmax(dim=-1).cpu(), batch["labels"].cpu()) for logits, batch in stream]  # (batch,) each
    predictions, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))  # (examples,) each
    return metrics_of(predictions, targets, len(labels))


def metrics_of(predictions: "Tensor", targets: "Tensor", count: int) -> dict[str, float]:
    """Return accuracy, F1 and Matthews' correlation of predicted and true classes, both (examples,), int64.

    With two classes F1 is that of class 1, as in GLUE; with more it is the mean over the classes (macro). Matthews' correlation
    is 0 if all predictions, or all targets, are the same, as in scikit-learn and GLUE. torchmetrics would give 0.025 for a
    model that predicts 1 for every sentence of CoLA.
    """
    from torchmetrics.functional import classification as metrics

    if count == 2:
        f1 = metrics.binary_f1_score(predictions, targets)
    else:
        f1 = metrics.multiclass_f1_score(predictions, targets, count, average="macro")
    varies = bool((predictions != predictions[0]).any()) and bool((targets != targets[0]).any())
    return {
        "accuracy": float(metrics.multiclass_accuracy(predictions, targets, count, average="micro")),
        "f1": float(f1),
        "matthews": float(metrics.multiclass_matthews_corrcoef(predictions, targets, count)) if varies else 0.0,
    }


def constant(targets: "Tensor", labels: Sequence[str]) -> dict[str, float]:
    """Return the figures of the best answer that is the same for every example.

    The metrics are computed as `score` does, to the bit, so that a model with a constant answer is exactly at chance. The loss
    is the entropy of the classes; an evaluation rounds it differently.
    """
    import torch

    counts = torch.bincount(targets, minlength=len(labels))  # (labels,)
    # The most frequent class is best by every metric except F1 of two classes, which is that of class 1.
    answers = {int(counts.argmax())} | ({1} if len(labels) == 2 else set())
    found = [metrics_of(torch.full_like(targets, answer), targets, len(labels)) for answer in answers]
    shares = counts[counts > 0].double() / len(targets)
    best = {name: max(one[name] for one in found) for name in found[0]}
    return {"loss": float(-(shares * shares.log()).sum()), **best}


def predict(logits: "Tensor", batch: Batch, labels: Sequence[str]) -> dict[str, list[Any]]:
    """Return for each example its class, the predicted one, that one's probability, and the loss of the true one."""
    logs = logits.float().log_softmax(dim=-1)  # (batch, labels)
    targets = batch["labels"]
    return {
        "label": [labels[number] for number in targets.tolist()],
        "predicted": [labels[number] for number in logits.argmax(dim=-1).tolist()],
        "probability": logs.exp().amax(dim=-1).tolist(),
        "loss": (-logs.gather(1, targets[:, None])[:, 0]).tolist(),
    }


def rows(logits: "Tensor", _: Batch) -> "Tensor":
    """Return what a teacher teaches: the logits, (batch, labels)."""
    return logits


CLASS = Target("labels", learn, encode, can_be=may_be_classes, is_likely=repeats, stratified=True)

TEXT_CLASSIFICATION = Task(
    title="one class for each text, or pair of texts",
    inputs="text",
    target=CLASS,
    auto_class="AutoModelForSequenceClassification",
    problem_type="single_label_classification",
    loss=loss,
    metrics=(Metric("accuracy"), Metric("f1"), Metric("matthews")),
    score=score,
    constant=constant,
    predict=predict,
    distillation=Distillation(rows, soft_cross_entropy),
)

IMAGE_CLASSIFICATION = replace(
    TEXT_CLASSIFICATION,
    title="one class for each image",
    inputs="image",
    auto_class="AutoModelForImageClassification",
    timm=True,
)
