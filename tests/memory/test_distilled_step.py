"""A step that learns from a teacher holds what a plain step holds: by torch's own record of its allocator."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recap_cli.core.hidden_states import watched
from recap_cli.core.task import TEACHER, TEACHER_STATES
from recap_cli.recipe.recipe import Recipe
from recap_cli.tasks.losses import Lesson
from recap_cli.training.loop import Steps, train
from tests.memory.test_fake_step import allocations, allocators_peaks, real_step, recipe_of
from tests.pico import LABELS
from tests.tiny import tiny

DEEP = {"num_hidden_layers": 6, "image_size": 64}  # of 64 tokens and one more


def peak(recipe: Recipe, lesson: Lesson | None, file: Path) -> tuple[int, int]:
    """The most that the allocator handed out in a step, and the bytes of what the teacher gives for a batch."""
    step = real_step(recipe, "recap")
    blocks = [path for path, module in step.model.named_modules() if type(module).__name__ in ("BertLayer", "ViTLayer")]
    examples, width = len(step.batch["labels"]), step.model.config.hidden_size  # type: ignore[union-attr]
    given = {TEACHER: torch.zeros(examples, 1, len(LABELS)), TEACHER_STATES: torch.zeros(examples, len(blocks) * width)}
    if lesson is None or not lesson.hidden_weight:
        given.pop(TEACHER_STATES)
    with watched(step.model, blocks) as states:
        forward = step.forward if TEACHER_STATES not in given else states.heard(step.forward)
        lesson = replace(lesson, states=states.take) if lesson is not None and lesson.hidden_weight else lesson
        batch = step.batch if lesson is None else {**step.batch, **given}
        steps = Steps(rate=lambda _: 1e-6, micro_batch_size=recipe.finetune.micro_batch_size, lesson=lesson)
        events = allocations(lambda: train(forward, step.task, step.optimizer, [batch], steps=steps), file)
    return allocators_peaks(events)[0], sum(tensor.nbytes for tensor in given.values())


@pytest.mark.parametrize("micro", [None, 4])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_distilled_step_holds_no_more_than_a_few_tensors_of_the_size_of_its_outputs(
    name: str, micro: int | None, tmp_path: Path
) -> None:
    recipe = recipe_of(name, larger=True, finetune={"micro_batch_size": micro})
    (plain, outputs), (taught, _) = (peak(recipe, lesson, tmp_path / "trace") for lesson in (None, Lesson(0.7, 2.0)))
    assert plain > 100 * outputs
    assert taught <= plain + 4 * outputs


@pytest.mark.parametrize("finetune", [{}, {"micro_batch_size": 4}, {"checkpointing": True}], ids=str)
def test_hidden_states_of_many_blocks_take_a_few_averages(finetune: dict[str, Any], tmp_path: Path) -> None:
    recipe = tiny("vit", model={"config": {**(tiny("vit").model.config or {}), **DEEP}}, finetune=finetune)
    (plain, _), (taught, given) = (peak(recipe, lesson, tmp_path / "trace") for lesson in (None, Lesson(0.7, 2.0, 1.0)))
    assert plain > 100 * given
    assert taught <= plain + 4 * given
