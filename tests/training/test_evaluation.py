"""Loss and metrics of a split, against scikit-learn."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

from recap_cli.core.ragged import Ragged
from recap_cli.core.task import IGNORED, Objective
from recap_cli.data.split import Split
from recap_cli.errors import DataError
from recap_cli.plugins.tasks.classification import metrics_of
from recap_cli.tasks.calls import task_named
from recap_cli.tasks.losses import mean_loss
from recap_cli.training.evaluation import Pass, Predictions, evaluate

TASK = task_named("text-classification")


def logits_split(count: int, num_labels: int) -> Split:
    """Examples whose input is their logits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, num_labels, generator=generator)
    labels = torch.randint(num_labels, (count,), generator=generator)
    return Split("made", labels, lambda indices, _: {"inputs": logits[indices]})


def objective(num_labels: int) -> Objective:
    return Objective(TASK, tuple(f"label {i}" for i in range(num_labels)), TASK.metrics[0])


def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["inputs"]


@pytest.mark.parametrize("num_labels", [2, 5])
def test_metrics_agree_with_scikit_learn(num_labels: int) -> None:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    split = logits_split(53, num_labels)
    found = evaluate(forward, split, objective(num_labels), how=Pass(batch_size=8))
    logits = split.batch(torch.arange(53))["inputs"]
    true, guessed = split.targets.numpy(), logits.argmax(1).numpy()
    average = "binary" if num_labels == 2 else "macro"
    assert list(found) == ["loss", "accuracy", "f1", "matthews"]
    assert found["accuracy"] == pytest.approx(accuracy_score(true, guessed))
    assert found["f1"] == pytest.approx(f1_score(true, guessed, average=average))
    assert found["matthews"] == pytest.approx(matthews_corrcoef(true, guessed))
    mean, count = mean_loss(TASK, logits, {"labels": split.targets})
    assert found["loss"] == pytest.approx(float(mean), rel=1e-6)
    assert count == 53


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_constant_guess_has_no_correlation(num_labels: int) -> None:
    labels = torch.tensor([0, 1, 1, 0])
    assert metrics_of(torch.zeros(4, dtype=torch.int64), labels, num_labels)["matthews"] == 0.0


def test_perfect_and_inverted_guesses() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    assert metrics_of(labels, labels, 2) == {"accuracy": 1.0, "f1": 1.0, "matthews": 1.0}
    assert metrics_of(1 - labels, labels, 2) == {"accuracy": 0.0, "f1": 0.0, "matthews": -1.0}


def test_no_graph_is_recorded() -> None:
    weight = torch.ones((), requires_grad=True)
    seen = []

    def weighted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(batch["inputs"] * weight)
        return seen[-1]

    evaluate(weighted, logits_split(10, 2), objective(2), how=Pass(batch_size=5))
    assert len(seen) == 2
    assert not any(logits.requires_grad for logits in seen)


def test_labels_beyond_the_head_are_refused_before_the_first_batch() -> None:
    with pytest.raises(DataError, match="but the head has 2 outputs"):
        evaluate(forward, logits_split(20, 4), objective(2), how=Pass(batch_size=5))


def test_the_loss_is_the_mean_over_all_words_however_they_are_batched() -> None:
    tags = [[0, 1, 1, 0, 1], [1], [IGNORED, 0], [IGNORED], [1, 0]]
    logits = torch.randn(5, 5, 2, generator=torch.Generator().manual_seed(0))
    split = Split("made", Ragged.of(tags), lambda indices, _: {"inputs": logits[indices, : max(len(tags[i]) for i in indices)]})
    task = task_named("token-classification")
    whole = split.batch(torch.arange(5))
    wanted = torch.nn.functional.cross_entropy(whole["inputs"].flatten(0, 1), whole["labels"].flatten())
    for size in (1, 2, 5):
        seen = Predictions()
        found = evaluate(forward, split, Objective(task, ("O", "B-x"), task.metrics[0]), Pass(batch_size=size), seen)
        assert found["loss"] == pytest.approx(float(wanted), rel=1e-6)
        assert list(found) == ["loss", "f1", "precision", "recall", "accuracy"]
        assert seen.columns["label"] == ["O B-x B-x O B-x", "B-x", "O", "", "B-x O"]
        assert list(map(len, seen.columns.values())) == [5, 5, 5]


def test_progress_hears_of_every_batch() -> None:
    heard: list[Any] = []

    def track(items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        counted = list(items)
        heard.append((label, total, len(counted)))
        return iter(counted)

    evaluate(
        forward,
        logits_split(11, 2),
        objective(2),
        how=Pass(batch_size=5, track=track, label="validation"),
    )
    assert heard == [("validation", 3, 3)]


def test_matthews_of_one_answer_for_every_example_is_0_as_scikit_learn_has_it() -> None:
    labels = torch.tensor([1] * 720 + [0] * 323)
    for answer in (0, 1):
        assert metrics_of(torch.full_like(labels, answer), labels, 2)["matthews"] == 0.0
    assert metrics_of(labels, labels, 2)["matthews"] == pytest.approx(1.0)


def test_f1_is_the_mean_over_the_labels_that_are_true_or_predicted_of_any_example() -> None:
    from sklearn.metrics import f1_score, matthews_corrcoef

    labels, predicted = torch.tensor([0, 0, 1, 3, 3]), torch.tensor([0, 1, 1, 3, 1])  # nothing has label 2 or 4
    found = metrics_of(predicted, labels, 5)
    assert found["f1"] == pytest.approx(f1_score(labels, predicted, average="macro", labels=[0, 1, 3]))
    assert found["matthews"] == pytest.approx(matthews_corrcoef(labels, predicted))
