"""The examples of a recipe, as tensors for its model: read once per process, whatever number of stages ask for them."""

import json
from dataclasses import replace
from typing import Any

from recap_cli.data import sources
from recap_cli.data.label_maps import reading_of
from recap_cli.data.map_classes import map_classes
from recap_cli.data.splits import ImageInputs, Split, TextInputs, make_split
from recap_cli.models import build
from recap_cli.models.build import ModelSpec
from recap_cli.progress import Track
from recap_cli.recipe.recipe import Recipe
from recap_cli.tasks.calls import task_named
from recap_cli.tasks.labels import check_names

_SPLITS: dict[str, tuple[Split, Split]] = {}  # of the last recipe: the stages of a run read their data once


def read_raw(recipe: Recipe) -> sources.Raw:
    """The examples of a recipe as its source holds them."""
    return sources.read_splits(task_named(recipe.task.kind), recipe.data.model_dump(), seed=recipe.seed)


def inputs_of(recipe: Recipe, spec: ModelSpec, processor: Any) -> TextInputs | ImageInputs:
    """How the examples of a recipe become the inputs of a model."""
    image, task = spec.image, task_named(recipe.task.kind)
    if image is None:
        words = task.inputs == "words"
        return TextInputs(processor, recipe.data.max_length, build.positions(spec), words)
    return ImageInputs(
        size=(image["size"], image["size"]),
        channels=image["channels"],
        mean=tuple(image["mean"]),
        std=tuple(image["std"]),
        interpolation=image["interpolation"],
        augment=recipe.data.augment,
        maps=reading_of(map_classes(recipe.data.model_dump()), spec.label_names) if task.target.maps else None,
    )


def are_read(recipe: Recipe, spec: ModelSpec) -> bool:
    """Whether this process has the examples of a recipe already, so that `splits_of` reads nothing."""
    return _split_key(recipe, spec) in _SPLITS


def splits_of(
    recipe: Recipe, spec: ModelSpec, processor: Any, track: Track, raw: sources.Raw | None = None
) -> tuple[Split, Split]:
    """The training and the validation examples of a recipe, as tensors for a model; kept for the next call with the same
    data.

    Raises:
        DataError: their labels are not those of the model, in its order.
    """
    key = _split_key(recipe, spec)
    if key not in _SPLITS:
        made = make_splits(recipe, spec, processor, track, raw or read_raw(recipe))
        _SPLITS.clear()
        _SPLITS[key] = made
    return _SPLITS[key]


def make_splits(recipe: Recipe, spec: ModelSpec, processor: Any, track: Track, raw: sources.Raw) -> tuple[Split, Split]:
    """The training and the validation examples as tensors for a model. Raises as `splits_of`."""
    check_names(raw.label_names, spec.label_names, raw.train_origin)
    inputs, workers = inputs_of(recipe, spec, processor), recipe.data.workers
    return (
        make_split(raw.train, inputs, origin=raw.train_origin, workers=workers, track=track),
        make_split(raw.validation, to_score(inputs), origin=raw.validation_origin, workers=workers, track=track),
    )


def to_score(inputs: TextInputs | ImageInputs) -> TextInputs | ImageInputs:
    """How examples are read that a model is scored by: as they are, and label maps at their own size."""
    if isinstance(inputs, TextInputs):
        return inputs
    return replace(inputs, augment="none", maps=inputs.maps and replace(inputs.maps, native=True))


def _split_key(recipe: Recipe, spec: ModelSpec) -> str:
    """What examples as tensors hang on: the data, and what the model takes and how it is preprocessed."""
    sections = [section.model_dump(mode="json") for section in (recipe.data, recipe.model, recipe.task)]
    return json.dumps([*sections, recipe.seed, spec.image, spec.label_names, build.positions(spec)], sort_keys=True)
