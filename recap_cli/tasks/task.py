"""What a model is trained for: the kind of task, its loss, and labels that fit the head."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from recap_cli.errors import DataError

if TYPE_CHECKING:  # comparing two metrics needs no torch
    from torch import Tensor

Kind = Literal["text-classification", "image-classification"]
Metric = Literal["accuracy", "f1", "matthews", "loss"]

KINDS: tuple[Kind, ...] = ("text-classification", "image-classification")
METRICS: tuple[Metric, ...] = ("accuracy", "f1", "matthews", "loss")
LESS_IS_BETTER: frozenset[str] = frozenset({"loss"})  # for all other metrics, more is better


@dataclass(frozen=True)
class Task:
    """A classification task. `metric` decides which round is best; `num_labels` is the width of the head."""

    kind: Kind
    metric: Metric
    num_labels: int


def goodness(metric: str, value: float) -> float:
    """Return the value of a metric, negated if less is better: more goodness is better for every metric."""
    return -value if metric in LESS_IS_BETTER else value


def is_better(metric: str, value: float, than: float) -> bool:
    """Whether one value of a metric is better than another. Equal values are not."""
    return goodness(metric, value) > goodness(metric, than)


def loss(logits: "Tensor", labels: "Tensor") -> "Tensor":
    """Return the mean cross entropy over the batch, a float32 scalar, for `logits` (batch, labels) of any type."""
    import torch.nn.functional as F

    return F.cross_entropy(logits.float(), labels)


def check_labels(labels: "Tensor", num_labels: int, origin: str) -> None:
    """Check that there are labels, and that each has one of the head's `num_labels` outputs.

    Raises:
        DataError: There are none, or a label has no output. The message names the `origin`.
    """
    if len(labels) == 0:
        raise DataError(f"{origin} holds no examples")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_labels:
        raise DataError(
            f"the labels of {origin} go from {low} to {high}, but the head has {num_labels} outputs (0 … {num_labels - 1})",
            hint="evaluate the model on data with its labels, or make a new state for this data with `recap init`",
        )
