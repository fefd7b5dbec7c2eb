"""The loss of classification, and targets that fit the head."""

from dataclasses import replace

import pytest
import torch

from recap_cli.core.ragged import Ragged
from recap_cli.core.task import IGNORED
from recap_cli.errors import DataError
from recap_cli.tasks.calls import task_named
from recap_cli.tasks.losses import check_targets, mean_loss

TASK = task_named("text-classification")


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return mean_loss(TASK, logits, {"labels": labels})[0]


def test_the_loss_is_the_mean_cross_entropy() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    labels = torch.tensor([0, 2])
    by_hand = -(logits - logits.logsumexp(dim=1, keepdim=True))[torch.arange(2), labels].mean()
    torch.testing.assert_close(loss(logits, labels), by_hand)


def test_the_loss_of_bf16_logits_is_float32_and_has_their_gradient() -> None:
    logits = torch.randn(4, 3, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = loss(logits, torch.tensor([0, 1, 2, 0]))
    found.backward()
    assert found.dtype == torch.float32
    assert logits.grad is not None


def test_labels_that_fit_the_head_pass() -> None:
    check_targets(torch.tensor([0, 1, 2]), 3, "x")


@pytest.mark.parametrize("labels", [[0, 3], [-1, 2]])
def test_labels_that_do_not_fit_the_head(labels: list[int]) -> None:
    low, high = labels
    with pytest.raises(DataError, match=rf"the labels of a\.csv go from {low} to {high}, but the head has 3 outputs"):
        check_targets(torch.tensor(labels), 3, "a.csv")


@pytest.mark.parametrize("rows", [[[0, 3], [1]], [[0], [-1, 2]]])
def test_rows_of_targets_are_looked_through(rows: list[list[int]]) -> None:
    with pytest.raises(DataError, match=r"the labels of a\.csv go from .* but the head has 3 outputs \(0 … 2\)"):
        check_targets(Ragged.of(rows), 3, "a.csv")


@pytest.mark.parametrize(
    "targets",
    [
        Ragged.of([[0, IGNORED], [], [2]]),
        Ragged.of([[IGNORED], []]),  # no word of it is left
        torch.tensor([-4.5, 17.0]),  # numbers, which no output is counted by
        torch.tensor([[0.0, 1.0], [1.0, 1.0]]),
    ],
)
def test_targets_that_are_no_numbers_of_outputs_or_are_ignored_pass(targets: torch.Tensor | Ragged) -> None:
    check_targets(targets, 3, "x")


def test_the_mean_loss_of_nothing_is_0_with_a_gradient_of_0() -> None:
    task = task_named("token-classification")
    logits = torch.randn(2, 4, 3, requires_grad=True)
    mean, count = mean_loss(task, logits, {"labels": torch.full((2, 4), IGNORED)})
    mean.backward()  # type: ignore[no-untyped-call]
    assert (float(mean.detach()), int(count)) == (0.0, 0)
    assert logits.grad is not None
    assert not logits.grad.any()
    none = replace(TASK, count=lambda _: 0)
    assert float(mean_loss(none, torch.zeros(0, 3), {"labels": torch.zeros(0, dtype=torch.int64)})[0]) == 0.0


def test_the_mean_is_over_what_the_task_counts() -> None:
    task = task_named("token-classification")
    logits, labels = torch.randn(2, 3, 4), torch.tensor([[0, IGNORED, 3], [IGNORED, IGNORED, 1]])
    mean, count = mean_loss(task, logits, {"labels": labels})
    assert int(count) == 3
    torch.testing.assert_close(mean, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_no_examples() -> None:
    with pytest.raises(DataError, match=r"a\.csv holds no examples"):
        check_targets(torch.tensor([], dtype=torch.int64), 3, "a.csv")
