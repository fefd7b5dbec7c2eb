"""The losses of the reference, of classes and of label maps, written from what they are: nothing of `recap_cli`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

IGNORED = -100  # of a label map, as `cross_entropy` has it
TOLD = [1, 2, 3, 4, 0, 0]  # a OneFormer without a tokenizer: a number for each of four words, and zeros
Batch = dict[str, Tensor]


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    out = model(inputs["pixel_values"]) if hasattr(model, "forward_features") else model(**inputs)
    return out if isinstance(out, Tensor) else out.logits


def maps_of(batch: Batch) -> list[Tensor]:
    """The label map of each image, (height, width), of its own size."""
    sizes = batch.get("label_sizes", torch.tensor([batch["labels"].shape[1:]] * len(batch["labels"])))
    return [one[:height, :width] for one, (height, width) in zip(batch["labels"], sizes.tolist(), strict=True)]


def queries_of(model: nn.Module, batch: Batch) -> Any:
    """What a model with queries gives for a batch; its loss is made of the mask of each class that an image shows."""
    height, width = batch["pixel_values"].shape[2:]
    masks, classes = [], []
    for labels in maps_of(batch):
        rows = [int((i + 0.5) * labels.shape[0] / height) for i in range(height)]
        columns = [int((i + 0.5) * labels.shape[1] / width) for i in range(width)]
        nearest = labels[rows][:, columns]
        classes.append(torch.tensor([label for label in nearest.unique().tolist() if label != IGNORED]))
        masks.append(torch.stack([(nearest == label).float() for label in classes[-1]]))
    told = {"task_inputs": torch.tensor([TOLD] * len(masks))} if is_told(model) else {}
    return model(batch["pixel_values"], mask_labels=masks, class_labels=classes, **told)


def is_told(model: nn.Module) -> bool:
    """Whether a model is told its task."""
    return type(model).__name__.startswith("OneFormer")


def judged(model: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The sum of the losses of a batch; and of each example the scores, (classes, …), and its label or map."""
    if batch["labels"].ndim == 1:
        logits = logits_of(model, batch)
        return cross_entropy(logits, batch["labels"], reduction="sum"), list(logits), list(batch["labels"])
    own, maps = None, maps_of(batch)
    if hasattr(model, "class_predictor") or is_told(model):
        out = queries_of(model, batch)
        classes = out.class_queries_logits.softmax(2)[:, :, :-1]  # without "no object"
        scores, own = (classes[..., None, None] * out.masks_queries_logits.sigmoid()[:, :, None]).sum(1), out.loss.sum()
    else:
        scores = model(batch["pixel_values"]).logits
    found = [interpolate(one[None], labels.shape, mode="bilinear")[0] for one, labels in zip(scores, maps, strict=True)]
    if own is not None:
        return own * counted(maps), found, maps
    losses = [cross_entropy(one[None], labels[None], reduction="sum") for one, labels in zip(found, maps, strict=True)]
    return torch.stack(losses).sum(), found, maps


def counted(labels: Sequence[Tensor]) -> int:
    return sum(int((one != IGNORED).sum()) for one in labels)
