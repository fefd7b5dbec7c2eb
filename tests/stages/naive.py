"""The algorithm once more, written from the equations: full-model coordinates, plain loops, and nothing of `recap_cli`.

Nothing is ever cut here. A group that a plan drops has its weights set to zero in the full model, which computes the same; a
mask is one boolean for each entry of each full tensor. What a state's `layout.json` says of its axes is all that is taken over.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from math import ceil, cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from tests.stages.naive_losses import IGNORED, Batch, counted, judged

Group = tuple[str, int]  # the name of an axis, and a unit of it; of the fine ones, a hidden dimension of it


@dataclass
class Axes:
    """The axes of a full model as `layout.json` has them, and index arithmetic on them.

    `trained_whole` and `frozen_whole` are parameters that groups own entries of, and hidden dimensions do not.
    """

    axes: list[dict[str, Any]]
    shapes: dict[str, tuple[int, ...]]
    trained_whole: Sequence[str] = ()
    frozen_whole: Sequence[str] = ()

    def units(self) -> dict[str, int]:
        return {a["name"]: a["size"] for a in self.axes}

    @cached_property
    def fine(self) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
        """The axes of the mask: name → the axis of pruning, and those of its cuts that share hidden dimensions.

        By default cuts of the same width do; those of another width, and those with a word, are by themselves.
        """
        found: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
        for axis in self.axes:
            in_part = [c for c in axis["cuts"] if c["param"] not in self.trained_whole and c["param"] not in self.frozen_whole]
            usual = [c["width"] for c in in_part if c["couple"] == ""]
            for cut in in_part:
                name = axis["name"]
                if cut["couple"] != "":
                    name += "/" + cut["couple"]
                elif cut["width"] != usual[0]:
                    name += f"/{cut['width']}-wide"
                found.setdefault(name, (axis, []))[1].append(cut)
        return found

    def kind(self, name: str) -> str:
        return next(
            str(a["kind"]) for a in [*self.axes, *(dict(a, name=n) for n, (a, _) in self.fine.items())] if a["name"] == name
        )

    def stretches(self, group: Group, *, fine: bool = False) -> Iterator[tuple[str, int, int, int]]:
        """The parameter, dimension, first index and length of each stretch of entries that a group owns."""
        name, unit = group
        for cut in self.fine[name][1] if fine else next(a for a in self.axes if a["name"] == name)["cuts"]:
            width = 1 if fine else cut["width"]
            yield cut["param"], cut["dim"], cut["offset"] + unit * width, width

    def params(self, group: Group, *, fine: bool = False) -> int:
        """How many parameters a group has."""
        count = 0
        for param, dim, _, width in self.stretches(group, fine=fine):
            entries = width
            for other, size in enumerate(self.shapes[param]):
                entries *= 1 if other == dim else size
            count += entries
        return count

    def fine_of(self, group: Group) -> list[Group]:
        """The hidden dimensions of a head, or the neuron itself."""
        name, unit = group
        widths = {fine: cuts[0]["width"] for fine, (axis, cuts) in self.fine.items() if axis["name"] == name}
        return [(fine, unit * width + i) for fine, width in widths.items() for i in range(width)]


def everything(axes: Axes) -> list[Group]:
    return [(name, unit) for name, size in axes.units().items() for unit in range(size)]


def load(model: nn.Module, tensors: Mapping[str, Tensor], axes: Axes, alive: Sequence[Group]) -> None:
    """Put the full model's weights into `model`, those of groups that are not alive as zeros."""
    with torch.no_grad():
        params = dict(model.named_parameters())
        for name, tensor in (*params.items(), *((n, b) for n, b in model.named_buffers() if n in tensors)):
            tensor.copy_(tensors[name])
        for group in set(everything(axes)) - set(alive):
            for param_name, dim, start, width in axes.stretches(group):
                params[param_name].narrow(dim, start, width).zero_()


