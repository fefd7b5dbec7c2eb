"""The training loop on a task that counts words: a micro-batch weighs by what it has of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_cli.core.batch_norms import train_mode
from recap_cli.core.task import IGNORED, Batch, Task
from recap_cli.plugins.tasks.classification import TEXT_CLASSIFICATION
from recap_cli.plugins.tasks.multi_label import TEXT_MULTI_LABEL
from recap_cli.plugins.tasks.semantic_segmentation import SEMANTIC_SEGMENTATION
from recap_cli.plugins.tasks.text_regression import TEXT_REGRESSION
from recap_cli.plugins.tasks.token_classification import TOKEN_CLASSIFICATION
from recap_cli.trainable.build import make_partial
from recap_cli.trainable.optim import Optimizer, sgd
from recap_cli.training.loop import Steps, Training, train

EXAMPLES, TOKENS, WIDTH, LABELS = 5, 7, 4, 3
WORDS = (7, 1, 0, 2, 1)  # of each example: one has most of them, one has none


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def batch_of(name: str) -> Batch:
    whole = torch.arange(EXAMPLES * TOKENS).view(EXAMPLES, TOKENS) % LABELS  # (examples, tokens)
    labels = {
        "words": torch.where(torch.arange(TOKENS) < torch.tensor(WORDS)[:, None], whole, IGNORED),
        "classes": torch.arange(EXAMPLES) % LABELS,
        "sets": (whole[:, :LABELS] > 0).float(),
        "numbers": drawn(EXAMPLES),
    }[name]
    x = drawn(EXAMPLES, TOKENS, WIDTH) if name == "words" else drawn(EXAMPLES, WIDTH)
    return {"x": x, "labels": labels}


TASKS: dict[str, Task] = {
    "words": TOKEN_CLASSIFICATION,
    "classes": TEXT_CLASSIFICATION,
    "sets": TEXT_MULTI_LABEL,
    "numbers": TEXT_REGRESSION,
}


def stepped(
    name: str, micro_batch_size: int | None, *, batch: Batch | None = None, **how: Any
) -> tuple[dict[str, Tensor], Training]:
    """The weights of a linear model after one step of SGD, so the gradient times the rate; and the facts of it."""
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 1 if name == "numbers" else LABELS)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainables = make_partial(model, {}, frozen=lambda _: False)
    facts = train(
        lambda batch: model(batch["x"]),
        TASKS[name],
        Optimizer(trainables, sgd(momentum=0.0)),
        [batch_of(name) if batch is None else batch],
        Steps(rate=lambda _: 1.0, micro_batch_size=micro_batch_size, **how),
    )
    return {trainable.name: before[trainable.name] - trainable.master for trainable in trainables}, facts


def by_torch(name: str) -> tuple[dict[str, Tensor], float]:
    """Gradient and loss of the mean over all that is counted, by torch's own losses."""
    torch.manual_seed(0)
    model, batch = nn.Linear(WIDTH, 1 if name == "numbers" else LABELS), batch_of(name)
    logits, labels = model(batch["x"]), batch["labels"]
    loss = {
        "words": lambda: nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()),
        "classes": lambda: nn.functional.cross_entropy(logits, labels),
        "sets": lambda: nn.functional.binary_cross_entropy_with_logits(logits, labels),
        "numbers": lambda: nn.functional.mse_loss(logits[:, 0], labels),
    }[name]()
    loss.backward()  # type: ignore[no-untyped-call]
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, float(loss.detach())


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("size", [None, 1, 2, 4])
def test_the_gradient_of_micro_batches_is_that_of_the_whole_batch(size: int | None, name: str) -> None:
    found, facts = stepped(name, size)
    wanted, loss = by_torch(name)
    assert facts.loss == pytest.approx(loss, rel=1e-6)
    for param, gradient in wanted.items():
        torch.testing.assert_close(found[param], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [None, 1, 2])
def test_with_a_batch_norm_the_gradient_of_micro_batches_is_that_of_the_whole_batch(size: int | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(WIDTH, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, LABELS, 1))
    labels = torch.arange(EXAMPLES * 16).view(EXAMPLES, 4, 4) % LABELS  # (examples, height, width)
    labels[0, 1:] = IGNORED
    x = drawn(EXAMPLES, WIDTH, 4, 4)
    logits = model.eval()(x)
    wanted = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), list(model.parameters()))
    before = [param.detach().clone() for param in model.parameters()]
    trainables = make_partial(train_mode(model), {}, frozen=lambda _: False)
    steps = Steps(rate=lambda _: 1.0, micro_batch_size=size)
    batch = {"x": x, "labels": labels}
    train(lambda b: model(b["x"]), SEMANTIC_SEGMENTATION, Optimizer(trainables, sgd(momentum=0.0)), [batch], steps)
    for trainable, old, gradient in zip(trainables, before, wanted, strict=True):
        torch.testing.assert_close(old - trainable.master, gradient, rtol=1e-5, atol=1e-6)


def test_a_fused_step_waits_for_the_last_micro_batch() -> None:
    plain, fused = stepped("words", 2)[0], stepped("words", 2, fused_backward=True)[0]
    assert all(torch.equal(plain[name], fused[name]) for name in plain)


def test_a_batch_without_a_word_gives_no_loss_and_no_gradient() -> None:
    model = nn.Linear(WIDTH, LABELS)
    before = model.weight.detach().clone()
    batch = {"x": drawn(2, TOKENS, WIDTH), "labels": torch.full((2, TOKENS), IGNORED)}
    for size in (None, 1):
        optimizer = Optimizer(make_partial(model, {}, frozen=lambda _: False), sgd(momentum=0.0))
        facts = train(
            lambda b: model(b["x"]), TOKEN_CLASSIFICATION, optimizer, [batch], Steps(rate=lambda _: 1.0, micro_batch_size=size)
        )
        assert facts.loss == 0.0
        assert torch.equal(model.weight, before)
