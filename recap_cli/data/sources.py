"""Where examples come from: local files, a folder of images, the digits that come with recap, or the hub.

The examples have the columns `text` (and `text_pair`) or `image`, then `label`, and `row`: the row in their source, from 1.
"""

import gzip
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recap_cli.core.task import Labels, Task
from recap_cli.data.class_folders import holds_images, read_folder
from recap_cli.data.columns import Found, Picked, Roles, pick, roles_for
from recap_cli.data.hub import read_hub
from recap_cli.data.map_classes import map_classes
from recap_cli.data.map_folders import read_pairs
from recap_cli.data.map_split import all_ignored, values_in
from recap_cli.data.sampling import generator_for
from recap_cli.data.tables import read_file
from recap_cli.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

DIGITS = files("recap_cli.data") / "digits" / "digits.csv.gz"
DIGITS_SHARE = 0.2  # of the digits are for validation, unless the recipe sets another share


@dataclass(frozen=True)
class Raw:
    """Training and validation examples, not yet tensors. `label` is what the task's target has encoded.

    `notes` is what a user should know of how they were read.
    """

    train: "Dataset"
    validation: "Dataset"
    labels: Labels
    train_origin: str
    validation_origin: str
    notes: tuple[str, ...] = ()

    @property
    def label_names(self) -> list[str]:
        return list(self.labels.names)


def read_splits(task: Task, data: Mapping[str, Any], *, seed: int) -> Raw:
    """Read the examples of a task.

    `train` has priority over `builtin`, and that over `name`. With `validation_share`, that share of the training examples is
    held out for validation; of each label, if the task has one for each example. `train_samples` and `validation_samples` keep
    the first examples after a shuffle.

    Args:
        task: The task.
        data: The section `data` of a recipe.
        seed: Of the recipe.

    Raises:
        DataError: Data are missing, cannot be read, or do not fit. The message names the file, the column and the row.
    """
    roles, share = roles_for(task, data), data["validation_share"]
    if data["train"] is not None:
        first, second = _read_files(roles, data, share)
    elif data["builtin"] is not None:
        first, second, share = _read_builtin(data["builtin"], roles), None, share or DIGITS_SHARE
    elif data["name"] is not None:
        splits = [data["train_split"]] if share is not None else [data["train_split"], data["validation_split"]]
        first, second = _read_hub(data["name"], data["subset"], splits)
    else:
        raise DataError("the recipe names no data", hint="name a file with --set data.train=FILE, or try the recipe quickstart")
    labels, examples, notes = _labelled(first, second, roles, data)
    if second is None:
        strata = torch.tensor(examples[0]["label"]) if task.target.stratified else torch.zeros(len(examples[0])).long()
        kept, held_out = hold_out(strata, share or 0.0, seed=seed, origin=first.origin)
        examples = [examples[0].select(kept.tolist()), examples[0].select(held_out.tolist())]
    return Raw(
        train=_first(examples[0], data["train_samples"], seed, "training"),
        validation=_first(examples[1], data["validation_samples"], seed, "validation"),
        labels=labels,
        train_origin=first.origin,
        validation_origin=f"{first.origin} (held out)" if second is None else second.origin,
        notes=(*notes, *labels.notes),
    )


def hold_out(labels: Tensor, share: float, *, seed: int, origin: str) -> tuple[Tensor, Tensor]:
    """Split examples into training and held-out ones.

    Args:
        labels: Of which each is to give its share, (examples,), int64.
        share: The share to hold out.
        seed: The seed of the shuffle.
        origin: The source, for messages.

    Returns:
        Sorted indices of the training examples, and of ⌊share · examples⌋ held-out ones. Each label gives this share, to
        within one example.

    Raises:
        DataError: One part would have no examples.
    """
    shuffled = torch.randperm(len(labels), generator=generator_for(seed, 0, "hold out"))
    by_label = shuffled[labels[shuffled].argsort(stable=True)]
    counted = (torch.arange(len(labels) + 1, dtype=torch.float64) * share + 1e-9).floor()  # 0.1 · 10 is one, rounding or not
    out = counted[1:] > counted[:-1]
    if out.all() or not out.any():
        raise DataError(
            f"{share} of the {len(labels)} rows of {origin}, held out for validation, leaves "
            f"{'none for validation' if not out.any() else 'none for training'}",
            hint="name a validation file with --set data.validation=FILE, or set data.validation_share between 0 and 1",
        )
    return by_label[~out].sort().values, by_label[out].sort().values


def _read_files(roles: Roles, data: Mapping[str, Any], share: float | None) -> tuple[Found, Found | None]:
    train, validation = Path(data["train"]), data["validation"] and Path(data["validation"])
    if (validation is None) == (share is None):
        raise DataError(
            f"training data is {train}, but {'neither' if share is None else 'both'} data.validation "
            f"{'nor' if share is None else 'and'} data.validation_share {'is' if share is None else 'are'} set",
            hint="--set data.validation=FILE, or --set data.validation_share=0.1 to hold out a tenth of the training data",
        )
    first = _read_path(train, "data.train", roles, data["train_split"])
    second = None if validation is None else _read_path(validation, "data.validation", roles, data["validation_split"])
    return first, second


def _read_path(path: Path, key: str, roles: Roles, split: str) -> Found:
    """Return what stands in a file or a folder; `split` stands for `{split}` in the names of folders of maps."""
    path = path.expanduser()
    if path.is_dir() and roles.task.target.maps:
        table, notes = read_pairs(path, image=roles.inputs[0].name, label_map=roles.labels[0].name, split=split, key=key)
        return Found(table, str(path), classes=True, notes=tuple(notes))
    if path.is_dir():
        if roles.task.inputs != "image":
            raise folder_for_texts(path, key)
        table, notes = read_folder(path, key=key)
        if not roles.task.target.can_be(table.column("label").type):
            raise DataError(
                f"{path} is a folder of class folders: one class for each image. The task reads {roles.labels[0].holds}",
                hint=f"name a file that has them beside the paths of the images: --set {key}=FILE",
            )
        return Found(table, str(path), classes=True, notes=(*_unused(roles), *notes))
    return Found(read_file(path, key=key, text_columns=roles.texts), str(path), folder=path.parent)


