"""Where a model comes from and what it is for, as a recipe says it; and its configuration, read from there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from recap_cli.core.adapter import Adapter
from recap_cli.core.task import Task
from recap_cli.errors import ModelError
from recap_cli.extras import torchvision_problem
from recap_cli.models import timm_models, transformers_models
from recap_cli.models.build import adapter_named
from recap_cli.models.checkpoints import FOLDER_HINT, locate, read_config
from recap_cli.models.specs import Library


@dataclass(frozen=True)
class ModelSource:
    """What a model is made from.

    Attributes:
        library: The library that builds the model.
        task: What it is to do.
        task_kind: The name of this task.
        name: A hub id or a folder.
        config: Instead of `name`: a configuration, for random weights.
        revision: A branch, tag or commit on the hub.
        label_names: The labels of the data. Empty where they are not known: the head has those of the configuration.
        image_size: Side in pixels. Position embeddings are resampled once for another size than the checkpoint's.
        made_by: Of the classes that the task has, the one that makes its model; None for the first.
    """

    library: Library
    task: Task
    task_kind: str
    name: str | None = None
    config: dict[str, Any] | None = None
    revision: str | None = None
    label_names: Sequence[str] = ()
    image_size: int | None = None
    made_by: str | None = None

    @property
    def auto_class(self) -> str | None:
        """The class of transformers that builds it; None for timm."""
        return None if self.library == "timm" else self.made_by or self.task.auto_class

    @property
    def is_image(self) -> bool:
        """Whether it looks at images, and not at texts."""
        return self.task.inputs == "image"

    @property
    def labels(self) -> list[str]:
        return list(self.label_names)


def check_source(source: ModelSource) -> None:
    """Check that a model has exactly one source, and that its library has models for the task and can be imported.

    Raises:
        ModelError: It has not.
    """
    if source.library == "timm" and not source.task.timm:
        raise ModelError(f"timm has no models for {source.task_kind}", hint="--set model.library=transformers")
    if (source.name is None) == (source.config is None):
        raise ModelError("give exactly one of model.name and model.config", hint=FOLDER_HINT)
    if problem := torchvision_problem():
        message, hint = problem
        raise ModelError(f"no model can be built: {message}", hint=hint)


class FromTransformers(NamedTuple):
    """A configuration of transformers.

    Attributes:
        model_type: The name of its adapter.
        folder: Where it was read; None for one that a recipe holds.
        given: Its values as they stand there.
        config: The configuration itself.
        adapter: The adapter of its model type.
        source: The source, with the class that makes the model.
    """

    model_type: str
    folder: Path | None
    given: dict[str, Any]
    config: Any
    adapter: Adapter
    source: ModelSource


def read_transformers(source: ModelSource, *, only_config: bool = False) -> FromTransformers:
    """Return the configuration of a model of transformers. With `only_config`, no weights are downloaded.

    Raises:
        ModelError: It cannot be read, has no adapter, or is for another task.
    """
    folder = None if source.name is None else locate(source.name, source.revision, only_config=only_config)
    given = source.config or {} if folder is None else read_config(folder)
    kind = transformers_models.model_type(given, "model.config" if folder is None else str(folder / "config.json"))
    adapter = adapter_named(kind)
    config = transformers_models.configure(given, strict=folder is None)
    if hasattr(config, "use_auxiliary_head"):  # of DPT and others: only a loss of its own would train it, and nothing reads it
        config.use_auxiliary_head = False
    for made_by in source.task.other_classes:
        if not transformers_models.has_model(config, source):
            source = replace(source, made_by=made_by)
    transformers_models.check_task(config, source)
    return FromTransformers(kind, folder, given, config, adapter, source)


class FromTimm(NamedTuple):
    """The folder of a timm model (None for one without weights), its architecture, and the arguments of `create_model`."""

    folder: Path | None
    architecture: str
    args: dict[str, Any]


def read_timm(source: ModelSource, *, only_config: bool = False) -> FromTimm:
    """Return what a model of timm is built by. With `only_config`, no weights are downloaded.

    Raises:
        ModelError: There is no such model.
    """
    if source.name is not None:
        return FromTimm(*timm_models.find(source.name, source.revision, only_config=only_config))
    args = dict(source.config or {})
    architecture = timm_models.architecture_of(args, "model.config")
    args.pop("architecture")
    return FromTimm(None, architecture, args)