def gradients(model: nn.Module, batches: Sequence[Batch], seed_of: Callable[[int], int] | None = None) -> dict[str, Tensor]:
    """The derivative of the mean loss over all examples (or pixels) of the batches, by parameter; each batch with its seed."""
    model.zero_grad()
    found = []
    for number, batch in enumerate(batches):
        if seed_of is not None:
            torch.manual_seed(seed_of(number))
        found.append(judged(model, batch))
    losses, _, labels = zip(*found, strict=True)
    (torch.stack(losses).sum() / sum(map(counted, labels))).backward()
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def _one_by_one(batches: Sequence[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for i in range(len(batch["labels"])):
            yield {name: tensor[i : i + 1] for name, tensor in batch.items()}


ENTRY_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "taylor": lambda weight, grad: (grad * weight) ** 2,  # eq. (1)
    "fisher": lambda weight, grad: grad**2,  # eq. (4)
    "fisher-per-example": lambda weight, grad: grad**2,
    "magnitude": lambda weight, grad: weight**2,
}


def importance(
    model: nn.Module,
    axes: Axes,
    alive: Sequence[Group],
    batches: Sequence[Batch],
    criterion: str,
    *,
    fine: bool = False,
    seed_of: Callable[[int], int] | None = None,
) -> dict[Group, float]:
    """The sum over every entry of every group of its score, the model being in evaluation mode."""
    model.eval()
    samples = [[one] for one in _one_by_one(batches)] if criterion == "fisher-per-example" else [list(batches)]
    weights = {name: param.detach().double() for name, param in model.named_parameters()}
    groups = [g for group in alive for g in axes.fine_of(group)] if fine else list(alive)
    total = dict.fromkeys(groups, 0.0)
    entries = {name: torch.zeros_like(weight) for name, weight in weights.items()}  # the mean over the samples
    for sample in samples:
        grads = gradients(model, sample, seed_of) if sample else weights
        for param, grad in grads.items():
            entries[param] += ENTRY_SCORES[criterion](weights[param], grad.double()) / len(samples)
    sums: dict[tuple[str, int], list[float]] = {}  # of the entries of a parameter at each index of a dimension
    for group in groups:
        for param, dim, start, width in axes.stretches(group, fine=fine):
            if (param, dim) not in sums:
                sums[param, dim] = entries[param].movedim(dim, 0).reshape(axes.shapes[param][dim], -1).sum(1).tolist()
            total[group] += sum(sums[param, dim][start : start + width])
    return total


def ranked_together(axes: Axes, scope: str, names: list[str]) -> list[list[str]]:
    if scope == "per-layer":
        return [[name] for name in names]
    if scope == "global":
        return [names]
    kinds = {axes.kind(name) for name in names}
    return [[name for name in names if axes.kind(name) == kind] for kind in sorted(kinds)]


def best_groups(
    scores: Mapping[Group, float],
    axes: Axes,
    share: float,
    whole: Sequence[Group],
    *,
    scope: str,
    floor: float = 0.0,
    least: int = 0,
    fine: bool = False,
) -> list[Group]:
    """Of each pool the least important go, one by one, until what is left is nearest to a share of the `whole`'s parameters.

    Importance counts per parameter, which changes nothing where all groups of a pool have as many.
    """
    kept: list[Group] = []
    for pool in ranked_together(axes, scope, list(axes.fine) if fine else list(axes.units())):
        budget = share * sum(axes.params(g, fine=fine) for g in whole if g[0] in pool)
        of_each = Counter(name for name, _ in whole if name in pool)
        left = [g for g in scores if g[0] in pool]
        held, number = sum(axes.params(g, fine=fine) for g in left), Counter(name for name, _ in left)
        sizes = {g: axes.params(g, fine=fine) for g in left}
        rank = {g: scores[g] / (sizes[g] if len(set(sizes.values())) > 1 else 1) for g in left}
        for group in sorted(left, key=lambda g: rank[g]):
            params = axes.params(group, fine=fine)
            if number[group[0]] <= max(least, ceil(floor * of_each[group[0]] - 1e-9)):
                continue
            if abs(held - params - budget) > abs(held - budget) + 1e-6:
                break
            left.remove(group)
            held, number[group[0]] = held - params, number[group[0]] - 1
        kept += left
    return sorted(kept)


def trainable_entries(
    axes: Axes, tensors: Mapping[str, Tensor], alive: Sequence[Group], chosen: Sequence[Group], frozen: Sequence[str]
) -> dict[str, Tensor]:
    """Which entries of the full tensors move: what lies outside every group, and the chosen dimensions of groups alive."""
    trains = {name: torch.full(tensor.shape, name not in frozen) for name, tensor in tensors.items()}
    for group in everything(axes):
        for param, dim, start, width in axes.stretches(group):
            trains[param].narrow(dim, start, width).fill_(group in alive and param in axes.trained_whole)
    for param in axes.frozen_whole:
        trains[param].fill_(False)
    assert {axes.fine[name][0]["name"] for name, _ in chosen} <= {name for name, _ in alive}
    for group in chosen:
        for param, dim, start, width in axes.stretches(group, fine=True):
            trains[param].narrow(dim, start, width).fill_(True)
    return trains


@dataclass
class Training:
    """The settings of a training: `rule` makes torch's optimizer of parameter groups, `aging` says how its moments age."""

    rule: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    idle_decay: dict[str, float]
    weight_decay: float
    head: Sequence[str]
    clip: float | None = None


def adamw(betas: tuple[float, float], eps: float, **rest: Any) -> Training:
    idle_decay = {"exp_avg": betas[0], "exp_avg_sq": betas[1]}
    return Training(lambda groups: torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, foreach=False), idle_decay, **rest)