def _unused(roles: Roles) -> list[str]:
    """Return a note on columns that a recipe names for a folder, which has none."""
    named = [f"data.{role.key} ({role.name})" for role in roles.all if role.name != role.key]
    return [f"a folder of class folders has no columns: ignored {' and '.join(named)}"] if named else []


def folder_for_texts(path: Path, key: str) -> DataError:
    file = f"name a file of texts with --set {key}=FILE"
    if holds_images(path):
        return DataError(
            f"the task reads texts, but the folder {path} holds images",
            hint=f"--set task.kind=image-classification, or {file}",
        )
    return DataError(f"{path} is a folder, but texts are read from a file", hint=file)


def _read_hub(name: str, subset: str | None, splits: list[str]) -> tuple[Found, Found | None]:
    place = name if subset is None else f"{name} ({subset})"
    tables = read_hub(name, subset, splits)
    found = [Found(table, f"split {split!r} of {place}") for table, split in zip(tables, splits, strict=True)]
    return found[0], found[1] if len(found) > 1 else None


def _read_builtin(name: str, roles: Roles) -> Found:
    """The digits of `digits/README.md`: 1,797 handwritten digits, 8 × 8 pixels in 17 shades of grey."""
    import PIL.Image
    import pyarrow as pa

    if name != "digits":
        raise DataError(f"there is no builtin data set {name!r}, only 'digits'", hint="--set data.builtin=digits")
    with DIGITS.open("rb") as packed, gzip.open(packed, "rt", encoding="ascii") as lines:
        rows = np.loadtxt(lines, delimiter=",", dtype=np.int64)  # (1797, 65)
    pixels, labels = rows[:, :64], rows[:, 64]  # (1797, 64), (1797,)
    images = []
    for shades in (pixels.reshape(-1, 8, 8) * (255 / 16)).round().astype("uint8"):  # (8, 8)
        png = BytesIO()
        PIL.Image.fromarray(shades).save(png, "png")
        images.append(png.getvalue())
    image = next((role.name for role in roles.inputs if role.key == "image"), "image")
    table = pa.table({image: pa.array(images), roles.labels[0].name: pa.array(labels)})
    return Found(table, "the digits of recap")


def _labelled(
    first: Found, second: Found | None, roles: Roles, data: Mapping[str, Any]
) -> "tuple[Labels, list[Dataset], list[str]]":
    """Return the labels, each source with its targets and its inputs by their key, and notes."""
    task = roles.task
    picked = [(found, pick(found, roles)) for found in (first, second) if found is not None]
    labels = task.target.learn(picked[0][1].labels) if not task.target.maps else _labels_of_maps(picked[0], task, data)
    examples = [as_dataset(one.inputs, targets_of(one, task, labels), task, labels) for _, one in picked]
    return labels, examples, list(dict.fromkeys(note for found, one in picked for note in (*found.notes, *one.notes)))


def targets_of(picked: Picked, task: Task, labels: Labels) -> "pa.ChunkedArray":
    """Return the targets of examples: encoded, or for maps, as they are stored."""
    return picked.labels[0].values if task.target.maps else task.target.encode(picked.labels, labels)


def _labels_of_maps(of: tuple[Found, Picked], task: Task, data: Mapping[str, Any]) -> Labels:
    """Return the classes of maps: those that the recipe names, or the values that occur in the training data."""
    import pyarrow as pa

    classes = map_classes(data)
    if classes.names:
        return Labels(classes.names)
    (column,) = of[1].labels
    values = [value for value in values_in(column.values, of[0].origin) if value not in classes.ignored]
    if not values:
        raise all_ignored(of[0].origin)
    return task.target.learn([replace(column, values=pa.chunked_array([pa.array(values, pa.int64())]), words=True)])


def as_dataset(
    inputs: "Mapping[str, pa.ChunkedArray]", targets: "pa.ChunkedArray | None", task: Task, labels: Labels
) -> "Dataset":
    """Return examples with the columns of their inputs, `label` (if there are targets) and `row`."""
    import datasets
    import pyarrow as pa

    kinds = {
        "text": datasets.Value("string"),
        "words": datasets.List(datasets.Value("string")),
        "image": datasets.Image(),
    }
    label = {}
    if targets is not None:
        label = datasets.Features.from_arrow_schema(pa.schema([("label", targets.type)]))
        if task.target.stratified or task.target.maps:
            label = {"label": datasets.Image() if task.target.maps else datasets.ClassLabel(names=list(labels.names))}
    features = datasets.Features(dict.fromkeys(inputs, kinds[task.inputs]) | label | {"row": datasets.Value("int64")})
    rows = pa.array(range(1, len(next(iter(inputs.values()))) + 1), pa.int64())
    table = pa.table([*inputs.values(), *([] if targets is None else [targets]), rows], schema=features.arrow_schema)
    return datasets.Dataset(table, fingerprint="recap")  # no file is kept by it; to make one, `datasets` hashes the whole table


def _first(examples: "Dataset", count: int | None, seed: int, which: str) -> "Dataset":
    """Return the first `count` examples after a shuffle, or all of them in their original order."""
    if count is None or count >= len(examples):
        return examples
    shuffled = torch.randperm(len(examples), generator=generator_for(seed, 0, f"{which} samples"))
    return examples.select(shuffled[:count].tolist())
