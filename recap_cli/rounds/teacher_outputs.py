"""What a teacher gives for the training examples: its outputs, and the hidden states of its blocks where they are learned."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from recap_cli.core.axes import Axis
from recap_cli.core.hidden_states import HiddenStates, spread, watched
from recap_cli.core.task import Distillation
from recap_cli.data.sampling import batches
from recap_cli.data.soft_targets import SoftTargets, stored_as
from recap_cli.data.split import CHUNK, Split
from recap_cli.errors import DataError, ModelError, PluginError
from recap_cli.models.build import ModelSpec
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.device_policy import blocks_of, on_device
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.tasks.calls import task_named
from recap_cli.training.evaluation import Pass

OTHER_TEACHER = "--set distill.teacher=DIR, a model that is finetuned for these labels, or null"
NO_STATES = "learn from the outputs alone: --set distill.hidden_weight=0"


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


def soft_targets(
    recipe: Recipe, teacher: Teacher, student: Split, widths: Sequence[int], how: Pass
) -> tuple[SoftTargets, SoftTargets | None]:
    """What a teacher, on its device, gives for the training examples of a student, whose blocks have these widths.

    Returns:
        Its outputs; and its hidden states, one row for each example, or None where a recipe does not learn them.

    Raises:
        DataError: the teacher reads fewer words of a text than the student, or more.
        ModelError: the outputs are not finite, or the blocks are of other widths.
        PluginError: the task gives other rows than it has said.
    """
    distillation = _distillation(recipe)
    lengths, variants = rows_of_each(recipe, student), range(teacher.splits[0].variants)
    _check_alike(lengths, rows_of_each(recipe, teacher.splits[0]))
    with _watched(recipe, teacher) as hidden:
        given = [_given(distillation, teacher, variant, how, hidden) for variant in variants]
    _check_rows(recipe, [each.rows for each in given], int(lengths.sum()))
    targets = SoftTargets.of([each.rows for each in given], lengths)
    if not recipe.distill.hidden_weight:
        return targets, None
    states = [_of_student_blocks(recipe, each.states, widths) for each in given]
    return targets, SoftTargets.of(states, torch.ones_like(lengths))


def rows_of_each(recipe: Recipe, split: Split) -> Tensor:
    """How many rows of outputs each example has, int64, (examples,)."""
    pieces = torch.split(torch.arange(len(split)), CHUNK)
    return torch.cat([_distillation(recipe).rows_of_each(split.labels(some)).cpu() for some in pieces])


def block_widths(recipe: Recipe, model: Teacher, device: torch.device) -> list[int]:
    """The width of what each block of a teacher, or student, gives, in the order of their runs; none where none is learned."""
    batch = next(iter(batches(model.splits[0], torch.arange(1), 1, device=device)))
    model.model.eval()
    with _watched(recipe, model) as hidden, torch.inference_mode():
        hidden.heard(forward_of(model.spec, model.model))(batch)
        return [states.shape[1] for states in hidden.take(batch)]


def _distillation(recipe: Recipe) -> Distillation:
    """How a student learns the outputs of a teacher: no recipe has a teacher for a task that cannot."""
    return cast(Distillation, task_named(recipe.task.kind).distillation)


class _Given(NamedTuple):
    """What a teacher gives for all examples, batch by batch."""

    rows: list[Tensor]  # (rows, outputs) each
    states: list[list[Tensor]]  # block by block, (examples, width) each


def _watched(recipe: Recipe, teacher: Teacher) -> AbstractContextManager[HiddenStates]:
    """Inside, the hidden states of a teacher, or of a student, can be heard; those of no block where a recipe learns none."""
    model, learns = teacher.model, recipe.distill.hidden_weight > 0
    return watched(model, blocks_of(model, teacher.axes, teacher.spec.model_type) if learns else [])


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
            hint=NO_STATES,
        )
    return [torch.cat([of[place] for place in places], 1) for of in states]


def _given(distillation: Distillation, teacher: Teacher, variant: int, how: Pass, hidden: HiddenStates) -> _Given:
    """What a teacher gives for a variant of its training examples."""
    split, forward = teacher.splits[0], hidden.heard(forward_of(teacher.spec, teacher.model))
    stream = batches(split, torch.arange(len(split)), how.batch_size, variant=variant, device=how.device)
    label = "outputs of the teacher" + (" for flipped images" if variant else "")
    rows, states = list[Tensor](), list[list[Tensor]]()
    with torch.inference_mode():
        for batch in how.track(stream, label, -(-len(split) // how.batch_size)):
            given = distillation.rows(forward(batch), batch)
            rows.append(given.to("cpu", stored_as(given.shape[-1]), copy=True))
            states.append([of.to("cpu", torch.bfloat16) for of in hidden.take(batch)])
    return _Given(rows, states)


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


def _check_alike(student: Tensor, teacher: Tensor) -> None:
    if count := int((student != teacher).sum()):
        raise DataError(
            f"the teacher's tokenizer reads other words of {count:,} of {len(student):,} texts than the student's",
            hint="raise data.max_length, so that no text is cut, or choose a teacher with the student's tokenizer",
        )
