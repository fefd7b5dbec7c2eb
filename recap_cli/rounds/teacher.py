"""A teacher: the finetuned model whose outputs a recipe's rounds learn from (`distill`), run once when the state is made."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from recap_cli.core.task import Metric
from recap_cli.data.soft_targets import SoftTargets, fingerprint, stored_as
from recap_cli.data.sources import Raw
from recap_cli.data.split import Split
from recap_cli.errors import DataError, ModelError, StorageError
from recap_cli.machine import devices
from recap_cli.models import build, create
from recap_cli.progress import Track
from recap_cli.recipe.distill import SELF
from recap_cli.recipe.recipe import Recipe
from recap_cli.recipe.schema import Model
from recap_cli.rounds.examples import make_splits
from recap_cli.rounds.full_model import FullModel
from recap_cli.rounds.layout import Layout
from recap_cli.rounds.recipe_model import forward_of, objective_of, source_of
from recap_cli.rounds.teacher_outputs import OTHER_TEACHER, Teacher, block_widths, rows_of_each, soft_targets
from recap_cli.state.files import free_bytes
from recap_cli.tasks.calls import task_named
from recap_cli.tasks.losses import Lesson
from recap_cli.training.evaluation import Pass, evaluate

NEW_STATE = "start a new state: recap init RECIPE --state NEW"


@dataclass(frozen=True)
class Taught:
    """What a teacher has left.

    Attributes:
        targets: its outputs for the training examples.
        states: the hidden states of its blocks for them, one row each; None where they are not learned.
        facts: what `init` notes of it: its name, its figures on the validation data, and the fingerprint of the examples.
        notes: what a user should know of it.
    """

    targets: SoftTargets
    states: SoftTargets | None
    facts: dict[str, Any]
    notes: tuple[str, ...]


def lesson_of(recipe: Recipe) -> Lesson | None:
    """How much a recipe's rounds learn from a teacher; None where it has none."""
    distill = recipe.distill
    return None if distill.teacher is None else Lesson(distill.weight, distill.temperature, distill.hidden_weight)


def ask_teacher(
    recipe: Recipe, full: FullModel, raw: Raw, splits: tuple[Split, Split], path: Path, track: Track
) -> Taught | None:
    """The outputs of a recipe's teacher for all training examples, and its figures on the validation data.

    Args:
        recipe: names the teacher; None is returned where it names none.
        full: the student, before its head is warmed up.
        raw: the examples as their source has them.
        splits: the student's training and validation examples.
        path: the folder of the state, whose disk must have room.
        track: hears of progress.

    Raises:
        ModelError: the teacher cannot be read, or its head is for other labels or another task.
        DataError: the teacher reads fewer words of a text than the student, or more.
        StorageError: the disk has no room for the outputs.
    """
    if recipe.distill.teacher is None:
        return None
    lengths = rows_of_each(recipe, splits[0])
    widths = block_widths(recipe, Teacher(full.model, full.spec, full.layout.axes, splits), torch.device("cpu"))
    needed = int(lengths.sum()) * full.spec.num_labels * stored_as(full.spec.num_labels).itemsize
    of_states = len(lengths) * sum(widths) * torch.bfloat16.itemsize
    weights = sum(param.nbytes for param in full.model.parameters())  # which are written first
    _check_room(path, splits[0].variants * needed, splits[0].variants * of_states, weights)
    if recipe.distill.is_own:  # there is none yet: the first round makes it
        return None
    maps, image = task_named(recipe.task.kind).target.maps, full.spec.image
    size = int(image["size"]) if maps and image is not None else None
    teacher = _itself(recipe, full, splits) if recipe.distill.teacher == SELF else _another(recipe, size, raw, track)
    device = devices.pick(recipe.importance.device)
    how = Pass(recipe.evaluate.batch_size, device, track, "validation of the teacher")
    with teacher.on(device):
        forward = forward_of(teacher.spec, teacher.model)
        figures = evaluate(forward, teacher.splits[1], objective_of(recipe, teacher.spec), how)
        return _taught(recipe, teacher, splits[0], figures, how, widths)


def ask_own_teacher(recipe: Recipe, teacher: Teacher, figures: dict[str, float], track: Track) -> Taught:
    """The outputs of the teacher that a run has finetuned itself for all training examples.

    Args:
        recipe: of the run.
        teacher: the full model as its first round has left it, with the student's own examples.
        figures: of it on the validation data.
        track: hears of progress.

    Raises:
        ModelError: its outputs are not finite.
    """
    device = devices.pick(recipe.importance.device)
    with teacher.on(device):
        how = Pass(recipe.evaluate.batch_size, device, track)
        return _taught(recipe, teacher, teacher.splits[0], figures, how, block_widths(recipe, teacher, device))


