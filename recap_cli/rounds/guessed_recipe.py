"""The recipe that makes a finetuned model small, guessed from the model and its data: `recap compress`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recap_cli import registry
from recap_cli.data.guess import guess_columns, read_table
from recap_cli.errors import ModelError, RecipeError
from recap_cli.models.checkpoints import locate, read_config
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.recipe.schema import SELF
from recap_cli.tasks.calls import task_named

# Where they come from: docs/guide/compress.md.
SETTINGS: dict[str, Any] = {
    "rounds": 4,
    "head": {"warmup_epochs": 0},
    "mask": {"ratio": 0.0},
    "finetune": {"epochs": 2, "lr": 3e-4},
    "distill": {"teacher": SELF},
    "importance": {"device": "auto"},  # which the teacher runs on, too
}
TRAINING = ("finetune.lr", "finetune.epochs")
MAX_LENGTH = 128  # tokens: the default of the recipe
HELD_OUT = 0.1  # of the training examples, where there are no others for validation


@dataclass(frozen=True)
class Guessed:
    """A guessed recipe.

    Attributes:
        recipe: the recipe.
        reasons: what was guessed, a line each, as the `--set` that says it and the reason.
    """

    recipe: Recipe
    reasons: tuple[str, ...]


def guess_recipe(model: str, data: str, validation: str | None, ratio: float, overrides: Sequence[str] = ()) -> Guessed:
    """The recipe that makes a finetuned model small.

    Args:
        model: a folder or a hub id.
        data: training data: a file, a folder of class folders, or a data set of the hub.
        validation: data in the same form; None holds a tenth of the training data out.
        ratio: the share of the prunable parameters to prune.
        overrides: each `section.key=value`; what they set is not guessed.

    Raises:
        ModelError: the model cannot be read, or has no head of a known task.
        DataError: the data cannot be read, or have several columns that fit.
        RecipeError: an override does not fit.
    """
    given = {key: yaml.safe_load(value or "null") for key, _, value in (each.partition("=") for each in overrides)}
    config = read_config(locate(model, given.get("model.revision"), only_config=True))
    library = str(given.get("model.library") or _library(config))
    kind = str(given.get("task.kind") or _kind(config, model, library))
    section, reasons = _data_section(data, validation, given)
    columns = _columns(kind, section | {key.partition(".")[2]: v for key, v in given.items() if key.startswith("data.")}, data)
    if (positions := config.get("max_position_embeddings")) is not None and positions < MAX_LENGTH:
        section["max_length"] = positions
        reasons.append(f"data.max_length={positions}: the model has positions for so many tokens")
    values = {
        "name": f"small-{Path(model).name}",
        **SETTINGS,
        "model": {"name": model, "library": library},
        "task": {"kind": kind},
        "data": {**section, **columns},
        "prune": {"ratio": ratio},
    }
    recipe = recipes.parse(yaml.safe_dump(values, sort_keys=False), "recap compress", overrides)
    if recipe.distill.teacher != SELF:
        raise RecipeError(
            f"compress has the model itself as its teacher, not {recipe.distill.teacher}",
            hint="leave distill.teacher out, or write a recipe for `recap run`",
        )
    said = {"text_pair": "the second column that fits"}
    why = [f"task.kind={kind}: the checkpoint is a {_said_class(config)}", *reasons]
    why += [f"data.{key}={name}: {said.get(key, 'the column that fits')}" for key, name in columns.items()]
    why.append(", ".join(f"{key}={getattr(recipe.finetune, key.partition('.')[2])}" for key in TRAINING) + ": a first choice")
    return Guessed(recipe, tuple(_not_said(why, given)))


def _not_said(reasons: Sequence[str], given: Mapping[str, Any]) -> Iterator[str]:
    """The reasons of what a user has not said otherwise."""
    for reason in reasons:
        if not all(each.partition("=")[0] in given for each in reason.partition(": ")[0].split(", ")):
            yield reason


def _library(config: Mapping[str, Any]) -> str:
    return "timm" if "architecture" in config and "model_type" not in config else "transformers"


def _said_class(config: Mapping[str, Any]) -> str:
    saved = config.get("architectures")
    return str(saved[0]) if isinstance(saved, list) and saved else f"timm model {config.get('architecture', '?')}"


def _kind(config: Mapping[str, Any], model: str, library: str) -> str:
    """The task that the head of a checkpoint is for."""
    if library == "timm":
        return "image-classification"
    names = config.get("id2label")
    labels = len(names) if isinstance(names, dict) else config.get("num_labels", 2)
    problem = config.get("problem_type") or ("regression" if labels == 1 else "single_label_classification")
    for kind in registry.names("tasks"):
        task = task_named(kind)
        fits = _said_class(config).endswith(task.auto_class.removeprefix("AutoModel"))
        if fits and task.problem_type in (None, problem):
            return kind
    raise ModelError(
        f"{model} is a {_said_class(config)}, which has no head for a task that is known",
        hint="give a finetuned checkpoint, or say the task: --set task.kind=NAME; `recap plugins` lists them",
    )


def _data_section(data: str, validation: str | None, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The section `data` without columns, and the reasons of what was guessed for it."""
    if not Path(data).expanduser().exists() and not data.startswith((".", "/", "~")) and not Path(data).suffix:
        return {"name": data}, [f"data.name={data}: there is no such file, so it is a data set of the hub"]
    if validation is not None:
        return {"train": data, "validation": validation}, []
    if given.get("data.validation") is not None or given.get("data.validation_share") is not None:
        return {"train": data}, []
    reason = f"data.validation_share={HELD_OUT}: no --validation was given"
    return {"train": data, "validation_share": HELD_OUT}, [reason]


def _columns(kind: str, section: Mapping[str, Any], origin: str) -> dict[str, str]:
    table = read_table(section)
    return {} if table is None else guess_columns(task_named(kind), table, origin, section)
