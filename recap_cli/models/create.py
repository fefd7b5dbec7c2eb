"""New models: made from the hub, a folder or a configuration, with a head for the task."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from recap_cli.core.adapter import Adapter, matches
from recap_cli.errors import ModelError
from recap_cli.models import preprocessing, prompts, timm_models, transformers_models, unexpected_weights
from recap_cli.models.build import adapter_of, assemble, on_meta, tensors_of
from recap_cli.models.checkpoints import LoadReport, count_weights, locate, read_weights
from recap_cli.models.config_checks import check_limits
from recap_cli.models.head_labels import SaidHead, outputs_of, places_of, reorder_output
from recap_cli.models.pos_embed import resample
from recap_cli.models.source import ModelSource, check_source, read_timm, read_transformers
from recap_cli.models.specs import ModelSpec
from recap_cli.untrusted.files import named, some


class Created(NamedTuple):
    """A new model.

    Attributes:
        model: The model, in eval mode.
        spec: Its spec.
        processor: Its tokenizer; None for images, unless the model reads its task in words.
        new: The names of its new head weights.
        notes: What a user should know of it.
    """

    model: nn.Module
    spec: ModelSpec
    processor: Any
    new: tuple[str, ...]
    notes: tuple[str, ...]


def create_model(source: ModelSource) -> Created:
    """Return the full model for a task, in float32 on the CPU.

    Random weights, also those of a new head, come from torch's global generator: seed it before. Only weights that the
    adapter's `head` names may be new. The head is also new if the checkpoint has other labels, or says that it is for another
    task.

    Raises:
        ModelError: Something does not fit; the message names it.
    """
    if len(source.label_names) < source.task.fewest:
        raise ModelError(
            f"{source.task_kind} needs {source.task.fewest} labels at least; the data have {len(source.label_names)}",
            hint="see data.label",
        )
    check_source(source)
    with named(source.name):
        return _create_timm(source) if source.library == "timm" else _create_transformers(source)


def tokenizer_of(source: ModelSource, vocab_size: int) -> Any:
    """Return the tokenizer of a text model, as `create_model` does, from a folder or the hub.

    Raises:
        ModelError: There is none.
    """
    folder = None if source.name is None else locate(source.name, source.revision)
    return _tokenizer(folder, source.config or {}, vocab_size, words=source.task.inputs == "words")


def _create_transformers(source: ModelSource) -> Created:
    model_type, folder, given, config, adapter, source = read_transformers(source)
    words = source.task.inputs == "words"
    told = prompts.told(config, source, source.task.prompt, folder or _named_tokenizer(given))
    processor = told.tokenizer if source.is_image else _tokenizer(folder, given, config.vocab_size, words=words)
    said = SaidHead(transformers_models.label_names(config), given.get("architectures"), given.get("problem_type"))
    transformers_models.set_labels(config, source.labels, source.task.problem_type)
    image, note = preprocessing.read_image_facts(folder, config, source.image_size) if source.is_image else (None, None)
    if folder is None and image is not None and source.image_size is not None:
        image["size"] = source.image_size
        if preprocessing.has_own_size(config):
            config.image_size = source.image_size
    new: list[str] = []
    if folder is None:
        transformers_models.check_size(config, source)
        model = transformers_models.from_config(config, source)
        notes = ["random weights, from a configuration"]
    else:
        model, report = transformers_models.from_folder(folder, source, config)
        new, notes = _settle_head(model, adapter, report, said, source, folder)
    values, labels = transformers_models.to_dict(model), source.labels
    spec = ModelSpec("transformers", model_type, values, len(labels), labels, source.task_kind, image)
    spec = replace(spec, forward=told.forward, auto_class=source.auto_class)
    transformers_models.keep_no_cache(model)
    if image is not None and source.image_size not in (None, image["size"]):
        model, spec, resampled = _resized(model, spec, adapter, source.image_size)
        if resampled:
            notes.append(f"position embeddings resampled from {image['size']} to {source.image_size} pixels")
    return Created(model, spec, processor, tuple(new), (*notes, *told.notes, *([note] if note else [])))


def _create_timm(source: ModelSource) -> Created:
    folder, architecture, args = read_timm(source)
    check_limits(architecture, args)
    labels = source.labels
    config = timm_models.config_of(architecture, args, labels, source.image_size)
    held = None if folder is None else count_weights(folder)
    model = timm_models.build(architecture, config["args"], held)
    image = timm_models.read_image_facts(model, config["args"], folder)
    spec = ModelSpec("timm", timm_models.model_type(model), config, len(labels), labels, source.task_kind, image)
    adapter = adapter_of(spec)
    if folder is None:
        return Created(model, spec, None, (), ("random weights, from a configuration",))
    report = timm_models.load_into(model, timm_models.filtered(model, read_weights(folder)))
    new, notes = _settle_head(model, adapter, report, SaidHead(timm_models.label_names(folder)), source, folder)
    return Created(model, spec, None, tuple(new), tuple(notes))


def _named_tokenizer(given: Mapping[str, Any]) -> Path | None:
    """Return the folder of the tokenizer that a configuration names, as one of a text model does; None if it names none."""
    return locate(str(given["tokenizer"])) if given.get("tokenizer") else None


def _tokenizer(folder: Path | None, given: Mapping[str, Any], vocab_size: int, *, words: bool) -> Any:
    if folder is not None:
        return transformers_models.read_tokenizer(folder, vocab_size, words=words)
    if "tokenizer" not in given:
        raise ModelError(
            "a text model from a configuration has no tokenizer",
            hint="name a folder that has one: --set model.config.tokenizer=DIR",
        )
    return transformers_models.read_tokenizer(locate(str(given["tokenizer"])), vocab_size, words=words)


def _settle_head(
    model: nn.Module,
    adapter: Adapter,
    report: LoadReport,
    said: SaidHead,
    source: ModelSource,
    folder: Path,
) -> tuple[list[str], list[str]]:
    """Make the head of a checkpoint's model one for the task and the labels of the data, in their order.

    Returns:
        The head weights that are new, and notes.

    Raises:
        ModelError: Another weight is new, or the checkpoint has weights of layers that the model lacks.
    """
    backbone = sorted(name for name in report.missing | report.mismatched if not matches(name, adapter.head))
    if backbone:
        how = "of another shape" if backbone[0] in report.mismatched else "missing"
        raise ModelError(
            f"{folder} does not fit its config.json: {some(backbone)} is {how}",
            hint="only the head may be new; check that weights and config.json belong together",
        )
    new, note = _head_for(model, adapter, sorted(report.missing | report.mismatched), said, source)
    return new, [note, *unexpected_weights.notes(model, report.unexpected, str(folder))]


def _head_for(model: nn.Module, adapter: Adapter, new: list[str], said: SaidHead, source: ModelSource) -> tuple[list[str], str]:
    """Keep, reorder or renew the head, `new` weights of which are random already. Return all that are new, and a note."""
    if new:
        return new, f"new head: {', '.join(new)}"
    labels = source.labels
    if other := said.other_task(model, source.task.problem_type):
        new = _renew_output(model, adapter, len(labels))
        return new, f"the head of the checkpoint is for another task ({other}): {some(new)} is new"
    places = places_of(labels, said.labels)
    if places == list(range(len(labels))):
        return [], "the head of the checkpoint is kept"
    if places and reorder_output(model, adapter, places):
        return [], f"the head of the checkpoint is kept, its labels in the order of the data: {some(labels)}"
    new = _renew_output(model, adapter, len(labels))
    return new, f"the head of the checkpoint is for other labels ({some(said.labels or [])}): {some(new)} is new"


def _renew_output(model: nn.Module, adapter: Adapter, num_labels: int) -> list[str]:
    """Give the output layers of the head new weights, as transformers and timm do, and return their names."""
    new = outputs_of(model, adapter, num_labels)
    with torch.no_grad():
        for param in new.values():
            param.zero_() if param.dim() == 1 else param.normal_(std=0.02)
    return sorted(new)


def _resized(model: nn.Module, spec: ModelSpec, adapter: Adapter, size: int) -> tuple[nn.Module, ModelSpec, list[str]]:
    """Return the model for square images of another size, its spec, and the names of what was resampled for it."""
    patch = spec.config.get("patch_size", 1)
    height, width = patch if isinstance(patch, list | tuple) else (patch, patch)
    if size < max(height, width):
        raise ModelError(f"images of {size} pixels hold no patch of {height} × {width}", hint="raise data.image_size")
    tensors = tensors_of(model)
    positions = [name for name in tensors if name.endswith("embeddings.position_embeddings")]
    for name in positions:
        tensors[name] = resample(tensors[name], (size // height, size // width))
    sized = {"image_size": size} if "image_size" in spec.config else {}
    new = replace(spec, config={**spec.config, **sized}, image={**(spec.image or {}), "size": size})
    _check_shapes(new, tensors)
    return assemble(new, tensors, adapter, {}), new, positions


def _check_shapes(spec: ModelSpec, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse another image size where more than position embeddings hang on it, as tables of relative positions do."""
    made = {name: tensor.shape for name, tensor in tensors_of(on_meta(spec)).items()}
    if odd := sorted(name for name, tensor in tensors.items() if name in made and made[name] != tensor.shape):
        raise ModelError(
            f"this {spec.model_type} is for images of its own size: {some(odd)} has another shape for "
            f"{(spec.image or {})['size']} pixels",
            hint="leave out data.image_size",
        )
