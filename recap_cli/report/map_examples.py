"""What the models of a state make of its validation images: the best and the worst examples, and the IoU of each class.

Only the first examples are looked at, so that a page takes as long as scoring them by two models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recap_cli.core.label_maps import SIZES
from recap_cli.core.task import IGNORED, Batch, Task
from recap_cli.data import other_data
from recap_cli.data.images import ImageInputs, image_split
from recap_cli.data.label_maps import nearest
from recap_cli.data.map_classes import Colour, map_classes
from recap_cli.data.sampling import batches, seeded
from recap_cli.data.split import Split
from recap_cli.data.splits import make_split
from recap_cli.errors import PluginError
from recap_cli.progress import Track
from recap_cli.report.map_pictures import class_colours
from recap_cli.rounds.examples import inputs_of, read_raw, to_score
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.scoring import ready
from recap_cli.rounds.threads import on_fitting_threads
from recap_cli.state.store import State
from recap_cli.tasks.labels import check_names
from recap_cli.training.evaluation import SEED

if TYPE_CHECKING:
    from datasets import Dataset

LOOKED_AT = 64  # validation examples, the first ones
SHOWN = 3  # of the best, and as many of the worst
SIDE = 320  # pixels that a picture has at most along a side
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Predicted:
    """What a model predicts.

    Attributes:
        maps: the class of each pixel, int16, (height, width), of each example, no larger than a picture.
        counts: of the pixels of all of it, int64, (examples, 3, classes): see `counts_of`.
        round: after which the model is as it is.
    """

    maps: list[Array]
    counts: Tensor
    round: int

    @property
    def miou(self) -> list[float]:
        """The mIoU of each example; NaN where no pixel is counted."""
        values: list[float] = iou_of(self.counts).nanmean(-1).tolist()
        return values


@dataclass(frozen=True)
class Example:
    """An example that is shown.

    Attributes:
        place: where it is: its row in its source, and its file.
        image: (height, width, 3), uint8.
        truth: the class of each pixel or `IGNORED`, int16, (height, width); as the predictions are.
        full: of the full model.
        small: of the best small model.
        full_miou: of this image.
        small_miou: likewise.
    """

    place: str
    image: Array
    truth: Array
    full: Array
    small: Array
    full_miou: float
    small_miou: float


@dataclass(frozen=True)
class MapExamples:
    """What a page shows of the label maps of a state.

    Attributes:
        looked_at: how many validation examples were predicted.
        of: how many there are.
        labels: the names of the classes.
        colours: of the classes.
        best: the examples with the highest mIoU of the small model, the best first.
        worst: those with the lowest, the worst first.
        full_iou: of each class that occurs, of the full model, over all that were looked at.
        small_iou: of the small model, likewise: as it is stored, and on the same examples.
        full_round: after which the full model is as it is.
        small_round: of the small model.
    """

    looked_at: int
    of: int
    labels: Sequence[str]
    colours: Sequence[Colour]
    best: Sequence[Example]
    worst: Sequence[Example]
    full_iou: dict[str, float]
    small_iou: dict[str, float]
    full_round: int
    small_round: int


@on_fitting_threads
def map_examples(state: State, track: Track) -> MapExamples:
    """Predict the first validation examples by the full and by the best small model, of which there is one.

    Raises:
        RecapError: the data or a model cannot be read, or do not fit.
    """
    context = Context(state)
    recipe, spec = context.recipe, context.spec
    raw = read_raw(recipe)
    check_names(raw.label_names, spec.label_names, raw.train_origin)
    few = raw.validation.select(range(min(LOOKED_AT, len(raw.validation))))
    inputs = to_score(inputs_of(recipe, spec, context.processor()))
    split = make_split(few, inputs, origin=raw.validation_origin, workers=recipe.data.workers, track=track)
    full, small = (_predicted(context, name, split, track) for name in ("full", "best"))
    best, worst = extremes(small.miou)
    places, truths = _places(few), [shrunk(_truth(split, at)) for at in range(len(few))]

    def example(at: int) -> Example:
        truth = truths[at]
        image = _image(few.select([at]), inputs, truth.shape, raw.validation_origin)
        return Example(places[at], image, truth, full.maps[at], small.maps[at], full.miou[at], small.miou[at])

    labels = spec.label_names
    return MapExamples(
        looked_at=len(few),
        of=len(raw.validation),
        labels=labels,
        colours=class_colours(map_classes(recipe.data.model_dump()), len(labels)),
        best=list(map(example, best)),
        worst=list(map(example, worst)),
        full_iou=_by_label(full, labels),
        small_iou=_by_label(small, labels),
        full_round=full.round,
        small_round=small.round,
    )


def _by_label(found: Predicted, labels: Sequence[str]) -> dict[str, float]:
    """Return the IoU of each class that occurs, over all examples."""
    values = iou_of(found.counts.sum(0)).tolist()
    return {name: value for name, value in zip(labels, values, strict=True) if not isnan(value)}


def extremes(values: Sequence[float], most: int = SHOWN) -> tuple[list[int], list[int]]:
    """Return the places of the highest values and of the lowest, up to `most` each, the extreme ones first; no place twice.

    NaN is neither. Of equal values the first is higher.
    """
    known = [at for at, value in enumerate(values) if not isnan(value)]
    order = sorted(known, key=lambda at: -values[at])
    high = min(most, (len(order) + 1) // 2)
    low = min(most, len(order) - high)
    return order[:high], order[::-1][:low]


def counts_of(found: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Return how many counted pixels of each class are found, true, and predicted, int64, (3, classes), on the CPU.

    Args:
        found: The predicted class of each pixel, int64, (height, width).
        truth: The true one, or `IGNORED`, likewise.
        classes: How many there are.
    """
    counted = truth != IGNORED  # (height, width)
    right = truth[counted & (found == truth)]
    each = [torch.bincount(numbers, minlength=classes) for numbers in (right, truth[counted], found[counted])]
    return torch.stack(each).cpu()  # (3, classes)


