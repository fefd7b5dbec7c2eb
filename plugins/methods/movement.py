"""Movement pruning (Sanh et al. 2020, 2005.07683) of whole heads and neurons: their scores are learned while finetuning.

Each group has a score S. The forward keeps the groups of the highest scores, by a cubic schedule. The backward ignores the
selection (straight-through), so that ∂L/∂S is the sum over the group of ∂L/∂w · w. A score rises if weights move away from
zero. The gates are at the input of a group's output matrix (in attention the output projection, in feedforward the second
matrix). There, closing a gate is the same as cutting the group.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recap_cli.api import (
    Axis,
    Cut,
    Method,
    RoundPlan,
    Settings,
    TrainContext,
    TrainerHook,
    is_linear,
    is_transposed,
    names_of,
    owner_of,
)

SCORES = "movement_scores"


def round_plans(settings: Settings) -> list[RoundPlan]:
    """Return two rounds: the first learns the scores, on gated groups; the second prunes and finetunes."""
    last = _share("cooldown_share", settings.options["cooldown_share"])
    _share("warmup_share", settings.options["warmup_share"]), _rate(settings.options["scores_lr"])
    return [
        RoundPlan(trains="training", share=1 - last, lr_window=(0.0, 1 - last), embeddings=True, product=False),
        RoundPlan(settings.prune_ratio, plan="learned", share=last, lr_window=(1 - last, 1.0), embeddings=True),
    ]


def attach(context: TrainContext) -> TrainerHook:
    """Add a score and a gate to every group, at the input of its output matrix."""
    warmup = _share("warmup_share", context.options["warmup_share"])
    rate = _rate(context.options["scores_lr"])
    gates = {axis.name: _Gates(context.model, axis) for axis in context.axes}
    target = context.round_plans[-1].prune_ratio

    def before_step(step: int, steps: int, value: Callable[[str], Tensor]) -> None:
        scores = {name: value(gate.name).cpu() for name, gate in gates.items()}
        for name, kept in context.choose(scores, keep_share(step + 1, steps, ratio=target, warmup=warmup)).items():
            gates[name].keep(kept)

    def result(values: Mapping[str, Tensor], _: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        trained = {name: value for name, value in values.items() if not name.endswith(SCORES)}
        return trained, {name: values[gate.name] for name, gate in gates.items()}

    return TrainerHook(
        trains=lambda _: True,
        rate=lambda name: rate / context.lr if name.endswith(SCORES) else 1.0,
        before_step=before_step,
        result=result,
    )


def keep_share(step: int, steps: int, *, ratio: float, warmup: float) -> float:
    """Return the share of the prunable parameters to keep after a step: 1 in the warm-up, then cubic to 1 − `ratio`."""
    start = round(steps * warmup)
    if step <= start:
        return 1.0
    left = 1 - (step - start) / (steps - start)
    return 1 - ratio * (1 - left**3)


class _Gates:
    """The gates of one axis: a score for each group, as one parameter of all of its output layers."""

    def __init__(self, model: nn.Module, axis: Axis) -> None:
        self.outputs = _output_layers(model, axis)
        scores = nn.Parameter(torch.zeros(axis.size))
        for layer, cut in self.outputs:
            layer.register_parameter(SCORES, scores)
            size = layer.get_parameter("weight").shape[cut.dim]
            layer.register_buffer("movement_gate", torch.ones(size), persistent=False)
            layer.register_forward_pre_hook(partial(_close, cut))
        self.name = next(name for name, param in model.named_parameters() if param is scores)

    def keep(self, kept: Tensor) -> None:
        """Open the gates of the kept groups, (axis.size,) bool, and close all others."""
        for layer, cut in self.outputs:
            gate = layer.get_buffer("movement_gate")
            wide = kept.repeat_interleave(cut.width).to(gate)
            gate[cut.offset : cut.offset + len(wide)] = wide


def _close(cut: Cut, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = inputs
    gate = layer.get_buffer("movement_gate").to(x.dtype)  # buffers are fp32 for every type of weights
    gated: Tensor = _StraightThrough.apply(x, layer.get_parameter(SCORES), gate, cut)
    return (gated, *others)


class _StraightThrough(torch.autograd.Function):
    """x · gate, with the gradient of the scores as if they were the gates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor, gate: Tensor, cut: Cut) -> Tensor:  # x, result: (…, features)
        ctx.save_for_backward(x, gate)
        ctx.cut, ctx.size = cut, len(scores)
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate = ctx.saved_tensors
        cut, size = ctx.cut, ctx.size
        along = (grad * x).flatten(0, -2).sum(0).narrow(0, cut.offset, size * cut.width)  # (size · width,)
        return grad * gate, along.view(size, cut.width).sum(1), None, None


def _output_layers(model: nn.Module, axis: Axis) -> list[tuple[nn.Module, Cut]]:
    """Return the layers whose input features an axis cuts, each with that cut: one, or one in each layer that it spans."""
    found = []
    for cut in axis.cuts:
        layer, attribute = owner_of(model, cut.param)
        if attribute == "weight" and is_linear(layer) and cut.dim == (0 if is_transposed(layer) else 1):
            if len(called := names_of(model)[cut.param]) > 1:
                raise ValueError(
                    f"{' and '.join(called)} are one parameter, and movement pruning would gate only one use of it"
                )
            found.append((layer, cut))
    if not found:
        raise ValueError(
            f"{axis.name} ({axis.kind}) cuts the input of no linear layer, so movement pruning has no place for its gates"
        )
    return found


def _share(name: str, value: Any) -> float:
    if not isinstance(value, float) or not 0 < value < 1:
        raise ValueError(f"options.{name}: expected a number between 0 and 1; found {value!r}")
    return value


def _rate(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"options.scores_lr: expected a number above 0; found {value!r}")
    return value


MOVEMENT = Method(
    "Movement pruning: the groups to keep are learned while finetuning, along a cubic schedule.",
    round_plans,
    prunes=True,
    training=attach,
    options={"warmup_share": 0.1, "cooldown_share": 0.3, "scores_lr": 0.01},
)
