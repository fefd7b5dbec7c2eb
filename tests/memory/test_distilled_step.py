"""A step that learns from a teacher holds what a plain step holds: by torch's own record of its allocator."""

from pathlib import Path

import pytest
import torch

from recap_cli.core.task import TEACHER
from recap_cli.tasks.losses import Lesson
from recap_cli.training.loop import Steps, train
from tests.memory.test_fake_step import allocations, allocators_peaks, real_step, recipe_of
from tests.pico import LABELS


def peak(name: str, lesson: Lesson | None, micro: int | None, file: Path) -> tuple[int, int]:
    """The most that the allocator handed out in a step, and the bytes of the teacher's outputs for a batch."""
    step = real_step(recipe_of(name, larger=True, finetune={"micro_batch_size": micro}), "recap")
    rows = torch.zeros(len(step.batch["labels"]), 1, len(LABELS))
    batch = step.batch if lesson is None else {**step.batch, TEACHER: rows}
    steps = Steps(rate=lambda _: 1e-6, micro_batch_size=micro, lesson=lesson)
    events = allocations(lambda: train(step.forward, step.task, step.optimizer, [batch], steps=steps), file)
    return allocators_peaks(events)[0], rows.nbytes


@pytest.mark.parametrize("micro", [None, 4])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_distilled_step_holds_no_more_than_a_few_tensors_of_the_size_of_its_outputs(
    name: str, micro: int | None, tmp_path: Path
) -> None:
    (plain, outputs), (taught, _) = (peak(name, lesson, micro, tmp_path / "trace") for lesson in (None, Lesson(0.7, 2.0)))
    assert plain > 100 * outputs
    assert taught <= plain + 4 * outputs
