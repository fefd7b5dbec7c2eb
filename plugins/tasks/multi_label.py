"""Any number of classes for each text or image: binary cross entropy, F1 and mean average precision."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from recap_cli.api import (
    Batch,
    DataError,
    Distillation,
    LabelColumn,
    Labels,
    Metric,
    Target,
    Task,
    label_numbers,
    read_labels,
    soft_binary_cross_entropy,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

FORMS = (
    "name one column of lists with --set data.label=NAME (jsonl, parquet), or a column of 0 and 1 for each class with "
    "--set 'data.label=[NAME, NAME]'"
)


def may_be_sets(kind: "pa.DataType") -> bool:
    """Whether a column of this type may hold lists of classes, or 0 and 1 for one class."""
    from pyarrow import types

    return bool(is_list(kind) or types.is_integer(kind) or types.is_boolean(kind) or types.is_floating(kind))


def is_list(kind: "pa.DataType") -> bool:
    """Whether each value of a column of this type is a list."""
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def are_sets(column: "pa.ChunkedArray") -> bool:
    """Whether a column holds lists, or nothing but 0 and 1."""
    return is_list(column.type) or set(column.slice(0, 2000).unique().to_pylist()) <= {0, 1}


def learn(columns: Sequence[LabelColumn]) -> Labels:
    """Return the classes: the different values in the lists of one column, or the names of several columns of 0 and 1."""
    if len(columns) > 1:
        for column in columns:
            flags_of(column)
        return Labels(tuple(column.name for column in columns), words=False)
    (column,) = columns
    if not is_list(column.values.type):
        raise DataError(f"{column.place} holds values of type {column.values.type}; expected lists of classes", hint=FORMS)
    values, _ = flat(column)
    if len(values) == 0:
        raise DataError(f"{column.place} holds no class in any of its lists", hint=FORMS)
    return read_labels(values, column.names, column.place, words=column.words)


def encode(columns: Sequence[LabelColumn], labels: Labels) -> "pa.ChunkedArray":
    """Return a list for each example: 1 for a class that it has, else 0, float64, in the order of `labels`."""
    import numpy as np
    import pyarrow as pa

    if len(columns) > 1:
        flags = np.stack([flags_of(column) for column in columns], axis=1)  # (examples, classes)
    else:
        (column,) = columns
        values, rows = flat(column)
        flags = np.zeros((len(column.values), len(labels.names)))  # (examples, classes)
        if len(values) > 0:  # lists that are all empty may have no type
            numbers = label_numbers(values, labels, column.names, column.place, row_of=lambda index: int(rows[index]))
            flags[rows, numbers.to_numpy()] = 1.0
    return pa.chunked_array([pa.FixedSizeListArray.from_arrays(pa.array(flags.ravel()), flags.shape[1])])


def flat(column: LabelColumn) -> "tuple[pa.ChunkedArray, Any]":
    """Return what stands in the lists of a column, one after another, and the row of each, from 0."""
    import numpy as np
    import pyarrow.compute as pc

    values = pc.list_flatten(column.values)
    rows = np.repeat(np.arange(len(column.values)), pc.list_value_length(column.values).to_numpy().astype(np.int64))
    if (index := pc.index(values.is_null(), True).as_py()) >= 0:
        raise DataError(
            f"{column.place} has a list with a missing value in row {rows[index] + 1}", hint="correct the row, or remove it"
        )
    return values, rows


def flags_of(column: LabelColumn) -> Any:
    """Return a column of 0 and 1 (or false and true), float64, (examples,). Raises `DataError` for any other value."""
    import numpy as np

    values = column.values.to_pylist()
    bad = next((row for row, value in enumerate(values, 1) if value not in (0, 1)), None)
    if bad is not None:
        raise DataError(
            f"{column.place} holds {values[bad - 1]!r} in row {bad}; expected 0 or 1 in each of several columns of labels",
            hint=FORMS,
        )
    return np.array(values, dtype=np.float64)


def loss(logits: "Tensor", batch: Batch) -> "Tensor":
    """Return the sum of the binary cross entropies over examples and classes, a float32 scalar, of (batch, labels)."""
    import torch.nn.functional as F

    return F.binary_cross_entropy_with_logits(logits.float(), batch["labels"], reduction="sum")


def count(batch: Batch) -> int:
    """Return how many decisions a batch has: examples times classes."""
    return int(batch["labels"].numel())


def score(stream: Iterable[tuple["Tensor", Batch]], _: Sequence[str]) -> dict[str, float]:
    """Return the metrics of the classes' probabilities; a class is predicted from a probability of 1/2."""
    import torch

    pairs = [(logits.float().sigmoid().cpu(), batch["labels"].cpu()) for logits, batch in stream]  # (batch, labels) each
    probabilities, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))  # (examples, labels) each
    return metrics_of(probabilities, targets.long())