def _taught(
    recipe: Recipe, teacher: Teacher, student: Split, figures: dict[str, float], how: Pass, widths: Sequence[int]
) -> Taught:
    """What a teacher, on its device, leaves for the training examples of the student, whose blocks have these widths."""
    targets, states = soft_targets(recipe, teacher, student, widths, how)
    facts = {
        "name": recipe.distill.teacher,
        "parameters": sum(param.numel() for param in teacher.model.parameters()),
        "examples": fingerprint(student),
        "figures": figures,
    }
    return Taught(targets, states, facts, teacher.notes)


def with_teacher(split: Split, targets: SoftTargets, states: SoftTargets | None, examples: str) -> Split:
    """The training examples, with what a teacher gives for them.

    Args:
        split: as the student sees them.
        targets: of the teacher.
        states: of its blocks, where they are learned too.
        examples: the fingerprint of those that the teacher has seen.

    Raises:
        DataError: they are not the same examples.
    """
    for given in (targets, states):
        if given is not None and (len(split) != len(given) or split.variants != len(given.values)):
            raise _other_examples(split)
    if states is not None and not bool((states.ends.diff(prepend=states.ends.new_zeros(1)) == 1).all()):
        raise DataError("the hidden states of the teacher are not one row for each example", hint=NEW_STATE)
    check_examples(split, examples)
    return replace(split, soft=targets, states=states)


def check_examples(split: Split, examples: str) -> None:
    """Do nothing if a split has this fingerprint. Raises `DataError`: they are not the examples that the teacher has seen."""
    if fingerprint(split) != examples:
        raise _other_examples(split)


def _other_examples(split: Split) -> DataError:
    return DataError(
        f"{split.origin} does not hold the examples that the teacher has seen",
        hint=f"put the data back as they were, or {NEW_STATE}",
    )


def teacher_notes(metric: Metric, taught: Taught | None, chance: Mapping[str, float] | None) -> Iterator[str]:
    """Yield what a user should know of a teacher: how it was made, and whether it knows anything."""
    if taught is None:
        return
    yield from taught.notes
    value = taught.facts["figures"][metric.name]
    if chance is not None and not metric.is_better(value, chance[metric.name]):
        yield (
            f"the teacher's {metric.name} of {value:.4f} is no better than chance ({chance[metric.name]:.4f}): are its "
            "labels in the order that its config.json says?"
        )


def _itself(recipe: Recipe, full: FullModel, splits: tuple[Split, Split]) -> Teacher:
    if full.has_new_head:
        reason = next((note for note in full.notes if "head" in note), "it has random weights")
        raise ModelError(
            f"{recipe.model.name or 'model.config'} has nothing to teach (distill.teacher: self): {reason}",
            hint="give a model that is finetuned for these labels; in a recipe, another teacher: --set distill.teacher=DIR, "
            "or =lora for one that the run makes of this model",
        )
    return Teacher(full.model, full.spec, full.layout.axes, splits)


def _another(recipe: Recipe, size: int | None, raw: Raw, track: Track) -> Teacher:
    """Another model of the same task and labels; it sees images at its own size, and texts by its own tokenizer.

    Where labels are maps, which have the `size` of the student's images, it sees images of that size.
    """
    name, library = recipe.distill.teacher, recipe.distill.library or recipe.model.library
    own = recipe.model_copy(
        update={
            "model": Model(name=name, library=library, revision=recipe.distill.revision),
            "data": recipe.data.model_copy(update={"image_size": size}),
        }
    )
    try:
        created = create.create_model(source_of(own, raw.label_names))
    except ModelError as error:
        raise ModelError(f"the teacher {name}: {error.message}", hint=OTHER_TEACHER) from error
    if created.new:
        raise ModelError(f"the teacher {name} has nothing to teach: {created.notes[0]}", hint=OTHER_TEACHER)
    axes = Layout.of_model(build.adapter_of(created.spec), created.model).axes
    splits = make_splits(own, created.spec, created.processor, track, raw)
    return Teacher(created.model, created.spec, axes, splits, tuple(f"teacher: {note}" for note in created.notes))


def _check_room(path: Path, outputs_bytes: int, states_bytes: int, model_bytes: int) -> None:
    """Refuse what the disk of a state has no room for beside the model, before any of it is computed."""
    free = free_bytes(path)
    if free is not None and outputs_bytes + states_bytes + model_bytes > free:
        hidden = f", its hidden states {states_bytes / 1e6:,.1f} MB" if states_bytes else ""
        less = "; hidden states are left out by --set distill.hidden_weight=0" if states_bytes else ""
        raise StorageError(
            f"the model and the teacher's outputs take {model_bytes / 1e6:,.1f} and {outputs_bytes / 1e6:,.1f} MB{hidden}, and "
            f"the disk of {path} has {free / 1e6:,.1f} MB free",
            hint=f"make room, name a --state on another disk, or train on fewer examples: --set data.train_samples=…{less}",
        )
