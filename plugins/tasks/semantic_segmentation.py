"""A class for each pixel of an image: mean intersection over union, from models that give logits, or masks and their classes.

A model of `AutoModelForSemanticSegmentation` gives logits on a coarser grid, which are interpolated to the size of the labels,
as transformers has it. One of `AutoModelForUniversalSegmentation` gives queries, each with a mask and a class (Cheng et al.,
2021 and 2022); its loss, with its matching and its sampled points, is the model's own. OneFormer (Jain et al., 2023) is such a
model, and is told the task in words.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from recap_cli.api import (
    IGNORED,
    Batch,
    DataError,
    Distillation,
    LabelColumn,
    Labels,
    Metric,
    PluginError,
    Target,
    Task,
    soft_cross_entropy,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

SIZES = "label_sizes"
GRID = 4  # a student learns a teacher's outputs at every fourth pixel of a row and of a column, as fine as most models see
SEEN = 200  # rows that are looked at
MOST = 256  # classes that nobody has named: maps of depths or of objects have more values
NAME = "name the classes with --set data.classes=FILE, and what is no class with --set 'data.ignore_index=[0,255]'"
LOSSLESS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm")
TINY = 1e-6  # of a probability, below which its logarithm is cut off


class Queries(NamedTuple):
    """What a model with queries gives.

    Attributes:
        loss: Its own, the mean of a batch, a scalar; None where it was not given the labels.
        classes: Logits, (batch, queries, labels + 1); the last is of no object.
        masks: Logits, (batch, queries, height, width).
    """

    loss: "Tensor | None"
    classes: "Tensor"
    masks: "Tensor"


def may_be_maps(kind: "pa.DataType") -> bool:
    """Whether a column of this type may hold label maps: paths, encoded images, or structs of both."""
    from pyarrow import types

    return bool(types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind) or _is_text(kind))


def are_maps(column: "pa.ChunkedArray") -> bool:
    """Whether a column looks like label maps: texts are paths of images without loss."""
    first = column.slice(0, SEEN).to_pylist() if _is_text(column.type) else []
    return all(str(value).lower().endswith(LOSSLESS) for value in first)


def _is_text(kind: "pa.DataType") -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind))


def learn(columns: Sequence[LabelColumn]) -> Labels:
    """Return the classes of maps that nobody has named: the values that occur, which are sorted.

    Raises:
        DataError: There is only one, or there are more than classes have.
    """
    (column,) = columns
    values = [str(value) for value in column.values.to_pylist()]
    if len(values) < 2:
        raise DataError(f"the maps of {column.place} have no value but {values[0]}, apart from what is ignored", hint=NAME)
    if len(values) > MOST:
        raise DataError(f"the maps of {column.place} have {len(values):,} different values, and so no classes", hint=NAME)
    return Labels(tuple(values))


def encode(columns: Sequence[LabelColumn], labels: Labels) -> "pa.ChunkedArray":
    """Return the maps as they are: their pixels are read when they are used."""
    return columns[0].values


def read(output: Any) -> Any:
    """Return the logits, (batch, labels, height, width), or `Queries`."""
    if (classes := getattr(output, "class_queries_logits", None)) is not None:
        own = getattr(output, "loss", None)
        return Queries(None if own is None else own.reshape(()), classes, output.masks_queries_logits)  # OneFormer's is of (1,)
    return output.logits


def feed(batch: Batch, wanted: Collection[str], outputs: int) -> Batch:
    """Return the masks of the classes that each image shows, and these classes, for a model that computes its own loss.

    `mask_labels` are (classes, height, width) of 0 and 1, float32, and `class_labels` (classes,), int64; of each image.
    """
    if "mask_labels" not in wanted:
        return {}
    import torch

    found: list[Tensor] = []
    classes: list[Tensor] = []
    for labels in _at_images(batch):  # (height, width)
        counted = torch.zeros(outputs + 1, dtype=torch.int64, device=labels.device)
        counted.scatter_add_(0, labels.flatten().clamp(min=-1) + 1, torch.ones_like(labels.flatten()))  # what is ignored first
        shown = [number for number, pixels in enumerate(counted.tolist()[1:]) if pixels]
        numbers = torch.tensor(shown, dtype=torch.int64, device=labels.device)
        found.append((labels[None] == numbers[:, None, None]).float())
        classes.append(numbers)
    return {"mask_labels": found, "class_labels": classes}


def _at_images(batch: Batch) -> "Iterator[Tensor]":
    """Yield each map of labels at the size of its image, by the nearest pixel."""
    import torch

    height, width = batch["pixel_values"].shape[-2:]
    for labels in maps_in(batch):
        if labels.shape == (height, width):
            yield labels
            continue
        rows = ((torch.arange(height, device=labels.device) + 0.5) * (labels.shape[0] / height)).long()
        columns = ((torch.arange(width, device=labels.device) + 0.5) * (labels.shape[1] / width)).long()
        yield labels[rows[:, None], columns]


def maps_in(batch: Batch) -> "list[Tensor]":
    """Return the labels of each image, (height, width), without padding."""
    labels = batch["labels"]
    if SIZES not in batch:
        return list(labels)
    return [one[:height, :width] for one, (height, width) in zip(labels, batch[SIZES].tolist(), strict=True)]


def scores_of(outputs: Any) -> "Tensor":
    """Return a score for each class and place, (batch, labels, height, width), float32, on the grid of the model.

    They are logits; of queries, the sum of their masks by the probabilities of their classes, as in MaskFormer (sec. 3.4).
    """
    import torch

    if not isinstance(outputs, Queries):
        return outputs.float()
    classes = outputs.classes.float().softmax(-1)[..., :-1]  # (batch, queries, labels)
    return torch.einsum("bqc,bqhw->bchw", classes, outputs.masks.float().sigmoid())


def at_size(scores: "Tensor", size: Sequence[int]) -> "Tensor":
    """Return scores (batch, labels, height, width) at another (height, width), interpolated bilinearly."""
    import torch.nn.functional as F

    if tuple(scores.shape[-2:]) == tuple(size):
        return scores
    return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)


def loss(outputs: Any, batch: Batch) -> "Tensor":
    """Return the sum of the cross entropies of the pixels, a float32 scalar; or a model's own mean loss, as often."""
    import torch
    import torch.nn.functional as F

    if isinstance(outputs, Queries):
        if outputs.loss is None:
            raise PluginError("a model with queries gave no loss")
        return outputs.loss.float() * count(batch)
    labels = batch["labels"]
    if SIZES not in batch and outputs.requires_grad:
        scores = at_size(outputs.float(), labels.shape[1:])  # (batch, labels, height, width)
        return F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum")
    each = (_loss_of(outputs[i : i + 1], one) for i, one in enumerate(maps_in(batch)))  # one at a time: maps may be large
    return sum(each, start=torch.zeros((), device=outputs.device))


