"""New models: made from the hub, a folder or a configuration, with a head for the task."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from recap_cli.core.adapter import Adapter, matches
from recap_cli.errors import ModelError
from recap_cli.extras import torchvision_problem
from recap_cli.models import timm_models, transformers_models, unexpected_weights
from recap_cli.models.build import adapter_of, assemble, tensors_of
from recap_cli.models.checkpoints import FOLDER_HINT, count_weights, locate, read_config, read_weights
from recap_cli.models.config_checks import check_limits
from recap_cli.models.head_labels import places_of, reorder_output
from recap_cli.models.pos_embed import resample
from recap_cli.models.specs import Library, ModelSpec, TaskKind
from recap_cli.untrusted.files import named, some


class Created(NamedTuple):
    """A new model.

    Attributes:
        model: The model, in eval mode.
        spec: Its spec.
        processor: Its tokenizer; None for images.
        new: The names of its new head weights.
        notes: What a user should know of it.
    """

    model: nn.Module
    spec: ModelSpec
    processor: Any
    new: tuple[str, ...]
    notes: tuple[str, ...]


def create_model(
    *,
    library: Library,
    name: str | None,
    config: dict[str, Any] | None,
    revision: str | None = None,
    task_kind: TaskKind,
    label_names: Sequence[str],
    image_size: int | None = None,
) -> Created:
    """Return the full model for a task, in float32 on the CPU.

    Random weights, also those of a new head, come from torch's global generator: seed it before. Only weights that the
    adapter's `head` names may be new. The head is also new if the checkpoint has other labels.

    Args:
        library: The library that builds the model.
        name: A hub id or a folder.
        config: Instead of `name`: a configuration, for random weights.
        revision: A branch, tag or commit on the hub.
        task_kind: The kind of task.
        label_names: The labels of the data.
        image_size: Side in pixels. Position embeddings are resampled once for another size than the checkpoint's.

    Raises:
        ModelError: Something does not fit; the message names it.
    """
    if len(label_names) < 2:
        raise ModelError(f"a classification needs two labels at least; the data have {len(label_names)}", hint="see data.label")
    check_source(library, name, config, task_kind)
    make = _create_timm if library == "timm" else _create_hf
    with named(name):
        return make(name, config, revision, task_kind, list(label_names), image_size)


def check_source(library: Library, name: str | None, config: dict[str, Any] | None, task_kind: TaskKind) -> None:
    """Check that the model has exactly one source, and that its library has models for the task and can be imported.

    Raises:
        ModelError: It has not.
    """
    if library == "timm" and task_kind != "image-classification":
        raise ModelError(f"timm has no models for {task_kind}", hint="--set model.library=transformers")
    if (name is None) == (config is None):
        raise ModelError("give exactly one of model.name and model.config", hint=FOLDER_HINT)
    if problem := torchvision_problem():
        message, hint = problem
        raise ModelError(f"no model can be built: {message}", hint=hint)


def tokenizer_of(name: str | None, config: Mapping[str, Any] | None, revision: str | None, vocab_size: int) -> Any:
    """Return the tokenizer of a text model, as `create` does, from a folder or the hub.

    Raises:
        ModelError: There is none.
    """
    return _tokenizer(None if name is None else locate(name, revision), config or {}, vocab_size)


def _create_hf(
    name: str | None,
    values: dict[str, Any] | None,
    revision: str | None,
    task_kind: TaskKind,
    labels: list[str],
    image_size: int | None,
) -> Created:
    folder = None if name is None else locate(name, revision)
    given = values or {} if folder is None else read_config(folder)
    origin = "model.config" if folder is None else str(folder / "config.json")
    spec = ModelSpec("transformers", transformers_models.model_type(given, origin), {}, len(labels), labels, task_kind)
    adapter = adapter_of(spec)
    config = transformers_models.configure(given, strict=folder is None)
    transformers_models.check_task(config, task_kind)
    processor = None if task_kind == "image-classification" else _tokenizer(folder, given, config.vocab_size)
    checkpoint_labels = transformers_models.label_names(config)
    transformers_models.set_labels(config, labels)
    image, note = transformers_models.read_image_facts(folder, config) if task_kind == "image-classification" else (None, None)
    if folder is None and image is not None and image_size is not None:
        config.image_size = image["size"] = image_size
    new: list[str] = []
    if folder is None:
        transformers_models.check_size(config, task_kind)
        model = transformers_models.from_config(config, task_kind)
        notes = ["random weights, from a configuration"]
    else:
        model, missing, mismatched, unexpected = transformers_models.from_folder(folder, task_kind, config)
        new, notes = _new_head(model, adapter, missing, mismatched, checkpoint_labels, labels, str(folder))
        notes += unexpected_weights.notes(model, unexpected, str(folder))
    spec = replace(spec, config=transformers_models.to_dict(model), image=image)
    transformers_models.keep_no_cache(model)
    if image is not None and image_size not in (None, image["size"]):
        model, spec = _resized(model, spec, adapter, image_size)
        notes.append(f"position embeddings resampled from {image['size']} to {image_size} pixels")
    return Created(model, spec, processor, tuple(new), (*notes, *([note] if note else [])))


def _create_timm(
    name: str | None,
    values: dict[str, Any] | None,
    revision: str | None,
    task_kind: TaskKind,
    labels: list[str],
    image_size: int | None,
) -> Created:
    folder = None
    if name is not None:
        folder, architecture, args = timm_models.find(name, revision)
    else:
        args = dict(values or {})
        architecture = timm_models.architecture_of(args, "model.config")
        args.pop("architecture")
    check_limits(architecture, args)
    config = timm_models.config_of(architecture, args, labels, image_size)
    held = None if folder is None else count_weights(folder)
    model = timm_models.build(architecture, config["args"], held)
    image = timm_models.read_image_facts(model, config["args"], folder)
    spec = ModelSpec("timm", timm_models.model_type(model), config, len(labels), labels, task_kind, image)
    adapter = adapter_of(spec)
    if folder is None:
        return Created(model, spec, None, (), ("random weights, from a configuration",))
    tensors = timm_models.filtered(model, read_weights(folder))
    missing, mismatched, unexpected = timm_models.load_into(model, tensors)
    checkpoint_labels = timm_models.label_names(folder)
    new, notes = _new_head(model, adapter, missing, mismatched, checkpoint_labels, labels, str(folder))
    notes += unexpected_weights.notes(model, unexpected, str(folder))
    return Created(model, spec, None, tuple(new), tuple(notes))


def _tokenizer(folder: Path | None, given: Mapping[str, Any], vocab_size: int) -> Any:
    if folder is not None:
        return transformers_models.read_tokenizer(folder, vocab_size)
    if "tokenizer" not in given:
        raise ModelError(
            "a text model from a configuration has no tokenizer",
            hint="name a folder that has one: --set model.config.tokenizer=DIR",
        )
    return transformers_models.read_tokenizer(locate(str(given["tokenizer"])), vocab_size)


def _new_head(
    model: nn.Module,
    adapter: Adapter,
    missing: set[str],
    mismatched: set[str],
    checkpoint_labels: list[str] | None,
    labels: list[str],
    origin: str,
) -> tuple[list[str], list[str]]:
    """Return which head weights are new, and notes. Raises `ModelError` if any other weight is new."""
    backbone = sorted(name for name in missing | mismatched if not matches(name, adapter.head))
    if backbone:
        how = "of another shape" if backbone[0] in mismatched else "missing"
        raise ModelError(
            f"{origin} does not fit its config.json: {some(backbone)} is {how}",
            hint="only the head may be new; check that weights and config.json belong together",
        )
    new = sorted(missing | mismatched)
    if new:
        return new, [f"new head: {', '.join(new)}"]
    places = places_of(labels, checkpoint_labels)
    if places == list(range(len(labels))):
        return new, ["the head of the checkpoint is kept"]
    if places and reorder_output(model, adapter, places):
        return new, [f"the head of the checkpoint is kept, its labels in the order of the data: {some(labels)}"]
    new = _renew_output(model, adapter, len(labels))
    return new, [f"the head of the checkpoint is for other labels ({some(checkpoint_labels or [])}): {some(new)} is new"]


def _renew_output(model: nn.Module, adapter: Adapter, num_labels: int) -> list[str]:
    """Give the output layers of the head new weights, as transformers and timm do, and return their names."""
    params = {name: param for name, param in model.named_parameters() if matches(name, adapter.head)}
    new = [name for name, param in params.items() if param.shape[0] == num_labels]
    with torch.no_grad():
        for name in new:
            params[name].zero_() if params[name].dim() == 1 else params[name].normal_(std=0.02)
    return sorted(new)


def _resized(model: nn.Module, spec: ModelSpec, adapter: Adapter, size: int) -> tuple[nn.Module, ModelSpec]:
    """Return the model for square images of another size, with the configuration of such a model."""
    patch = spec.config["patch_size"]
    height, width = patch if isinstance(patch, list | tuple) else (patch, patch)
    if size < max(height, width):
        raise ModelError(f"images of {size} pixels hold no patch of {height} × {width}", hint="raise data.image_size")
    tensors = tensors_of(model)
    for name in tensors:
        if name.endswith("embeddings.position_embeddings"):
            tensors[name] = resample(tensors[name], (size // height, size // width))
    new = replace(spec, config={**spec.config, "image_size": size}, image={**(spec.image or {}), "size": size})
    return assemble(new, tensors, adapter, {}), new
