"""The training loop (paper, sec. 3.2): batches in, updated masters out. It knows nothing of rounds, recipes or states."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import isfinite
from time import perf_counter

import torch
from torch import Tensor, nn

from recap_cli.core.task import Batch, Outputs, Task
from recap_cli.errors import TrainingError
from recap_cli.machine.accounting import storage_bytes
from recap_cli.tasks.losses import Lesson, training_loss
from recap_cli.trainable.build import Trainable
from recap_cli.trainable.optim import Optimizer

Forward = Callable[[Batch], Outputs]


@dataclass(frozen=True)
class Steps:
    """How the steps of a training are taken.

    Attributes:
        rate: the learning rate of a step, counted from 0.
        micro_batch_size: a larger batch is accumulated from several of this size, each weighted by its share, so that the
            gradient is that of the whole batch; None: it is not split.
        max_grad_norm: gradients are clipped to this norm; None: they are not.
        fused_backward: True updates each tensor as soon as its gradient is complete, and frees it before the next one is made.
        before_step: runs before each step, with its number.
        log_every: after so many steps their losses are looked at, for which a device is waited.
        on_log: hears of each look.
        if_not_finite: what a loss that is not finite means to the caller, as the error goes on.
        hint: what a user can do then.
        lesson: how much is learned from a teacher, whose outputs are in each batch; None: nothing.
    """

    rate: Callable[[int], float]
    micro_batch_size: int | None = None
    max_grad_norm: float | None = None
    fused_backward: bool = False
    before_step: Callable[[int], None] = lambda _: None
    log_every: int = 10
    on_log: "Callable[[Look], None]" = lambda _: None
    if_not_finite: str = "nothing is kept"
    hint: str | None = None
    lesson: Lesson | None = None


@dataclass(frozen=True)
class Look:
    """What some steps of a training came to.

    Attributes:
        step: Steps that are done, these included.
        loss: Mean loss of these.
        lr: Learning rate of the last of them.
        seconds: Since the training began.
    """

    step: int
    loss: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class Training:
    """The facts of a training run.

    Attributes:
        steps: Optimizer steps.
        loss: Mean loss over the last tenth of the steps.
        seconds: Their time.
        gradient_bytes: The most bytes of gradients held at once.
        looks: What came of every `log_every` steps.
    """

    steps: int
    loss: float
    seconds: float
    gradient_bytes: int
    looks: tuple[Look, ...] = ()


def train(forward: Forward, task: Task, optimizer: Optimizer, batches: Iterable[Batch], steps: Steps) -> Training:
    """Take one optimizer step per batch.

    Args:
        forward: Maps a batch to the model's outputs.
        task: Has the loss, and says what it is averaged over.
        optimizer: Updates the trainable weights.
        batches: On the device, with the key `labels`.
        steps: How each step is taken.

    Raises:
        TrainingError: A loss is not finite. It is found at the next look at the losses.
    """
    losses: list[float] = []
    unseen: list[Tensor] = []
    looks: list[Look] = []
    watch = _GradientWatch(optimizer.trainables)
    started = perf_counter()

    def look() -> None:
        found = [float(loss) for loss in torch.stack(unseen).cpu()]
        unseen.clear()
        _check_finite(found, len(losses), steps)
        losses.extend(found)
        looks.append(Look(len(losses), sum(found) / len(found), optimizer.lr, perf_counter() - started))
        steps.on_log(looks[-1])

    with ExitStack() as stack:
        complete = stack.enter_context(_fused(optimizer, watch)) if steps.fused_backward else None
        for step, batch in enumerate(batches):
            optimizer.lr = steps.rate(step)
            steps.before_step(step)
            unseen.append(_accumulate(forward, task, batch, steps, complete))
            if complete is None:
                watch.all_held()
                _clip(optimizer.trainables, steps.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if len(unseen) == steps.log_every:
                look()
    if unseen:
        look()
    tail = losses[-max(1, len(losses) // 10) :]
    mean = sum(tail) / len(tail) if tail else float("nan")
    return Training(len(losses), mean, perf_counter() - started, watch.peak_bytes, tuple(looks))


def _accumulate(forward: Forward, task: Task, batch: Batch, steps: Steps, complete: "_Complete | None") -> Tensor:
    """Run forward and backward over a batch in micro-batches, and return its mean loss, detached.

    Each micro-batch has the share in it of what the task counts: examples, words or pixels.
    """
    examples = len(batch["labels"])
    size = steps.micro_batch_size or examples
    if size >= examples:
        mean, _ = training_loss(task, forward(batch), batch, steps.lesson)
        mean.backward()  # type: ignore[no-untyped-call]
        return mean.detach()
    total, counted = torch.zeros((), device=batch["labels"].device), task.count(batch)
    for start in range(0, examples, size):
        if complete is not None:
            complete.last = start + size >= examples
        part = task.part(batch, start, start + size)
        mean, count = training_loss(task, forward(part), part, steps.lesson)
        share = count / (max(counted, 1) if isinstance(counted, int) else counted.clamp(min=1))
        (mean * share).backward()  # type: ignore[no-untyped-call]
        total += mean.detach() * share  # in its place: each micro-batch holds what the others do
    return total


@dataclass
class _Complete:
    """Whether this backward is the last of its batch: then an accumulated gradient is complete."""

    last: bool = True


@contextmanager
def _fused(optimizer: Optimizer, watch: "_GradientWatch") -> Iterator[_Complete]:
    complete = _Complete()

    def step_of(trainable: Trainable) -> Callable[[Tensor], None]:
        def step(_: Tensor) -> None:
            if complete.last:
                watch.one_more()
                optimizer.step_one(trainable)
                trainable.grad_param.grad = None

        return step

    with ExitStack() as stack:
        for trainable in optimizer.trainables:
            hook = trainable.grad_param.register_post_accumulate_grad_hook(step_of(trainable))  # type: ignore[no-untyped-call]
            stack.callback(hook.remove)
        yield complete


class _GradientWatch:
    """The most bytes of gradients held at once, measured in the first two steps: all steps are alike."""

    def __init__(self, trainables: Iterable[Trainable]) -> None:
        self.trainables, self.peak_bytes, self.gradients_seen = list(trainables), 0, 0

    def all_held(self) -> None:
        if self.gradients_seen < 2 * len(self.trainables):
            self.gradients_seen += len(self.trainables)
            self._measure()

    def one_more(self) -> None:
        if self.gradients_seen < 2 * len(self.trainables):
            self.gradients_seen += 1
            self._measure()

    def _measure(self) -> None:
        held = storage_bytes(
            trainable.grad_param.grad for trainable in self.trainables if trainable.grad_param.grad is not None
        )
        self.peak_bytes = max(self.peak_bytes, held)


def _clip(trainables: Iterable[Trainable], max_grad_norm: float | None) -> None:
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_([trainable.grad_param for trainable in trainables], max_grad_norm)


def _check_finite(found: Iterable[float], before: int, steps: Steps) -> None:
    """Refuse losses that are not finite, of the steps after so many."""
    for step, loss in enumerate(found, before + 1):
        if not isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {step}; {steps.if_not_finite}", hint=steps.hint)
