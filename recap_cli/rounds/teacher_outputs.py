"""What a teacher gives for the training examples: its outputs, and the hidden states of its blocks where they are learned."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from recap_cli.core.axes import Axis
from recap_cli.core.blocks import block_paths
from recap_cli.core.hidden_states import NO_STATES, HiddenStates, spread, watched
from recap_cli.core.task import Distillation
from recap_cli.data.sampling import batches
from recap_cli.data.soft_targets import SoftTargets, stored_as
from recap_cli.data.split import CHUNK, Split
from recap_cli.errors import DataError, ModelError, PluginError
from recap_cli.models.build import ModelSpec
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.device_policy import on_device
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.tasks.calls import task_named
from recap_cli.training.evaluation import Pass

OTHER_TEACHER = "--set distill.teacher=DIR, a model that is finetuned for these labels, or null"


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
    distillation, train = _distillation(recipe), teacher.splits[0]
    lengths = rows_of_each(recipe, student)
    _check_alike(lengths, rows_of_each(recipe, train))
    places = _places(recipe, widths, block_widths(recipe, teacher, torch.device(how.device)))
    states = torch.empty((train.variants, len(train), sum(widths)), dtype=torch.bfloat16)
    with watched(teacher.model, hidden_blocks(recipe, teacher.model, teacher.axes, teacher.spec.model_type)) as hidden:
        rows = [_rows(distillation, teacher, at, how, hidden, _Kept(states[at], places)) for at in range(train.variants)]
    _check_rows(recipe, rows, int(lengths.sum()))
    ones = torch.ones_like(lengths)
    return SoftTargets.of(rows, lengths), SoftTargets(states, ones.cumsum(0)) if places else None


def rows_of_each(recipe: Recipe, split: Split) -> Tensor:
    """How many rows of outputs each example has, int64, (examples,)."""
    pieces = torch.split(torch.arange(len(split)), CHUNK)
    return torch.cat([_distillation(recipe).rows_of_each(split.labels(some)).cpu() for some in pieces])


def block_widths(recipe: Recipe, model: Teacher, device: torch.device) -> list[int]:
    """The width of what each block of a teacher, or student, gives, in the order of their runs; none where none is learned."""
    blocks = hidden_blocks(recipe, model.model, model.axes, model.spec.model_type)
    if not blocks:
        return []
    batch = next(iter(batches(model.splits[0], torch.arange(1), 1, device=device)))
    with watched(model.model.eval(), blocks) as hidden, torch.inference_mode():
        hidden.heard(forward_of(model.spec, model.model))(batch)
        return [states.shape[1] for states in hidden.take()]


def hidden_blocks(recipe: Recipe, model: nn.Module, axes: Sequence[Axis], adapter: str) -> list[str]:
    """The paths of the blocks whose hidden states a recipe learns; none where it learns none.

    Raises:
        PluginError: the adapter, which is named, does not say what the blocks are.
    """
    try:
        return block_paths(model, axes) if recipe.distill.hidden_weight > 0 else []
    except LookupError as error:
        raise PluginError(f"the adapter {adapter!r} does not say what the blocks are: {error}", hint=NO_STATES) from error


def _distillation(recipe: Recipe) -> Distillation:
    """How a student learns the outputs of a teacher: no recipe has a teacher for a task that cannot."""
    return cast(Distillation, task_named(recipe.task.kind).distillation)


def _places(recipe: Recipe, student: Sequence[int], teacher: Sequence[int]) -> list[int]:
    """Which blocks of the teacher those of the student learn from, by the widths of both; none where no state is learned.

    Raises:
        ModelError: they are of other widths.
    """
    if (places := spread(student, teacher)) is None:
        theirs, ours = (_as_text(widths) for widths in (teacher, student))
        raise ModelError(
            f"the blocks of the teacher {recipe.distill.teacher} are {theirs} wide, and those of the model {ours}",
            hint=NO_STATES,
        )
    return places


def _as_text(widths: Sequence[int]) -> str:
    return ", then ".join(str(width) for width, _ in groupby(widths))


class _Kept(NamedTuple):
    """Where the hidden states of a variant are written, (examples, sum of widths), and of which blocks."""

    rows: Tensor
    places: Sequence[int]


def _rows(
    distillation: Distillation, teacher: Teacher, variant: int, how: Pass, hidden: HiddenStates, kept: _Kept
) -> list[Tensor]:
    """The outputs of a teacher for a variant of its training examples, batch by batch; its hidden states are written."""
    split, forward, done = teacher.splits[0], hidden.heard(forward_of(teacher.spec, teacher.model)), 0
    stream = batches(split, torch.arange(len(split)), how.batch_size, variant=variant, device=how.device)
    label = "outputs of the teacher" + (" for flipped images" if variant else "")
    found = list[Tensor]()
    with torch.inference_mode():
        for batch in how.track(stream, label, -(-len(split) // how.batch_size)):
            rows, states = distillation.rows(forward(batch), batch), hidden.take()
            found.append(rows.to("cpu", stored_as(rows.shape[-1]), copy=True))
            if kept.places:
                kept.rows[done : done + how.batch_size] = torch.cat([states[place] for place in kept.places], 1).cpu()
            done += how.batch_size
    return found


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
