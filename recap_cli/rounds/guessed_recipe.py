"""The recipe that makes a finetuned model small, guessed from the model and its data: `recap compress`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recap_cli import registry
from recap_cli.data.guess import guess_columns, is_local, read_table
from recap_cli.errors import ModelError, RecipeError, UsageError
from recap_cli.models import transformers_models
from recap_cli.models.checkpoints import locate, read_config
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.distill import SELF
from recap_cli.recipe.recipe import Recipe
from recap_cli.tasks.calls import task_named

# docs/guide/compress.md says what was measured.
SETTINGS: dict[str, Any] = {
    "rounds": 1,
    "head": {"warmup_epochs": 0},
    "prune": {"scope": "global", "compensate": "auto"},
    "mask": {"ratio": 0.0},
    "finetune": {"epochs": 8, "lr": 3e-4},
    "distill": {"teacher": SELF, "hidden_weight": 10.0},
    "importance": {"device": "auto"},  # which the teacher runs on, too
}
FIRST, BEST = "a first choice", "did best of what was tried"
TRAINING = {
    **{"rounds": BEST, "prune.scope": BEST, "prune.compensate": BEST, "mask.ratio": FIRST, "finetune.lr": FIRST},
    **{"finetune.epochs": FIRST, "distill.weight": FIRST, "distill.temperature": FIRST, "distill.hidden_weight": BEST},
}
MAX_LENGTH = 128  # tokens: the default of the recipe
HELD_OUT = 0.1  # of the training examples, where there are no others for validation
ARGUMENTS = {  # keys that the command has an argument for
    "model.name": "MODEL",
    "model.config": "MODEL",
    "data.name": "--data",
    "data.train": "--data",
    "data.builtin": "--data",
    "data.validation": "--validation",
}
NO_HEAD = "give a finetuned checkpoint, or say the task: --set task.kind=NAME; `recap plugins` lists them"
ORIGIN = "recap compress"


@dataclass(frozen=True)
class Guessed:
    """A guessed recipe.

    Attributes:
        recipe: the recipe.
        reasons: what was guessed, a line each, as the `--set` that says it and the reason.
    """

    recipe: Recipe
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """What the configuration of a checkpoint says of it.

    Attributes:
        library: that builds it.
        saved: the name of its class, or of its architecture; None where it is not said.
        problem_type: the kind of its loss, as transformers calls it.
        positions: how many tokens it has positions for; None where it has no such number.
    """

    library: str
    saved: str | None
    problem_type: str | None = None
    positions: int | None = None


def guess_recipe(model: str, data: str, validation: str | None, ratio: float, overrides: Sequence[str] = ()) -> Guessed:
    """The recipe that makes a finetuned model small.

    Args:
        model: a folder or a hub id.
        data: training data: a file, a folder of class folders, or a data set of the hub.
        validation: data in the same form, of a data set of the hub a split; None holds a tenth of the training data out.
        ratio: the share of the prunable parameters to prune.
        overrides: each `section.key=value`; what they set is not guessed.

    Raises:
        ModelError: the model cannot be read, or has no head of a known task.
        DataError: the data cannot be read, or have several columns that fit.
        RecipeError: an override does not fit.
        UsageError: an override sets what the command has an argument for.
    """
    sets = (f"prune.ratio={ratio}", *overrides)
    given = _given(sets)
    _check_teacher(given.get("distill.teacher", SELF))
    checkpoint = _checkpoint(model, given)
    kind = str(given.get("task.kind") or _kind(checkpoint, model))
    section, reasons = _data_section(data, validation, given)
    named = {key.removeprefix("data."): value for key, value in given.items() if key.startswith("data.")}
    columns = _columns(kind, section | named, data)
    if checkpoint.positions is not None and checkpoint.positions < MAX_LENGTH:
        section["max_length"] = checkpoint.positions
        reasons.append(f"data.max_length={checkpoint.positions}: the model has positions for so many tokens")
    values = {
        **SETTINGS,
        "name": f"small-{Path(model).expanduser().resolve().name or 'model'}",
        "model": {"name": model, "library": checkpoint.library},
        "task": {"kind": kind},
        "data": {**section, **columns},
    }
    task = task_named(kind)
    if task.other_classes and not str(checkpoint.saved).endswith(task.auto_class.removeprefix("AutoModel")):
        values["distill"] = {**SETTINGS["distill"], "hidden_weight": 0.0}  # its decoder's blocks give queries
        reasons.append("distill.hidden_weight=0: the hidden states of a model with queries are not learned")
    recipe = recipes.parse(yaml.safe_dump(values, sort_keys=False), ORIGIN, sets)
    _check_teacher(recipe.distill.teacher)  # which a whole section may have set
    why = [f"task.kind={kind}: the checkpoint is a {checkpoint.saved}", *reasons]
    why += [f"data.{key}={name}: {_why_column(key)}" for key, name in columns.items()]
    said = {reason.partition("=")[0] for reason in reasons}
    why += [f"{key}={_value(recipe, key)}: {reason}" for key, reason in TRAINING.items() if key not in said]
    return Guessed(recipe, tuple(reason for reason in why if reason.partition("=")[0] not in given))


def _check_teacher(teacher: object) -> None:
    if teacher != SELF:
        raise RecipeError(
            f"compress has the model itself as its teacher, not {teacher}",
            hint="leave distill.teacher out, or write a recipe for `recap run`",
        )


def _given(overrides: Sequence[str]) -> dict[str, Any]:
    """What overrides set, by key. They are read as a recipe's are, so that what is wrong with them is said as there.

    Raises:
        RecipeError: one of them is no `key=value`, or its value is no YAML.
        UsageError: one sets what has an argument.
    """
    keys = [override.partition("=")[0].strip() for override in overrides]
    if other := [key for key in keys if key in ARGUMENTS]:
        raise UsageError(f"--set {other[0]}: compress has {ARGUMENTS[other[0]]} for it", hint=f"leave out --set {other[0]}=…")
    values = recipes.values_of(overrides, ORIGIN)
    return {key: _in(values, key) for key in keys}


def _in(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _value(recipe: Recipe, key: str) -> Any:
    return _in(recipe.model_dump(mode="json"), key)


def _checkpoint(model: str, given: Mapping[str, Any]) -> Checkpoint:
    try:
        revision = given.get("model.revision")
        folder = locate(model, revision if isinstance(revision, str) else None, only_config=True)
        config = read_config(folder)
    except ModelError as error:
        raise ModelError(error.message, hint="name the folder of a finetuned model: recap compress DIR --data DATA") from error
    library = given.get("model.library") or ("timm" if "architecture" in config and "model_type" not in config else None)
    if library == "timm":
        return Checkpoint("timm", str(config.get("architecture")))
    transformers_models.model_type(config, str(folder / "config.json"))
    if not isinstance(config.get("id2label") or {}, dict):
        raise ModelError(f"{folder / 'config.json'}: id2label is no object of labels by number", hint=NO_HEAD)
    known = transformers_models.configure(config)
    saved = config.get("architectures")
    positions = getattr(known, "max_position_embeddings", None)
    positions = positions if isinstance(positions, int) and positions > 0 else None
    if positions is not None and known.model_type == "roberta":  # which begins to count after the padding
        positions -= (known.pad_token_id or 0) + 1
    return Checkpoint(
        "transformers",
        str(saved[0]) if isinstance(saved, list) and saved else None,
        known.problem_type or ("regression" if known.num_labels == 1 else "single_label_classification"),
        positions,
    )


def _kind(checkpoint: Checkpoint, model: str) -> str:
    """The task that the head of a checkpoint is for: one of ours, or the only one of others that fits."""
    if checkpoint.library == "timm":
        return "image-classification"
    if checkpoint.saved is None:
        raise ModelError(f"{model}: config.json does not name the class of the model (architectures)", hint=NO_HEAD)
    entries = registry.entries("tasks")
    for ours in (True, False):
        names = [entry.name for entry in entries if (entry.distribution == registry.OURS) == ours]
        found = [name for name in names if _fits(name, checkpoint)]
        if len(found) == 1 or (found and ours):
            return found[0]
    raise ModelError(f"{model} is a {checkpoint.saved}, which has no head for a task that is known", hint=NO_HEAD)


def _fits(kind: str, checkpoint: Checkpoint) -> bool:
    task = task_named(kind)
    classes = (task.auto_class, *task.other_classes)
    is_class = str(checkpoint.saved).endswith(tuple(name.removeprefix("AutoModel") for name in classes))
    return is_class and task.problem_type in (None, checkpoint.problem_type)


def _data_section(data: str, validation: str | None, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The section `data` without columns, and the reasons of what was guessed for it."""
    reasons = [] if is_local(data) else [f"data.name={data}: there is no such file, so it is a data set of the hub"]
    section = {"train": data} if is_local(data) else {"name": data}
    if validation is not None:
        return {**section, "validation" if is_local(data) else "validation_split": validation}, reasons
    if {"data.validation_share", "data.validation_split"} & given.keys():
        return section, reasons
    return {**section, "validation_share": HELD_OUT}, [*reasons, f"data.validation_share={HELD_OUT}: no --validation was given"]


def _columns(kind: str, section: Mapping[str, Any], origin: str) -> dict[str, str]:
    task = task_named(kind)
    table = read_table(task, section)
    return {} if table is None else guess_columns(task, table, origin, section)


def _why_column(key: str) -> str:
    return "the second column of the pair" if key == "text_pair" else "the column that fits"
