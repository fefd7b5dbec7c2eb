"""SGD and AdamW over compact tensors, with moments that outlive a round (paper, eq. (5)).

`torch.optim` keeps one step count per tensor. Here the entries of one tensor may have been trained in different rounds. So each
group of entries keeps its own count `t`, the number of steps it has taken part in, and bias correction divides by `1 − β^t`
entry by entry: one that is trained for the first time in round 7 is one step old, not seven rounds.

Where all counts are equal the arithmetic is that of `torch.optim.SGD` and `torch.optim.AdamW` (`foreach=False`), to the bit.
That holds in the first round, and in all of them if everything is trainable in each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import cos, pi
from typing import Literal

import torch
from torch import Tensor

from recap_cli.trainable.build import Trainable

Moments = dict[str, Tensor]
Count = int | Tensor  # steps taken before the next one: one number, or one per row or column, shaped to broadcast
Apply = Callable[[Tensor, Tensor, Moments, Count, float, float], None]
Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class UpdateRule:
    """An update rule: its moments, and one step.

    Attributes:
        name: as a recipe names it.
        idle_decay: its moments, each with the factor it decays by in a round that an entry sits out (eq. (5)).
        apply: `apply(master, grad, moments, count, lr, weight_decay)` updates `master` in place; all are fp32 and of one shape.
            It may write into `grad` too, and makes no more than one tensor of that shape.
    """

    name: str
    idle_decay: Mapping[str, float]
    apply: Apply


def sgd(*, momentum: float) -> UpdateRule:
    """SGD as in `torch.optim.SGD`: weight decay is added to the gradient; without momentum there are no moments."""

    def apply(master: Tensor, grad: Tensor, moments: Moments, count: Count, lr: float, weight_decay: float) -> None:
        if weight_decay:
            grad = grad.add_(master, alpha=weight_decay)
        if momentum:
            grad = moments["momentum"].mul_(momentum).add_(grad)
        master.add_(grad, alpha=-lr)

    return UpdateRule("sgd", {"momentum": momentum} if momentum else {}, apply)


def adamw(*, betas: tuple[float, float], eps: float) -> UpdateRule:
    """AdamW (1711.05101) as in `torch.optim.AdamW`, with the bias correction of each entry's own count."""
    beta1, beta2 = betas

    def apply(master: Tensor, grad: Tensor, moments: Moments, count: Count, lr: float, weight_decay: float) -> None:
        mean, square = moments["exp_avg"], moments["exp_avg_sq"]
        if weight_decay:
            master.mul_(1 - lr * weight_decay)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if isinstance(count, int):
            correction = (1 - beta2 ** (count + 1)) ** 0.5
            denominator = square.sqrt().div_(correction).add_(eps)
            master.addcdiv_(mean, denominator, value=-lr / (1 - beta1 ** (count + 1)))
        else:
            t = (count + 1).double()  # (rows, 1) or (1, columns), on the CPU: MPS knows no float64
            root = (1 - beta2**t).sqrt().to(master.dtype).to(master.device)
            rate = (lr / (1 - beta1**t)).to(master.dtype).to(master.device)
            denominator = square.sqrt().div_(root).add_(eps)
            master.sub_(torch.div(mean, denominator, out=denominator).mul_(rate))

    return UpdateRule("adamw", {"exp_avg": beta1, "exp_avg_sq": beta2}, apply)


