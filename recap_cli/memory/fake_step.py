"""What one training step holds, without the machine that will take it: the real step of the real model on fake tensors.

Weights, batch and optimizer state have shapes and no memory, and everything else is the code that trains: the partial layers,
the loop in `training`, the optimizer. The same function runs on real tensors too, which is how the prediction is tested.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Literal

import torch
from torch import Tensor, nn

from recap_cli.core.task import Batch, Task
from recap_cli.errors import ModelError
from recap_cli.memory.fake_cuda import Answers, cuda_kernels
from recap_cli.memory.tracker import Tracker, Usage
from recap_cli.tasks.losses import mean_loss
from recap_cli.trainable.optim import Optimizer
from recap_cli.training.loop import Forward, Steps, train

Kernels = Literal["cuda", "cpu"]
MATCHING = "linear_sum_assignment"
WITHOUT = "training needs no prediction: recap run goes on without one, if the recipe has no finetune.memory_budget"


@dataclass(frozen=True)
class Step:
    """What takes part in one optimizer step. `batch` is the whole one, with `labels`."""

    model: nn.Module
    optimizer: Optimizer
    forward: Forward
    task: Task
    batch: Batch
    micro_batch_size: int | None = None
    fused_backward: bool = False
    offload: bool = False  # True: masters and moments are on the CPU, and count for nothing


class Fakes:
    """Makes tensors that have shapes and no memory, and runs steps on them."""

    def __init__(self) -> None:
        """Raises `ModelError` if this torch has no fake tensors where they are known to be: they are no public part of it."""
        try:
            from torch._subclasses import fake_tensor
        except ImportError as error:
            raise ModelError(f"torch {torch.__version__} has no fake tensors as they are known here", hint=WITHOUT) from error
        self.mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        self._refusals = (fake_tensor.DynamicOutputShapeException, fake_tensor.UnsupportedFakeTensorException)

    def like(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fake tensors on the CPU, of the shapes and types of these (which may be on the meta device)."""
        with self.mode:
            return {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}

    def usage(self, step: Step, kernels: Kernels = "cuda") -> Usage:
        """What a step on fake tensors would hold."""
        with self._pretending(kernels):
            return usage(step, answers=True)

    def evaluation_bytes(self, step: Step, batch: Batch, kernels: Kernels = "cuda") -> int:
        """The peak of scoring one batch with the model of a step, its optimizer's state held all the while."""
        with self._pretending(kernels):
            return evaluation_bytes(step, batch, answers=True)

    def peak_bytes(
        self, work: Callable[[], None], *, host: Iterable[Tensor], inputs: Mapping[str, Tensor], kernels: Kernels = "cuda"
    ) -> int:
        """The most that any other work on fake tensors holds on its device; the tensors of the `host` are not there."""
        tracker = Tracker()
        tracker.ignore(host)
        tracker.know(inputs, "other")
        tracker.answers = True
        with self._pretending(kernels), tracker.watch([]):
            work()
        return tracker.usage().peak_bytes

    @contextmanager
    def pretending(self, kernels: Kernels) -> Iterator[None]:
        """Inside, tensors that are made are fake, and attention and dropout are those of `kernels`.

        Raises:
            ModelError: the shapes of a model depend on the values of its tensors, which fake ones do not have.
        """
        with self._pretending(kernels), Answers():  # type: ignore[no-untyped-call]
            yield

    @contextmanager
    def _pretending(self, kernels: Kernels) -> Iterator[None]:
        """The same without answers to a program that asks for values: a tracker gives them faster than a mode below it."""
        with ExitStack() as stack:
            stack.enter_context(self.mode)
            if kernels == "cuda":
                stack.enter_context(cuda_kernels())
            stack.enter_context(any_matching())
            stack.enter_context(_own_caches())
            stack.enter_context(_silence())
            try:
                yield
            except self._refusals as error:
                what = "this model makes tensors of a shape that depends on values; its memory cannot be predicted"
                raise ModelError(f"{what} ({type(error).__name__})", hint=WITHOUT) from error


