"""The training loop on a task that counts words: a micro-batch weighs by what it has of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recap_cli.core.batch_norms import train_mode
from recap_cli.core.task import IGNORED, Batch, Task
from recap_cli.errors import TrainingError
from recap_cli.plugins.tasks.classification import TEXT_CLASSIFICATION
from recap_cli.plugins.tasks.multi_label import TEXT_MULTI_LABEL
from recap_cli.plugins.tasks.semantic_segmentation import SEMANTIC_SEGMENTATION
from recap_cli.plugins.tasks.text_regression import TEXT_REGRESSION
from recap_cli.plugins.tasks.token_classification import TOKEN_CLASSIFICATION
from recap_cli.trainable.build import make_partial
from recap_cli.trainable.optim import Optimizer, sgd
from recap_cli.training.loop import Look, Steps, Training, train

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


def training(log_every: int, *, steps: int = 7, bad: int | None = None, **how: Any) -> tuple[Training, list[Look]]:
    """Some steps on one batch, whose loss is not finite from the step `bad` on, and what was heard of them."""
    torch.manual_seed(0)
    model, heard, at = nn.Linear(WIDTH, LABELS), list[Look](), iter(range(1, steps + 1))

    def forward(batch: Batch) -> Tensor:
        out: Tensor = model(batch["x"])
        return out * float("nan") if next(at) == bad else out

    optimizer = Optimizer(make_partial(model, {}, frozen=lambda _: False), sgd(momentum=0.0))
    rate = Steps(rate=lambda step: 0.1 / (1 + step), log_every=log_every, on_log=heard.append, **how)
    return train(forward, TASKS["classes"], optimizer, [batch_of("classes")] * steps, rate), heard


def test_losses_are_looked_at_every_few_steps_and_at_the_end() -> None:
    each, _ = training(1)
    assert [look.step for look in each.looks] == [1, 2, 3, 4, 5, 6, 7]
    assert each.loss == each.looks[-1].loss  # of the last tenth of the steps
    assert each.looks[0].loss > each.looks[-1].loss
    found, heard = training(3)
    assert found.looks == tuple(heard)
    assert [look.step for look in heard] == [3, 6, 7]
    losses = [look.loss for look in each.looks]
    assert [look.loss for look in heard] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]])
    assert [look.lr for look in heard] == pytest.approx([0.1 / 3, 0.1 / 6, 0.1 / 7])
    assert 0 < heard[0].seconds < heard[1].seconds < heard[2].seconds <= found.seconds
    assert training(3, steps=0)[0].looks == ()


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_the_first_loss_that_is_not_finite_is_named_however_late_it_is_seen(log_every: int) -> None:
    with pytest.raises(TrainingError, match="the loss is nan at step 5; all is lost") as caught:
        training(log_every, bad=5, if_not_finite="all is lost", hint="go slow")
    assert caught.value.hint == "go slow"


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