@dataclass(frozen=True)
class CarriedState:
    """What trainable entries bring from the rounds before (eq. (5)), by parameter name; what is missing starts at zero.

    Attributes:
        moments: by moment name, fp32, compact: shape as the trainable tensor.
        counts: the steps that the entries have taken so far, int32: shape (1,), or one per chosen row or column.
        along: the dimension that the rows or columns are chosen along.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict)
    counts: Mapping[str, Tensor] = field(default_factory=dict)
    along: Mapping[str, int] = field(default_factory=dict)


class Optimizer:
    """Updates the masters of trainable tensors by a rule, and writes them back to where the forward reads them.

    Weight decay spares vectors (biases and norms), as is usual.
    """

    def __init__(
        self,
        trainables: Sequence[Trainable],
        rule: UpdateRule,
        *,
        weight_decay: float = 0.0,
        carried: CarriedState = CarriedState(),
        scale: Mapping[str, float] | None = None,
    ) -> None:
        """An optimizer at learning rate 0, until `lr` is set.

        Args:
            trainables: what is updated.
            rule: how.
            weight_decay: of matrices, in the unit of the rule.
            carried: the moments and step counts that the entries begin with.
            scale: factors of the learning rate by parameter name, 1 for those that it does not name.
        """
        self.trainables, self.rule, self.weight_decay, self.lr = trainables, rule, weight_decay, 0.0
        self.moments = {s.name: _start(s, rule, carried.moments.get(s.name, {})) for s in trainables}
        self._before = {s.name: _count(s, carried.counts.get(s.name), carried.along.get(s.name)) for s in trainables}
        self._steps = {s.name: 0 for s in trainables}
        self._scale = {s.name: (scale or {}).get(s.name, 1.0) for s in trainables}

    def step(self) -> None:
        """Update every trainable tensor that has a gradient."""
        for trainable in self.trainables:
            self.step_one(trainable)

    @torch.no_grad()
    def step_one(self, trainable: Trainable) -> None:
        """Update one trainable tensor, if it has a gradient."""
        if trainable.grad_param.grad is None:
            return
        decay = self.weight_decay if trainable.grad_param.ndim > 1 else 0.0
        count = self._before[trainable.name] + self._steps[trainable.name]
        master = trainable.master
        grad = trainable.grad_param.grad.to(master.device, master.dtype)
        self.rule.apply(master, grad, self.moments[trainable.name], count, self.lr * self._scale[trainable.name], decay)
        self._steps[trainable.name] += 1
        trainable.write_back(master)

    def zero_grad(self) -> None:
        """Free every gradient."""
        for trainable in self.trainables:
            trainable.grad_param.grad = None

    def counts(self) -> dict[str, Tensor]:
        """How many steps the entries of each tensor have taken, int32, shape (1,) or one per chosen row or column."""
        total = {s.name: self._before[s.name] + self._steps[s.name] for s in self.trainables}
        return {name: torch.as_tensor(count, dtype=torch.int32).flatten().cpu() for name, count in total.items()}

    def state_bytes(self) -> int:
        """Bytes held for moments; the step counts, one per row or column at most, are on the CPU in any case."""
        return sum(tensor.nbytes for moments in self.moments.values() for tensor in moments.values())


def learning_rate(step: int, *, steps: int, peak: float, schedule: Schedule, warmup_ratio: float) -> float:
    """The rate of step 0 ≤ `step` < `steps`: a linear rise over `warmup_ratio` of them, then towards zero by `schedule`."""
    warmup = round(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * {"linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2, "constant": 1.0}[schedule]


def _start(trainable: Trainable, rule: UpdateRule, known: Moments) -> Moments:
    if known:
        return {name: known[name].to(trainable.device, torch.float32, copy=True) for name in rule.idle_decay}
    like = partial(
        torch.zeros_like,
        trainable.grad_param,
        dtype=torch.float32,
        device=trainable.device,
        memory_format=torch.contiguous_format,
    )
    return {name: like() for name in rule.idle_decay}


def _count(trainable: Trainable, known: Tensor | None, dim: int | None) -> Count:
    """One number where all entries are of one age, else one per row or column, shaped to broadcast over the master."""
    if known is None:
        return 0
    if bool((known == known[0]).all()):
        return int(known[0])
    return known.view([-1 if d == dim else 1 for d in range(trainable.grad_param.ndim)])  # (rows, 1) or (1, columns)
