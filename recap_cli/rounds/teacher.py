"""A teacher: the finetuned model whose outputs a recipe's rounds learn from (`distill`), run once when the state is made."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from recap_cli.core.axes import Axis
from recap_cli.core.hidden_states import HiddenStates, spread, watched
from recap_cli.core.task import Distillation, Metric
from recap_cli.data.sampling import batches
from recap_cli.data.soft_targets import SoftTargets, fingerprint, stored_as
from recap_cli.data.sources import Raw
from recap_cli.data.split import CHUNK, Split
from recap_cli.errors import DataError, ModelError, PluginError, StorageError
from recap_cli.machine import devices
from recap_cli.models import build, create
from recap_cli.models.build import ModelSpec
from recap_cli.progress import Track
from recap_cli.recipe.recipe import Recipe
from recap_cli.recipe.schema import SELF, Model
from recap_cli.rounds.device_policy import blocks_of, on_device
from recap_cli.rounds.examples import make_splits
from recap_cli.rounds.full_model import FullModel
from recap_cli.rounds.layout import Layout
from recap_cli.rounds.recipe_model import forward_of, objective_of, source_of
from recap_cli.state.files import free_bytes
from recap_cli.tasks.calls import task_named
from recap_cli.tasks.losses import Lesson
from recap_cli.training.evaluation import Pass, evaluate

OTHER_TEACHER = "--set distill.teacher=DIR, a model that is finetuned for these labels, or null"


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


@dataclass(frozen=True)
class Teacher:
    """A teacher on the CPU, and the training and validation examples as it sees them."""

    model: nn.Module
    spec: ModelSpec
    axes: Sequence[Axis]
    splits: tuple[Split, Split]
    notes: tuple[str, ...] = ()

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """Inside, the model runs on a device, a block at a time."""
        return on_device(self.model.eval(), self.axes, device, self.spec.model_type)


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
    distillation = task_named(recipe.task.kind).distillation
    if recipe.distill.teacher is None or distillation is None:  # a recipe has no teacher for a task that cannot
        return None
    lengths = _lengths(distillation, splits[0])
    widths = _widths(recipe, Teacher(full.model, full.spec, full.layout.axes, splits), torch.device("cpu"))
    needed = int(lengths.sum()) * full.spec.num_labels * stored_as(full.spec.num_labels).itemsize
    needed += len(lengths) * sum(widths) * stored_as(sum(widths)).itemsize
    weights = sum(param.nbytes for param in full.model.parameters())  # which are written first
    _check_room(path, splits[0].variants * needed, weights)
    if recipe.distill.is_own:  # there is none yet: the first round makes it
        return None
    teacher = _itself(recipe, full, splits) if recipe.distill.teacher == SELF else _another(recipe, raw, track)
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
        return _taught(recipe, teacher, teacher.splits[0], figures, how, _widths(recipe, teacher, device))


def _taught(
    recipe: Recipe, teacher: Teacher, student: Split, figures: dict[str, float], how: Pass, widths: Sequence[int]
) -> Taught:
    """What a teacher, on its device, leaves for the training examples of the student, whose blocks have these widths."""
    distillation = cast(Distillation, task_named(recipe.task.kind).distillation)  # no recipe has a teacher for a task without
    lengths, train = _lengths(distillation, student), teacher.splits[0]
    _check_alike(lengths, _lengths(distillation, train))
    with _watched(recipe, teacher) as hidden:
        given = [_Given(*_rows(distillation, teacher, variant, how, hidden)) for variant in range(train.variants)]
    _check_rows(recipe, [each.rows for each in given], int(lengths.sum()))
    states = [_of_student_blocks(recipe, each.states, widths) for each in given] if hidden else None
    facts = {
        "name": recipe.distill.teacher,
        "parameters": sum(param.numel() for param in teacher.model.parameters()),
        "examples": fingerprint(student),
        "figures": figures,
    }
    kept = SoftTargets.of(states, torch.ones_like(lengths)) if states else None
    return Taught(SoftTargets.of([each.rows for each in given], lengths), kept, facts, teacher.notes)


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
    check_examples(split, examples)
    return replace(split, soft=targets, states=states)


def check_examples(split: Split, examples: str) -> None:
    """Do nothing if a split has this fingerprint. Raises `DataError`: they are not the examples that the teacher has seen."""
    if fingerprint(split) != examples:
        raise _other_examples(split)


def _other_examples(split: Split) -> DataError:
    return DataError(
        f"{split.origin} does not hold the examples that the teacher has seen",
        hint="put the data back as they were, or start a new state: recap init RECIPE --state NEW",
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


def _another(recipe: Recipe, raw: Raw, track: Track) -> Teacher:
    """Another model of the same task and labels; it sees images at its own size, and texts by its own tokenizer."""
    name, library = recipe.distill.teacher, recipe.distill.library or recipe.model.library
    own = recipe.model_copy(
        update={
            "model": Model(name=name, library=library, revision=recipe.distill.revision),
            "data": recipe.data.model_copy(update={"image_size": None}),
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


class _Given(NamedTuple):
    """What a teacher gives for all examples, batch by batch."""

    rows: list[Tensor]  # (rows, outputs) each
    states: list[list[Tensor]]  # block by block, (examples, width) each; no blocks where they are not watched


def _watched(recipe: Recipe, teacher: Teacher) -> AbstractContextManager[HiddenStates | None]:
    """Inside, the hidden states of a teacher, or of a student, can be heard; None where a recipe does not learn them."""
    if not recipe.distill.hidden_weight:
        return nullcontext()
    return watched(teacher.model, blocks_of(teacher.model, teacher.axes, teacher.spec.model_type))


def _widths(recipe: Recipe, teacher: Teacher, device: torch.device) -> list[int]:
    """The width of what each block gives, in the order of their runs; none where hidden states are not learned."""
    batch = next(iter(batches(teacher.splits[0], torch.arange(1), 1, device=device)))
    teacher.model.eval()
    with _watched(recipe, teacher) as hidden, torch.inference_mode():
        if hidden is None:
            return []
        hidden.heard(forward_of(teacher.spec, teacher.model))(batch)
        return [states.shape[1] for states in hidden.take(batch)]


def _of_student_blocks(recipe: Recipe, states: Sequence[Sequence[Tensor]], widths: Sequence[int]) -> list[Tensor]:
    """Of the hidden states of a teacher, batch by batch, those that a student's blocks of these widths learn, side by side.

    Raises:
        ModelError: they are of other widths.
    """
    places = spread(len(widths), len(states[0]))
    found = [states[0][place].shape[1] for place in places]
    if found != list(widths):
        theirs, ours = (" or ".join(map(str, sorted(set(of)))) for of in (found, widths))
        raise ModelError(
            f"the blocks of the teacher {recipe.distill.teacher} are {theirs} wide, and those of the model {ours}",
            hint="learn from its outputs alone: --set distill.hidden_weight=0",
        )
    return [torch.cat([of[place] for place in places], 1) for of in states]


def _rows(
    distillation: Distillation, teacher: Teacher, variant: int, how: Pass, hidden: HiddenStates | None
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The outputs of a teacher for a variant of its training examples, and its hidden states, batch by batch."""
    split, forward = teacher.splits[0], forward_of(teacher.spec, teacher.model)
    if hidden is not None:
        forward = hidden.heard(forward)
    stream = batches(split, torch.arange(len(split)), how.batch_size, variant=variant, device=how.device)
    label = "outputs of the teacher" + (" for flipped images" if variant else "")
    rows, states = list[Tensor](), list[list[Tensor]]()
    with torch.inference_mode():
        for batch in how.track(stream, label, -(-len(split) // how.batch_size)):
            given = distillation.rows(forward(batch), batch)
            rows.append(given.to("cpu", stored_as(given.shape[-1]), copy=True))
            states.append([of.to("cpu", torch.bfloat16) for of in hidden.take(batch)] if hidden else [])
    return rows, states


def _check_rows(recipe: Recipe, variants: Sequence[Sequence[Tensor]], wanted: int) -> None:
    """Refuse outputs that are not finite, and rows that are not as many as the task has said."""
    for batches_of_rows in variants:
        if not all(bool(rows.isfinite().all()) for rows in batches_of_rows):
            raise ModelError(
                f"the teacher {recipe.distill.teacher} gives outputs that are not finite",
                hint=f"its weights are damaged, or too large for fp32: {OTHER_TEACHER}",
            )
        if (found := sum(map(len, batches_of_rows))) != wanted:
            raise PluginError(
                f"the task {recipe.task.kind!r} gave {found:,} rows for a teacher, and by `rows_of_each` there are {wanted:,}",
                hint="see Distillation in docs/plugins/task.md",
            )


def _lengths(distillation: Distillation, split: Split) -> Tensor:
    """How many rows each example has, int64, (examples,)."""
    pieces = torch.split(torch.arange(len(split)), CHUNK)
    return torch.cat([distillation.rows_of_each(split.labels(some)).cpu() for some in pieces])


def _check_alike(student: Tensor, teacher: Tensor) -> None:
    if count := int((student != teacher).sum()):
        raise DataError(
            f"the teacher's tokenizer reads other words of {count:,} of {len(student):,} texts than the student's",
            hint="raise data.max_length, so that no text is cut, or choose a teacher with the student's tokenizer",
        )


def _check_room(path: Path, needed_bytes: int, model_bytes: int) -> None:
    """Refuse outputs that the disk of a state has no room for beside the model, before any of them is computed."""
    free = free_bytes(path)
    if free is not None and needed_bytes + model_bytes > free:
        raise StorageError(
            f"the model and the teacher's outputs take {model_bytes / 1e6:,.1f} and {needed_bytes / 1e6:,.1f} MB, and the disk "
            f"of {path} has {free / 1e6:,.1f} MB free",
            hint="make room, name a --state on another disk, or train on fewer examples: --set data.train_samples=…",
        )