def _loss_of(logits: "Tensor", labels: "Tensor") -> "Tensor":
    import torch.nn.functional as F

    return F.cross_entropy(at_size(logits.float(), labels.shape), labels[None], ignore_index=IGNORED, reduction="sum")


def count(batch: Batch) -> "Tensor":
    """Return how many pixels of a batch are counted."""
    return (batch["labels"] != IGNORED).sum()


def maps_of(outputs: Any, batch: Batch) -> "list[Tensor]":
    """Return the predicted class of each pixel, int64, (height, width), at the size of the labels of each image."""
    scores = scores_of(outputs)
    return [at_size(scores[i : i + 1], labels.shape)[0].argmax(0) for i, labels in enumerate(maps_in(batch))]


def confusion_of(found: "Tensor", wanted: "Tensor", classes: int) -> "Tensor":
    """Return how often each true class, by row, is predicted as each class, int64, (classes, classes), on the CPU."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    matrix: Tensor = multiclass_confusion_matrix(found, wanted, classes, ignore_index=IGNORED, validate_args=False)
    return matrix.cpu()


def score(stream: Iterable[tuple[Any, Batch]], labels: Sequence[str]) -> dict[str, float]:
    """Return the metrics of the best classes of all pixels that are counted, and the IoU of each class.

    A class that no pixel has, and that is predicted for none, has no IoU.
    """
    import torch

    total = torch.zeros(len(labels), len(labels), dtype=torch.int64)
    for outputs, batch in stream:
        for found, wanted in zip(maps_of(outputs, batch), maps_in(batch), strict=True):
            total += confusion_of(found, wanted, len(labels))
    return metrics_of(total, labels)


def metrics_of(confusion: "Tensor", labels: Sequence[str]) -> dict[str, float]:
    """Return the metrics of a confusion matrix, (labels, labels), the true class by row.

    `miou` is the mean IoU of the classes that occur, in the truth or in the prediction; `mean_accuracy` the mean share of the
    pixels of each class that are found.
    """
    matrix = confusion.double()
    right, true, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)  # (labels,) each
    union = true + predicted - right
    iou, found = right / union.clamp(min=1), right / true.clamp(min=1)  # (labels,) each
    occurs, there = union > 0, true > 0
    return {
        "miou": float(iou[occurs].mean()) if occurs.any() else 0.0,
        "pixel_accuracy": float(right.sum() / true.sum().clamp(min=1)),
        "mean_accuracy": float(found[there].mean()) if there.any() else 0.0,
        **{f"iou/{name}": float(value) for name, value, one in zip(labels, iou, occurs, strict=True) if one},
    }


def constant(targets: Any, labels: Sequence[str]) -> dict[str, float]:
    """Return the figures of the most frequent class, predicted for every pixel."""
    import torch

    pixels = targets.pixels_of(len(labels))  # (labels,)
    shares = pixels[pixels > 0].double() / max(1, int(pixels.sum()))
    confusion = torch.zeros(len(labels), len(labels), dtype=torch.int64)
    confusion[:, int(pixels.argmax())] = pixels
    figures = metrics_of(confusion, labels)
    return {"loss": float(-(shares * shares.log()).sum()), **{name: figures[name] for name in METRICS}}


def predict(outputs: Any, batch: Batch, labels: Sequence[str]) -> dict[str, list[Any]]:
    """Return for each image the classes that it shows and the predicted ones, the most frequent first, with its figures."""
    rows: dict[str, list[Any]] = {name: [] for name in ("label", "predicted", "miou", "pixel_accuracy", "loss")}
    scores = scores_of(outputs)
    for i, (found, wanted) in enumerate(zip(maps_of(outputs, batch), maps_in(batch), strict=True)):
        figures = metrics_of(confusion_of(found, wanted, len(labels)), labels)
        rows["label"].append(_shown(wanted[wanted != IGNORED], labels))
        rows["predicted"].append(_shown(found, labels))
        counted = bool((wanted != IGNORED).any())
        rows["miou"].append(figures["miou"] if counted else None)
        rows["pixel_accuracy"].append(figures["pixel_accuracy"] if counted else None)
        logits = logits_of_scores(scores[i : i + 1], outputs)
        rows["loss"].append(float(_loss_of(logits, wanted)) / max(1, int((wanted != IGNORED).sum())))
    return rows


def _shown(numbers: "Tensor", labels: Sequence[str]) -> str:
    pixels = numbers.flatten().bincount(minlength=len(labels))  # (labels,)
    order = pixels.argsort(descending=True, stable=True).tolist()
    return ", ".join(labels[number] for number in order if pixels[number] > 0)


def logits_of_scores(scores: "Tensor", outputs: Any) -> "Tensor":
    """Return logits of the classes of each place: of queries, the logarithm of the scores, which are sums of probabilities."""
    return scores.clamp(min=TINY).log() if isinstance(outputs, Queries) else scores


def rows(outputs: Any, batch: Batch) -> "Tensor":
    """Return what a teacher teaches: the logits at every fourth pixel of the labels' rows and columns, (rows, labels)."""
    logits = logits_of_scores(scores_of(outputs), outputs)  # (batch, labels, height, width)
    size = [-(-side // GRID) for side in batch["labels"].shape[1:]]
    return at_size(logits, size).permute(0, 2, 3, 1).flatten(0, 2)


def soft_loss(student: "Tensor", teacher: "Tensor", temperature: float) -> "Tensor":
    """Return the loss of a teacher's rows, a float32 scalar; each stands for the pixels around it."""
    return soft_cross_entropy(student, teacher, temperature) * GRID**2


def pixels(batch: Batch) -> int:
    """Return for how many pixels a teacher's rows stand: all, also those that the labels leave out."""
    return int(batch["labels"].numel())


def rows_of_each(batch: Batch) -> "Tensor":
    """Return how many rows each image has for a teacher, int64, (batch,)."""
    import torch

    height, width = (-(-side // GRID) for side in batch["labels"].shape[1:])
    return torch.full((len(batch["labels"]),), height * width, dtype=torch.int64)


METRICS = ("miou", "pixel_accuracy", "mean_accuracy")
MAPS = Target(
    "label maps: images with a class for each pixel",
    learn,
    encode,
    can_be=may_be_maps,
    is_likely=are_maps,
    maps=True,
)

SEMANTIC_SEGMENTATION = Task(
    title="a class for each pixel of an image",
    inputs="image",
    target=MAPS,
    auto_class="AutoModelForSemanticSegmentation",
    other_classes=("AutoModelForUniversalSegmentation", "AutoModelForInstanceSegmentation"),
    prompt="the task is semantic",  # as OneFormer's processor writes it
    loss=loss,
    count=count,
    read=read,
    feed=feed,
    draws=True,
    metrics=tuple(map(Metric, METRICS)),
    by_label=("iou",),
    score=score,
    constant=constant,
    predict=predict,
    maps_of=maps_of,
    distillation=Distillation(rows, soft_loss, rows_of_each, pixels),
    extra="segmentation",
)