def metrics_of(probabilities: "Tensor", targets: "Tensor") -> dict[str, float]:
    """Return the metrics of probabilities and true classes, both (examples, labels), the latter 0 or 1, int64.

    `f1` and `map` are means over the classes (macro). A class that no example has counts for neither of them.
    """
    from torchmetrics.functional import classification as metrics

    there, count = targets.any(0), targets.shape[1]  # (labels,)
    found, wanted = probabilities[:, there], targets[:, there]  # (examples, labels that occur)
    predicted = probabilities >= 0.5  # (examples, labels)
    precision = [metrics.binary_average_precision(found[:, i], wanted[:, i]) for i in range(wanted.shape[1])]
    f1 = [metrics.binary_f1_score(found[:, i] >= 0.5, wanted[:, i]) for i in range(wanted.shape[1])]
    return {
        "f1": float(sum(f1)) / max(1, len(f1)),
        "micro_f1": float(metrics.multilabel_f1_score(predicted.long(), targets, count, average="micro")),
        "map": float(sum(precision)) / max(1, len(precision)),
        "exact": float((predicted == targets.bool()).all(1).float().mean()),
    }


def constant(targets: "Tensor", _: Sequence[str]) -> dict[str, float]:
    """Return the figures of the best answers that are the same for every example, each metric's own.

    F1 is best where every class is predicted, or those of more than half of its value (micro). Average precision of one
    probability for all examples is the share of the class.
    """
    import torch

    share = targets.double().mean(0)  # (labels,)
    there = share[share > 0]
    ranked = share.sort(descending=True).values
    micro = 2 * ranked.cumsum(0) / (torch.arange(1, len(ranked) + 1) + share.sum())  # of the most frequent classes together
    sets = Counter(tuple(row) for row in targets.tolist())
    entropy = -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share))
    return {
        "loss": float(entropy.mean()),
        "f1": float((2 * there / (1 + there)).mean()) if len(there) else 0.0,
        "micro_f1": float(micro.max()) if len(there) else 0.0,
        "map": float(there.mean()) if len(there) else 0.0,
        "exact": max(sets.values()) / len(targets),
    }


def predict(logits: "Tensor", batch: Batch, labels: Sequence[str]) -> dict[str, list[Any]]:
    """Return for each example its classes, the predicted ones with their probabilities, and the mean loss over the classes."""
    import torch.nn.functional as F

    probabilities, targets = logits.float().sigmoid(), batch["labels"]  # (batch, labels) each
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(1)  # (batch,)
    chosen = [[(name, p) for name, p in zip(labels, row, strict=True) if p >= 0.5] for row in probabilities.tolist()]
    return {
        "label": [", ".join(name for name, has in zip(labels, row, strict=True) if has) for row in targets.tolist()],
        "predicted": [", ".join(name for name, _ in row) for row in chosen],
        "probability": [", ".join(f"{p:.4f}" for _, p in row) for row in chosen],
        "loss": losses.tolist(),
    }


def rows(logits: "Tensor", _: Batch) -> "Tensor":
    """Return what a teacher teaches: the logits, (batch, labels)."""
    return logits


CLASSES = Target(
    "lists of labels (jsonl, parquet), or 0 and 1",
    learn,
    encode,
    can_be=may_be_sets,
    is_likely=are_sets,
    blank=lambda outputs: [0.0] * outputs,
    several=True,
)

TEXT_MULTI_LABEL = Task(
    title="any number of classes for each text, or pair of texts",
    inputs="text",
    target=CLASSES,
    auto_class="AutoModelForSequenceClassification",
    problem_type="multi_label_classification",
    loss=loss,
    count=count,
    metrics=(Metric("f1"), Metric("micro_f1"), Metric("map"), Metric("exact")),
    score=score,
    constant=constant,
    predict=predict,
    distillation=Distillation(rows, soft_binary_cross_entropy),
)

IMAGE_MULTI_LABEL = replace(
    TEXT_MULTI_LABEL,
    title="any number of classes for each image",
    inputs="image",
    auto_class="AutoModelForImageClassification",
    timm=True,
)
