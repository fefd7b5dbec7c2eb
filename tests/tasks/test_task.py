"""The loss of classification, and targets that fit the head."""

import pytest
import torch

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


def test_no_examples() -> None:
    with pytest.raises(DataError, match=r"a\.csv holds no examples"):
        check_targets(torch.tensor([], dtype=torch.int64), 3, "a.csv")
