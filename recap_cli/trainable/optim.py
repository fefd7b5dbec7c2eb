"""SGD and AdamW over compact tensors, with moments that outlive a round (paper, eq. (5)).

`torch.optim` keeps one step count per tensor. Here the entries of one tensor may have been trained in different rounds. So each
group of entries keeps its own count `t`, the number of steps it has taken part in, and bias correction divides by `1 − β^t`
entry by entry: one that is trained for the first time in round 7 is one step old, not seven rounds.

Where all counts are equal the arithmetic is that of `torch.optim.SGD` and `torch.optim.AdamW` (`foreach=False`), to the bit.
That holds in the first round, and in all of them if everything is trainable in each.

Tensors are updated several at a time, by torch's `_foreach` functions: a GPU would wait for one call after another.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import cos, pi
from typing import Any, Literal, cast

import torch
from torch import Tensor

from recap_cli.trainable.build import Trainable

Moments = dict[str, Tensor]
Count = int | Tensor  # steps taken before the next one: one number, or one per row or column, shaped to broadcast
Counts = int | list[Tensor]  # of several tensors: one number for all, or those of each
Tensors = list[Tensor]
Apply = Callable[[Tensors, Tensors, Mapping[str, Tensors], Counts, float, float], None]
PARTS = 8  # a step makes at most one tensor as large as this part of all that is trained, or as its largest tensor
Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class UpdateRule:
    """An update rule: its moments, and one step.

    Attributes:
        name: as a recipe names it.
        idle_decay: its moments, each with the factor it decays by in a round that an entry sits out (eq. (5)).
        apply: `apply(masters, grads, moments, counts, lr, weight_decay)` updates `masters` in place. Gradients and moments have
            their shapes; all are fp32. It may write into `grads` too, and makes no more than one tensor of each shape.
    """

    name: str
    idle_decay: Mapping[str, float]
    apply: Apply


def sgd(*, momentum: float) -> UpdateRule:
    """SGD as in `torch.optim.SGD`: weight decay is added to the gradient; without momentum there are no moments."""

    def apply(
        masters: Tensors, grads: Tensors, moments: Mapping[str, Tensors], counts: Counts, lr: float, weight_decay: float
    ) -> None:
        if weight_decay:
            torch._foreach_add_(grads, masters, alpha=weight_decay)
        if momentum:
            torch._foreach_mul_(moments["momentum"], momentum)
            torch._foreach_add_(moments["momentum"], grads)
            grads = moments["momentum"]
        torch._foreach_add_(masters, grads, alpha=-lr)

    return UpdateRule("sgd", {"momentum": momentum} if momentum else {}, apply)


def adamw(*, betas: tuple[float, float], eps: float) -> UpdateRule:
    """AdamW (1711.05101) as in `torch.optim.AdamW`, with the bias correction of each entry's own count."""
    beta1, beta2 = betas

    def apply(
        masters: Tensors, grads: Tensors, moments: Mapping[str, Tensors], counts: Counts, lr: float, weight_decay: float
    ) -> None:
        means, squares = moments["exp_avg"], moments["exp_avg_sq"]
        if weight_decay:
            torch._foreach_mul_(masters, 1 - lr * weight_decay)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        denominators = list(torch._foreach_sqrt(squares))
        if isinstance(counts, int):
            torch._foreach_div_(denominators, (1 - beta2 ** (counts + 1)) ** 0.5)
            torch._foreach_add_(denominators, eps)
            torch._foreach_addcdiv_(masters, means, denominators, -lr / (1 - beta1 ** (counts + 1)))
        else:
            # m / (1 − β1^t) / (√v / √(1 − β2^t) + ε) is √(1 − β2^t) / (1 − β1^t) · m / (√v + √(1 − β2^t) · ε)
            t = torch.cat([count.flatten() for count in counts]).add(1).double()  # on the CPU: MPS knows no float64
            root = (1 - beta2**t).sqrt()
            torch._foreach_add_(denominators, _like(counts, eps * root, masters[0]))
            for mean, denominator in zip(means, denominators, strict=True):
                torch.div(mean, denominator, out=denominator)
            torch._foreach_mul_(denominators, _like(counts, lr * root / (1 - beta1**t), masters[0]))
            torch._foreach_sub_(masters, denominators)

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
        self._sizes = {s.name: s.grad_param.numel() for s in trainables}
        self._most = max(max(self._sizes.values(), default=0), sum(self._sizes.values()) // PARTS)

    def step(self) -> None:
        """Update every trainable tensor that has a gradient, those of one age together."""
        for together in self._together():
            self._update(together)

    def step_one(self, trainable: Trainable) -> None:
        """Update one trainable tensor, if it has a gradient."""
        if trainable.grad_param.grad is not None:
            self._update([trainable])

    def _together(self) -> Iterator[list[Trainable]]:
        """Tensors that one call may update: of one rate, of one age or all of several, and not too many entries in all."""
        alike: dict[Any, list[Trainable]] = {}
        for trainable in self.trainables:
            if trainable.grad_param.grad is not None:
                age = self._age(trainable) if isinstance(self._before[trainable.name], int) else None
                alike.setdefault((age, self._scale[trainable.name], self._decay(trainable)), []).append(trainable)
        for group in alike.values():
            chunk, entries = list[Trainable](), 0
            for trainable in group:
                if chunk and entries + self._sizes[trainable.name] > self._most:
                    yield chunk
                    chunk, entries = [], 0
                chunk.append(trainable)
                entries += self._sizes[trainable.name]
            yield chunk

    @torch.no_grad()
    def _update(self, together: Sequence[Trainable]) -> None:
        first, counts = together[0], [self._age(trainable) for trainable in together]
        masters = [trainable.master for trainable in together]
        grads = [cast(Tensor, trainable.grad_param.grad) for trainable in together]
        grads = [grad.to(master.device, master.dtype) for grad, master in zip(grads, masters, strict=True)]
        moments = {name: [self.moments[trainable.name][name] for trainable in together] for name in self.rule.idle_decay}
        ages = counts[0] if isinstance(counts[0], int) else cast(list[Tensor], counts)
        self.rule.apply(masters, grads, moments, ages, self.lr * self._scale[first.name], self._decay(first))
        for trainable, master in zip(together, masters, strict=True):
            self._steps[trainable.name] += 1
            trainable.write_back(master)

    def _age(self, trainable: Trainable) -> Count:
        return self._before[trainable.name] + self._steps[trainable.name]

    def _decay(self, trainable: Trainable) -> float:
        return self.weight_decay if trainable.grad_param.ndim > 1 else 0.0

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


def _like(counts: Sequence[Tensor], values: Tensor, master: Tensor) -> list[Tensor]:
    """One value for each count, in the shapes of the counts, and of the type and on the device of a master."""
    there = values.to(master.dtype).to(master.device)  # (rows and columns of all tensors,)
    parts = torch.split(there, [count.numel() for count in counts])
    return [part.view(count.shape) for part, count in zip(parts, counts, strict=True)]


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
