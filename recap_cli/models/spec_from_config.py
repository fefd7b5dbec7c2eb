"""The spec of a model from its configuration: no weights are read or downloaded."""

from collections.abc import Sequence
from typing import Any

import torch

from recap_cli.models import timm_models, transformers_models
from recap_cli.models.build import adapter_of
from recap_cli.models.checkpoints import locate, read_config
from recap_cli.models.create import check_source
from recap_cli.models.specs import Library, ModelSpec, TaskKind
from recap_cli.untrusted.files import named


def of_recipe(
    *,
    library: Library,
    name: str | None,
    config: dict[str, Any] | None,
    revision: str | None = None,
    task_kind: TaskKind,
    label_names: Sequence[str] = (),
    image_size: int | None = None,
) -> ModelSpec:
    """Return the spec that `create` gives, from the configuration alone. Weights are not read or downloaded.

    The arguments are those of `create`. Without `label_names` the head has the labels of the configuration.

    Raises:
        ModelError: Something does not fit.
    """
    check_source(library, name, config, task_kind)
    make = _from_timm if library == "timm" else _from_transformers
    with named(name):
        return make(name, config, revision, task_kind, list(label_names), image_size)


def _from_transformers(
    name: str | None,
    values: dict[str, Any] | None,
    revision: str | None,
    task_kind: TaskKind,
    labels: list[str],
    image_size: int | None,
) -> ModelSpec:
    folder = None if name is None else locate(name, revision, only_config=True)
    given = values or {} if folder is None else read_config(folder)
    kind = transformers_models.model_type(given, "model.config" if folder is None else str(folder / "config.json"))
    adapter_of(ModelSpec("transformers", kind, {}, len(labels), labels, task_kind))
    config = transformers_models.configure(given, strict=folder is None)
    transformers_models.check_task(config, task_kind)
    if labels:
        transformers_models.set_labels(config, labels)
    image = transformers_models.read_image_facts(folder, config)[0] if task_kind == "image-classification" else None
    if image is not None and image_size is not None:
        config.image_size = image["size"] = image_size
    names = [str(label) for label in config.id2label.values()]
    return ModelSpec("transformers", kind, transformers_models.config_values(config), len(names), names, task_kind, image)


def _from_timm(
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
        architecture = timm_models.architecture_of(args, "model.config")
        args.pop("architecture")
    else:
        folder, architecture, args = timm_models.find(name, revision, only_config=True)
    in_folder = None if folder is None else timm_models.label_names(folder)
    names = labels or in_folder or [f"LABEL_{i}" for i in range(timm_models.classes_of(architecture, args, folder))]
    config = timm_models.config_of(architecture, args, names, image_size)
    with torch.device("meta"):
        model = timm_models.build(architecture, config["args"])
    image = timm_models.read_image_facts(model, config["args"], folder)
    return ModelSpec("timm", timm_models.model_type(model), config, len(names), names, task_kind, image)
