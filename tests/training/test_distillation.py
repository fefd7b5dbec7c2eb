"""The loss of a teacher's outputs, and a step that learns from labels and teacher together."""

import math

import pytest
import torch
from torch import Tensor, nn

from recap_cli.core.task import IGNORED, TEACHER, Batch
from recap_cli.errors import PluginError
from recap_cli.tasks.losses import Lesson, soft_binary_cross_entropy, soft_cross_entropy, squared_errors, training_loss
from tests.training.test_loop import LABELS, TASKS, WIDTH, WORDS, batch_of, drawn, stepped

LESSON = Lesson(weight=0.7, temperature=2.0)


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def naive_divergence(student: Tensor, teacher: Tensor, temperature: float) -> float:
    total = 0.0
    for row, wanted in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(wanted, temperature), softmax(row, temperature)
        total += temperature**2 * sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return total


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_soft_cross_entropy_is_the_divergence_of_the_softened_classes(temperature: float) -> None:
    student, teacher = drawn(4, 3), 2 * drawn(3, 4).T
    assert float(soft_cross_entropy(student, teacher, temperature)) == pytest.approx(
        naive_divergence(student, teacher, temperature), rel=1e-5
    )
    assert float(soft_cross_entropy(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_binary_cross_entropy_is_the_divergence_of_each_decision(temperature: float) -> None:
    student, teacher = drawn(4, 3), drawn(3, 4).T
    pairs = [torch.stack([side.flatten(), torch.zeros(12)], dim=1) for side in (student, teacher)]  # as two classes each
    wanted = naive_divergence(*pairs, temperature)
    assert float(soft_binary_cross_entropy(student, teacher, temperature)) == pytest.approx(wanted, rel=1e-5)
    assert float(soft_binary_cross_entropy(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-5)


def test_numbers_are_learned_by_their_squared_errors() -> None:
    assert float(squared_errors(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [2.5]]), 2.0)) == 4.25


def taught(name: str) -> tuple[Batch, Tensor]:
    """A batch with a teacher's outputs; and these as the rows of all that is counted."""
    batch, outputs = batch_of(name), 1 if name == "numbers" else LABELS
    lengths = WORDS if name == "words" else (1,) * len(batch["labels"])
    rows = 3 * drawn(sum(lengths), outputs)
    padded, start = torch.zeros(len(lengths), max(lengths), outputs), 0
    for place, length in zip(padded, lengths, strict=True):
        place[:length] = rows[start : start + length]
        start += length
    return {**batch, TEACHER: padded}, rows


def by_torch(name: str) -> tuple[dict[str, Tensor], float]:
    """Gradient and loss of `(1 - w) · L(labels) + w · L(teacher)`, by torch's own losses."""
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 1 if name == "numbers" else LABELS)
    batch, rows = taught(name)
    logits, labels, t = model(batch["x"]), batch["labels"], LESSON.temperature
    if name in ("words", "classes"):
        kept = logits[labels != IGNORED]
        hard = nn.functional.cross_entropy(kept, labels[labels != IGNORED])
        soft = t * t * nn.functional.kl_div((kept / t).log_softmax(-1), (rows / t).softmax(-1), reduction="batchmean")
    elif name == "sets":
        hard = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        p, q = (rows / t).sigmoid(), (logits / t).sigmoid()
        soft = t * t * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    else:
        hard, soft = nn.functional.mse_loss(logits[:, 0], labels), nn.functional.mse_loss(logits, rows)
    loss = 0.3 * hard + 0.7 * soft
    loss.backward()  # type: ignore[no-untyped-call]
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, float(loss.detach())


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("size", [None, 1, 2])
def test_a_step_learns_from_labels_and_teacher_in_micro_batches_too(size: int | None, name: str) -> None:
    found, facts = stepped(name, size, batch=taught(name)[0], lesson=LESSON)
    wanted, loss = by_torch(name)
    assert facts.loss == pytest.approx(loss, rel=1e-5)
    for param, gradient in wanted.items():
        torch.testing.assert_close(found[param], gradient, rtol=1e-4, atol=1e-5)


def test_a_task_that_gives_other_rows_than_the_teachers_is_refused() -> None:
    batch, _ = taught("classes")
    with pytest.raises(PluginError, match=r"rows of shape \(5, 3\) for a student, and \(5, 2\) for its teacher"):
        training_loss(TASKS["classes"], drawn(5, LABELS), {**batch, TEACHER: batch[TEACHER][..., :2]}, LESSON)