def usage(step: Step, *, answers: bool = False) -> Usage:
    """What a step holds, counted while it runs on the tensors that it is given. It takes the step: weights change.

    With `answers` these are fake, and whoever asks for a value of them hears 1.
    """
    tracker = _tracker(step, step.batch)
    tracker.answers = answers
    with tracker.watch([(trainable.name, trainable.grad_param) for trainable in step.optimizer.trainables]):
        take_step(step)
    return tracker.usage()


def take_step(step: Step) -> None:
    """Take the step, at a learning rate that changes next to nothing."""
    train(
        step.forward,
        step.task,
        step.optimizer,
        [step.batch],
        steps=Steps(rate=lambda _: 1e-6, micro_batch_size=step.micro_batch_size, fused_backward=step.fused_backward),
    )


def evaluation_bytes(step: Step, batch: Batch, *, answers: bool = False) -> int:
    """The peak of scoring one batch, counted while it runs; `answers` as in `usage`."""
    tracker = _tracker(step, batch)
    tracker.answers = answers
    step.model.eval()
    with torch.no_grad(), tracker.watch([]):
        outputs = step.forward(batch)
        mean_loss(step.task, outputs, batch)
        if step.task.maps_of is not None:  # what is scored there is larger than what the model gives
            step.task.maps_of(outputs, batch)
    return tracker.usage().peak_bytes


def _tracker(step: Step, batch: Batch) -> Tracker:
    """A tracker that knows what is there before the step."""
    optimizer = step.optimizer
    trainables, moments = optimizer.trainables, optimizer.moments
    tracker = Tracker(step.model, next(step.model.parameters()).device)
    tracker.know([*step.model.named_parameters(), *step.model.named_buffers()], "weights")
    masters = [(trainable.name, trainable.own_master) for trainable in trainables if trainable.own_master is not None]
    states = [(trainable.name, moment) for trainable in trainables for moment in moments[trainable.name].values()]
    if step.offload:
        tracker.ignore(tensor for _, tensor in (*masters, *states))
        optimizer.rule = replace(optimizer.rule, apply=tracker.unseen(optimizer.rule.apply))
    else:
        tracker.know(masters, "weights")
        tracker.know(states, "optimizer")
    tracker.know(batch, "other")
    return tracker


@contextmanager
def any_matching() -> Iterator[None]:
    """Inside, models that match queries with objects by their costs match the first ones: fake tensors have no costs.

    The library imports scipy's function into the modules of such models, where it is swapped.
    """
    users = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and MATCHING in vars(module)
    ]
    with ExitStack() as stack:
        for module in users:
            stack.callback(setattr, module, MATCHING, getattr(module, MATCHING))
            setattr(module, MATCHING, _first_ones)
        yield


def _first_ones(costs: Tensor) -> tuple[list[int], list[int]]:
    """Return a matching of as many as there are, by (queries, objects)."""
    count = min(costs.shape)
    return list(range(count)), list(range(count))


@contextmanager
def _own_caches() -> Iterator[None]:
    """Inside, what models of transformers keep from one call to the next, such as positions, is fake; afterwards it is gone.

    It counts as long as it is kept: the positions of OneFormer's mask features are as large as these.
    """
    _empty_caches()
    try:
        yield
    finally:
        _empty_caches()


def _empty_caches() -> None:
    """Empty all that `compile_compatible_method_lru_cache` of transformers keeps, in functions of modules and of classes."""
    models = [vars(module) for name, module in list(sys.modules.items()) if name.startswith("transformers.models.")]
    owners = [*models, *(vars(value) for values in models for value in values.values() if isinstance(value, type))]
    for function in (getattr(value, "__func__", value) for values in owners for value in values.values()):
        if isinstance(function, FunctionType) and "func_with_cache" in function.__code__.co_freevars:
            inspect.getclosurevars(function).nonlocals["func_with_cache"].cache_clear()


@contextmanager
def _silence() -> Iterator[None]:
    """Fake tensors warn of what is harmless here, such as a look at the address of their data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
