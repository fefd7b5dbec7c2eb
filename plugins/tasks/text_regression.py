"""A number for each text, or pair of texts: mean squared error, Pearson's and Spearman's correlation."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from recap_cli.api import Batch, DataError, Distillation, LabelColumn, Labels, Metric, Target, Task, squared_errors

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

LARGEST = 3.4e38  # of float32, rounded down
CHOOSE = "choose the column of the numbers with --set data.label=NAME"


def may_be_numbers(kind: "pa.DataType") -> bool:
    """Whether a column of this type may hold numbers: as such, or as texts, which csv files have if one row is odd."""
    from pyarrow import types

    number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return bool(number or types.is_string(kind) or types.is_large_string(kind))


def vary(column: "pa.ChunkedArray") -> bool:
    """Whether a column has more than two different values that are numbers, as measurements do."""
    found = column.slice(0, 2000).unique().to_pylist()
    return len(found) > 2 and all(value is not None and math.isfinite(_number(value)) for value in found)


def learn(columns: Sequence[LabelColumn]) -> Labels:
    """Return the one output, named as its column. Raises `DataError` if the numbers are all the same, or not finite."""
    (column,) = columns
    values = numbers_of(column)
    if len(set(values)) < 2:
        raise DataError(f"{column.place} holds only one number, {values[0]:g}", hint=CHOOSE)
    return Labels((column.name,))


def encode(columns: Sequence[LabelColumn], _: Labels) -> "pa.ChunkedArray":
    """Return the numbers, float64."""
    import pyarrow as pa

    (column,) = columns
    return pa.chunked_array([pa.array(numbers_of(column), pa.float64())])


def numbers_of(column: LabelColumn) -> list[float]:
    """Return the numbers of a column. Raises `DataError` for a value that is none, or not finite; the message names the row."""
    if not may_be_numbers(column.values.type):
        raise DataError(f"{column.place} holds values of type {column.values.type}; expected numbers", hint=CHOOSE)
    written = column.values.to_pylist()
    values = [_number(value) for value in written]
    for row, (value, text) in enumerate(zip(values, written, strict=True), 1):
        if not -LARGEST < value < LARGEST:
            odd = isinstance(text, str) and math.isnan(value)
            raise DataError(
                f"{column.place} holds {text!r} in row {row}, which is no {'number' if odd else 'finite number of 32 bits'}",
                hint=f"correct the row, or remove it; or {CHOOSE}" if odd else "correct the row, or remove it",
            )
    return values


def _number(value: Any) -> float:
    """Return a number, or that of a text; NaN if the text is none."""
    try:
        return math.nan if "_" in str(value) else float(value)  # Python's own spelling, which a file does not mean
    except ValueError:
        return math.nan


def loss(logits: "Tensor", batch: Batch) -> "Tensor":
    """Return the sum of the squared errors, a float32 scalar, for `logits` (batch, 1) of any type."""
    return (logits.float()[:, 0] - batch["labels"]).square().sum()


def score(stream: Iterable[tuple["Tensor", Batch]], _: Sequence[str]) -> dict[str, float]:
    """Return the metrics of the predicted numbers. A correlation with numbers that are all the same is 0."""
    import torch

    pairs = [(logits.float()[:, 0].cpu(), batch["labels"].cpu()) for logits, batch in stream]  # (batch,) each
    predicted, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))  # (examples,) each
    return metrics_of(predicted, targets)


def metrics_of(predicted: "Tensor", targets: "Tensor") -> dict[str, float]:
    """Return the metrics of predicted and true numbers, both (examples,), float32."""
    from torchmetrics.functional import regression as metrics

    varies = all(len(values) > 1 and bool((values != values[0]).any()) for values in (predicted, targets))
    return {
        # In float64: a spread that is small beside its mean would be lost.
        "pearson": float(metrics.pearson_corrcoef(predicted.double(), targets.double())) if varies else 0.0,
        "spearman": float(metrics.spearman_corrcoef(predicted.double(), targets.double())) if varies else 0.0,
        "mse": float(metrics.mean_squared_error(predicted, targets)),
    }


def constant(targets: "Tensor", _: Sequence[str]) -> dict[str, float]:
    """Return the figures of the mean as the answer for every example."""
    spread = float(targets.double().var(correction=0))
    return {"loss": spread, "pearson": 0.0, "spearman": 0.0, "mse": spread}


def predict(logits: "Tensor", batch: Batch, _: Sequence[str]) -> dict[str, list[Any]]:
    """Return for each example its number, the predicted one, and the squared error."""
    predicted, targets = logits.float()[:, 0], batch["labels"]  # (batch,) each
    return {
        "label": targets.tolist(),
        "predicted": predicted.tolist(),
        "loss": (predicted - targets).square().tolist(),
    }


def rows(logits: "Tensor", _: Batch) -> "Tensor":
    """Return what a teacher teaches: its numbers, (batch, 1)."""
    return logits


NUMBER = Target("numbers", learn, encode, can_be=may_be_numbers, is_likely=vary, blank=lambda _: 0.0)

TEXT_REGRESSION = Task(
    title="a number for each text, or pair of texts",
    inputs="text",
    target=NUMBER,
    auto_class="AutoModelForSequenceClassification",
    problem_type="regression",
    fewest=1,
    loss=loss,
    metrics=(Metric("pearson"), Metric("spearman"), Metric("mse", "less")),
    score=score,
    constant=constant,
    predict=predict,
    distillation=Distillation(rows, squared_errors),
)