def sgd(momentum: float, **rest: Any) -> Training:
    return Training(lambda groups: torch.optim.SGD(groups, lr=0.0, momentum=momentum), {"momentum": momentum}, **rest)


TORCH_NAMES = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum": "momentum_buffer"}


@dataclass
class Memory:
    """The moments and the number of steps of every entry of the full model."""

    shapes: dict[str, tuple[int, ...]]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def start(self, name: str, idle_decay: Mapping[str, float]) -> None:
        if name not in self.counts:
            self.moments[name] = {moment: torch.zeros(self.shapes[name]) for moment in idle_decay}
            self.counts[name] = torch.zeros(self.shapes[name], dtype=torch.int64)


def train_mode(model: nn.Module) -> None:
    """Training mode, in which batch norms keep their statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def finetune(
    model: nn.Module,
    tensors: dict[str, Tensor],
    trains: Mapping[str, Tensor],
    memory: Memory,
    training: Training,
    batches: Sequence[Batch],
    rates: Sequence[tuple[float, float]],
) -> None:
    """Dense gradients of `model`, of which the entries that move step by an optimizer of torch's per age; then eq. (5) and (6).

    `rates` are the learning rates of each step, that of the body and that of the head. `tensors` are the full model's: they
    and `memory` are changed in place.
    """
    params = {name: param for name, param in model.named_parameters() if bool(trains[name].any())}
    flat: list[tuple[str, Tensor, nn.Parameter]] = []  # a parameter, where its entries of one age are, and these
    for name, param in params.items():
        memory.start(name, training.idle_decay)
        for age in memory.counts[name][trains[name]].unique().tolist():
            at = (trains[name] & (memory.counts[name] == age)).flatten().nonzero()[:, 0]
            flat.append((name, at, nn.Parameter(param.detach().flatten()[at])))
    decay = {name: training.weight_decay if param.ndim > 1 else 0.0 for name, param in params.items()}
    optimizer = training.rule([{"params": [values], "weight_decay": decay[name]} for name, _, values in flat])
    for name, at, values in flat:
        age = int(memory.counts[name].view(-1)[at[0]])
        optimizer.state[values] = {"step": torch.tensor(float(age))}
        optimizer.state[values] |= {TORCH_NAMES[m]: tensor.view(-1)[at] for m, tensor in memory.moments[name].items()}
    train_mode(model)
    for batch, (rate, head_rate) in zip(batches, rates, strict=True):
        grads = gradients(model, [batch])
        if training.clip is not None:
            norm = torch.sqrt(sum((grads[n].flatten()[at] ** 2).sum() for n, at, _ in flat if n in grads))
            grads = {name: grad * min(1.0, training.clip / float(norm)) for name, grad in grads.items()}
        for (name, at, values), group in zip(flat, optimizer.param_groups, strict=True):
            values.grad = grads[name].flatten()[at] if name in grads else None
            group["lr"] = head_rate if name in training.head else rate
        optimizer.step()
        with torch.no_grad():
            for name, at, values in flat:
                params[name].view(-1)[at] = values
                memory.counts[name].view(-1)[at] += name in grads
    for name, of in memory.moments.items():
        for moment, tensor in of.items():
            tensor[~trains[name]] *= training.idle_decay[moment]  # eq. (5)
    for name, at, values in flat:
        tensors[name].view(-1)[at] = values.detach()  # eq. (6)
        for moment, tensor in memory.moments[name].items():
            tensor.view(-1)[at] = optimizer.state[values][TORCH_NAMES[moment]]


def evaluate(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """The mean loss over all examples, and the share of them that is classified right; or that of pixels, and the mean IoU."""
    model.eval()
    found: list[int] = []
    wanted: list[int] = []
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            loss, scores, labels = judged(model, batch)
            total += float(loss)
            for of_one, true in zip(scores, labels, strict=True):
                found += of_one.argmax(0)[true != IGNORED].tolist()
                wanted += true[true != IGNORED].tolist()
    mean, right = total / len(wanted), sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)
    if batches[0]["labels"].ndim == 1:
        return {"loss": mean, "accuracy": right}
    pairs, true_pixels, predicted = Counter(zip(found, wanted, strict=True)), Counter(wanted), Counter(found)
    classes = true_pixels.keys() | predicted.keys()
    iou = [pairs[c, c] / (true_pixels[c] + predicted[c] - pairs[c, c]) for c in classes]
    return {"loss": mean, "pixel_accuracy": right, "miou": sum(iou) / len(iou)}


def ratios(recipe: Any) -> list[tuple[float, float, bool]]:
    """r_p and r_f of each round of `recap`, and whether it prunes anew: memory stays the same (docs/concepts.md)."""
    rounds, r_p, r_f = recipe.rounds, recipe.prune.ratio, recipe.mask.ratio
    hold_plan = min(int(rounds * recipe.prune.hold_plan + 1e-9), rounds - 1)
    anew, last, found = rounds - hold_plan, 1 - r_f, []
    for number in range(rounds):
        way = 1.0 if anew == 1 else min(1.0, number / (anew - 1))
        trains = last * (recipe.prune.ramp + (1 - recipe.prune.ramp) * way)
        entry_cost = {"adamw": 3, "sgd": 1 + (recipe.finetune.momentum > 0)}[recipe.finetune.optimizer]
        kept = (1 - r_p) * (1 + entry_cost * last) / (1 + entry_cost * trains)
        assert kept <= 1  # this reference knows no recipe that prunes nothing in its first rounds
        found.append((1 - kept, 1 - trains, number < anew))
    return found


def rates(recipe: Any, number: int, steps: int) -> list[tuple[float, float]]:
    """The learning rates, of the body and of a new head, of the `steps` of round `number`; all rounds are equally long."""
    tune = recipe.finetune
    whole, first = (recipe.rounds * steps, (number - 1) * steps) if tune.lr_schedule_span == "run" else (steps, 0)
    rise = round(tune.warmup_ratio * whole)
    head = tune.lr
    if tune.head_lr == "auto" and tune.optimizer == "adamw":
        head = max(tune.lr, min(recipe.head.lr, 10 * tune.lr))
    elif isinstance(tune.head_lr, float):
        head = tune.head_lr
    found = []
    for step in range(first, first + steps):
        if step < rise:
            share = (step + 1) / rise
        else:
            done = (step - rise) / (whole - rise)
            share = {"linear": 1 - done, "cosine": 0.5 + 0.5 * cos(pi * done), "constant": 1.0}[tune.schedule]
        found.append((tune.lr * share, head * share))
    return found


def by_axis(groups: Sequence[Group]) -> dict[str, list[int]]:
    return {name: [unit for _, unit in of] for name, of in groupby(sorted(groups), key=lambda g: g[0])}
