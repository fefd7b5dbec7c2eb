"""The spec of a model from its configuration: no weights are read or downloaded."""

from dataclasses import replace

import torch

from recap_cli.models import preprocessing, prompts, timm_models, transformers_models
from recap_cli.models.source import ModelSource, check_source, read_timm, read_transformers
from recap_cli.models.specs import ModelSpec
from recap_cli.untrusted.files import named


def spec_of(source: ModelSource) -> ModelSpec:
    """Return the spec that `create_model` gives, from the configuration alone. Weights are not read or downloaded.

    Nor is a tokenizer: the words that a model is told have made-up ids.

    Raises:
        ModelError: Something does not fit.
    """
    check_source(source)
    with named(source.name):
        return _of_timm(source) if source.library == "timm" else _of_transformers(source)


def _of_transformers(source: ModelSource) -> ModelSpec:
    model_type, folder, _, config, _, source = read_transformers(source, only_config=True)
    if source.label_names:
        transformers_models.set_labels(config, source.labels, source.task.problem_type)
    image = preprocessing.read_image_facts(folder, config, source.image_size)[0] if source.is_image else None
    if image is not None and source.image_size is not None:
        image["size"] = source.image_size
        if preprocessing.has_own_size(config):
            config.image_size = source.image_size
    names = [str(label) for label in config.id2label.values()]
    values = transformers_models.config_values(config)
    forward = prompts.told(config, source, source.task.prompt, None).forward
    spec = ModelSpec("transformers", model_type, values, len(names), names, source.task_kind, image)
    return replace(spec, forward=forward, auto_class=source.auto_class)


def _of_timm(source: ModelSource) -> ModelSpec:
    folder, architecture, args = read_timm(source, only_config=True)
    in_folder = None if folder is None else timm_models.label_names(folder)
    names = source.labels or in_folder or [f"LABEL_{i}" for i in range(timm_models.classes_of(architecture, args, folder))]
    config = timm_models.config_of(architecture, args, names, source.image_size)
    with torch.device("meta"):
        model = timm_models.build(architecture, config["args"])
    image = timm_models.read_image_facts(model, config["args"], folder)
    return ModelSpec("timm", timm_models.model_type(model), config, len(names), names, source.task_kind, image)