def iou_of(counts: Tensor) -> Tensor:
    """Return the IoU of each class, float64, (…, classes), of `counts_of`, (…, 3, classes); NaN for one without a pixel."""
    right, true, predicted = counts.double().unbind(-2)  # (…, classes) each
    return right / (true + predicted - right)  # 0 / 0 is NaN


def shrunk(numbers: Array) -> Array:
    """Return a map as it is, or with `SIDE` pixels along its longer side, by the nearest pixel, int16."""
    height, width = numbers.shape
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    found: Array = nearest(numbers, size, (0.0, 0.0, width, height)).numpy()
    return found


def _predicted(context: Context, name: str, split: Split, track: Track) -> Predicted:
    """Return what the model of a name predicts."""
    task, classes = context.objective.task, len(context.objective.labels)
    maps: list[Array] = []
    counts: list[Tensor] = []
    with ready(context, name) as model, torch.inference_mode(), seeded(SEED, model.device):
        size = context.recipe.evaluate.batch_size
        chosen = batches(split, torch.arange(len(split)), size, device=model.device)
        for batch in track(chosen, f"{name} model, for pictures", -(-len(split) // size)):
            for found, truth in _pairs(task, model.forward(batch), batch, classes):
                counts.append(counts_of(found, truth, classes))
                maps.append(shrunk(found.cpu().numpy()))
        return Predicted(maps, torch.stack(counts), model.round)


def _pairs(task: Task, outputs: Any, batch: Batch, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the predicted and the true map of each example. Raises `PluginError` where they do not fit."""
    truths = maps_in(batch)
    maps = [] if task.maps_of is None else task.maps_of(outputs, batch)
    if [one.shape for one in maps] != [one.shape for one in truths]:
        raise PluginError("the task predicts maps of another size than their labels", hint="see Task.maps_of in recap_cli.api")
    for found, truth in zip(maps, truths, strict=True):
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < classes:
            raise PluginError("the task predicts classes that there are not", hint="see Task.maps_of in recap_cli.api")
        yield found, truth


def maps_in(batch: Batch) -> list[Tensor]:
    """Return the true map of each example, int64, (height, width), without padding."""
    if SIZES not in batch:  # all are of one size
        return list(batch["labels"])
    sizes = batch[SIZES].tolist()
    return [labels[:height, :width] for labels, (height, width) in zip(batch["labels"], sizes, strict=True)]


def _truth(split: Split, at: int) -> Array:
    (labels,) = maps_in(split.labels(torch.tensor([at])))
    found: Array = labels.numpy()
    return found


def _image(example: "Dataset", inputs: Any, size: Sequence[int], origin: str) -> Array:
    """Return the image of a data set of one example, (height, width, 3), uint8. Raises `DataError` if it cannot be decoded."""
    plain = {"channels": 3, "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "lanczos"}
    wanted: ImageInputs = replace(inputs, size=tuple(size), **plain)
    pixels = image_split(example, wanted, origin=origin).batch(torch.tensor([0]))["pixel_values"][0]  # (3, height, width)
    found: Array = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return found


def _places(examples: "Dataset") -> list[str]:
    """Return where each example is: its row, as messages of errors say it, and the name of its file."""
    rows = [f"row {place + 1}" for place in other_data.places_of(examples)]
    files = other_data.files_of(examples)
    return rows if files is None else [f"{row}, {Path(file).name}" for row, file in zip(rows, files, strict=True)]
