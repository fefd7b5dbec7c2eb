"""The spec of a model from its configuration alone: no weights are read, and none are downloaded."""

from collections.abc import Sequence
from typing import Any

import torch

from recap_cli.runtime import hf, timm_library
from recap_cli.runtime.checkpoints import locate, read_config
from recap_cli.runtime.foreign import named
from recap_cli.runtime.models import adapter_of, check_source
from recap_cli.runtime.specs import Library, ModelSpec, TaskKind


def outline(
    *,
    library: Library,
    name: str | None,
    config: dict[str, Any] | None,
    revision: str | None = None,
    task_kind: TaskKind,
    label_names: Sequence[str] = (),
    image_size: int | None = None,
) -> ModelSpec:
    """The spec that `create` would give, from the configuration alone: no weights are read, and none are downloaded.

    Without `label_names` the head has the labels of the configuration. Raises `ModelError` for anything that does not fit.
    """
    check_source(library, name, config, task_kind)
    make = _outline_timm if library == "timm" else _outline_hf
    with named(name):
        return make(name, config, revision, task_kind, list(label_names), image_size)


def _outline_hf(
    name: str | None,
    values: dict[str, Any] | None,
    revision: str | None,
    task_kind: TaskKind,
    labels: list[str],
    image_size: int | None,
) -> ModelSpec:
    folder = None if name is None else locate(name, revision, only_config=True)
    given = values or {} if folder is None else read_config(folder)
    kind = hf.model_type(given, "model.config" if folder is None else str(folder / "config.json"))
    adapter_of(ModelSpec("transformers", kind, {}, len(labels), labels, task_kind))
    config = hf.configure(given, strict=folder is None)
    hf.check_task(config, task_kind)
    if labels:
        hf.set_labels(config, labels)
    image = hf.read_image_facts(folder, config)[0] if task_kind == "image-classification" else None
    if image is not None and image_size is not None:
        config.image_size = image["size"] = image_size
    names = [str(label) for label in config.id2label.values()]
    return ModelSpec("transformers", kind, hf.config_values(config), len(names), names, task_kind, image)


def _outline_timm(
    name: str | None,
    values: dict[str, Any] | None,
    revision: str | None,
    task_kind: TaskKind,
    labels: list[str],
    image_size: int | None,
) -> ModelSpec:
    folder = None
    if name is None:
        args = dict(values or {})
        architecture = timm_library.architecture_of(args, "model.config")
        args.pop("architecture")
    else:
        folder, architecture, args = timm_library.find(name, revision, only_config=True)
    own = None if folder is None else timm_library.label_names(folder)
    names = labels or own or [f"LABEL_{i}" for i in range(timm_library.classes_of(architecture, args, folder))]
    config = timm_library.config_of(architecture, args, names, image_size)
    with torch.device("meta"):
        model = timm_library.build(architecture, config["args"])
    image = timm_library.read_image_facts(model, config["args"], folder)
    return ModelSpec("timm", timm_library.model_type(model), config, len(names), names, task_kind, image)
