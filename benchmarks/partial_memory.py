"""Peak memory of one training step, by how the update mask is implemented: four known ways, and ours.

The toy: 12 feedforward blocks 768 → 3072 → 768 (no biases, GELU, nothing else), 197 tokens, a mean-square loss, SGD
with momentum, fp32. 12.5 % of every matrix may move. *Predicted* bytes are the tracker's (`recap_cli.memory.tracker`) over
fake tensors; *measured* ones are the same tracker's over a real step on the CPU.

The task is equal in the share of entries. Where the rows say "rows", fc1 and fc2 both train 12.5 % of their rows; where
they say "neurons", fc1 trains the rows and fc2 the columns of the same 12.5 % of the neurons, which is what RECAP's
mask selects.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from masked_layers import SHARE, CompactCopy, IndexCopy, Masked, RowsFirst, rows_of
from record import parser, table, write
from torch import Tensor, nn, optim

from recap_cli.core.axes import Axis, Cut
from recap_cli.core.surgery import indices
from recap_cli.memory.fake_step import Fakes
from recap_cli.memory.tracker import Tracker
from recap_cli.plugins.tasks.classification import TEXT_CLASSIFICATION
from recap_cli.trainable.build import Trainable, make_partial
from recap_cli.trainable.linear import PartialLinear
from recap_cli.trainable.neuron_order import bring_forward
from recap_cli.trainable.optim import Optimizer, sgd
from recap_cli.training.loop import Steps, train

BLOCKS, WIDTH, HIDDEN, TOKENS = 12, 768, 3072, 197
BAR_MB = 327
MOMENTUM, RATE = 0.9, 1e-3
MEAN_SQUARE = replace(TEXT_CLASSIFICATION, loss=lambda out, _: out.square().mean(), count=lambda _: 1)
COLUMNS = ("activations", "gradients", "optimizer", "weights")
Making = AbstractContextManager[Any]  # the mode that makes fake tensors, or nothing


def known(linear: Callable[[int, int], nn.Module]) -> Callable[[Making], nn.Module]:
    """The toy of some other layer, made where `making` has it."""

    def build(making: Making) -> nn.Module:
        with making:
            return toy(linear)

    return build


def toy(linear: Callable[[int, int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(linear(WIDTH, HIDDEN), nn.GELU(), linear(HIDDEN, WIDTH)) for _ in range(BLOCKS)])


def dense(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def torch_sgd(model: nn.Module, x: Tensor) -> tuple[optim.Optimizer, Callable[[], None]]:
    """torch's optimizer, and one step of it with whatever the layers of `model` want besides."""
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.SGD(moving, lr=RATE, momentum=MOMENTUM, foreach=False)

    def step() -> None:
        model(x).square().mean().backward()
        for module in model.modules():
            if isinstance(module, Masked) and module.weight.grad is not None:
                module.weight.grad.mul_(module.mask)
        optimizer.step()
        for module in model.modules():
            if isinstance(module, CompactCopy):
                module.write_back()
        optimizer.zero_grad()

    return optimizer, step


def ours(making: Making, *, neurons: bool) -> nn.Module:
    """The toy as `finetune` makes it: the chosen neurons stand first and are views. Without `neurons`, the first rows move."""
    with making:
        model = toy(dense)
    if not neurons:
        index_map = {name: {0: torch.arange(param.shape[0] // SHARE)} for name, param in model.named_parameters()}
    else:
        axes = [Axis(f"{i}", "neurons", i, HIDDEN, (Cut(f"{i}.0.weight", 0), Cut(f"{i}.2.weight", 1))) for i in range(BLOCKS)]
        mask = {axis.name: torch.zeros(HIDDEN, dtype=torch.bool).index_fill(0, rows_of(HIDDEN), True) for axis in axes}
        shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        index_map = bring_forward(model, axes, mask, indices(axes, mask, shapes))
    make_partial(model, index_map, frozen=lambda _: False)
    return model


def our_sgd(*, fused: bool) -> Callable[[nn.Module, Tensor], tuple[list[Tensor], Callable[[], None]]]:
    """RECAP's optimizer and training loop."""

    def build(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Callable[[], None]]:
        layers = {path: m for path, m in model.named_modules() if isinstance(m, PartialLinear)}
        trainables = [Trainable(path, m.part, m.part.detach()) for path, m in layers.items() if m.part is not None]
        optimizer = Optimizer(trainables, sgd(momentum=MOMENTUM))
        batch = {"x": x, "labels": x}

        def step() -> None:
            train(
                lambda inputs: model(inputs["x"]),
                MEAN_SQUARE,
                optimizer,
                [batch],
                steps=Steps(rate=lambda _: RATE, fused_backward=fused),
            )

        return [moment for moments in optimizer.moments.values() for moment in moments.values()], step

    return build


WAYS: dict[str, tuple[str, Callable[[Making], nn.Module], Callable[[nn.Module, Tensor], tuple[Any, Callable[[], None]]]]] = {
    "dense gradients × mask (the authors)": ("rows", known(Masked), torch_sgd),
    "weight.index_copy (PEFT's trainable tokens)": ("rows", known(IndexCopy), torch_sgd),
    "autograd.Function, compact copy": ("rows", known(CompactCopy), torch_sgd),
    "rows first, two products + cat": ("rows", known(RowsFirst), torch_sgd),
    "ours, rows in both": ("rows", lambda making: ours(making, neurons=False), our_sgd(fused=False)),
    "ours": ("neurons", lambda making: ours(making, neurons=True), our_sgd(fused=False)),
    "ours, fused backward": ("neurons", lambda making: ours(making, neurons=True), our_sgd(fused=True)),
}


def measure(name: str, *, real: bool) -> dict[str, Any]:
    """Bytes of one steady step of an implementation; over fake tensors unless `real`."""
    _, build, optimize = WAYS[name]
    fakes = Fakes()
    model = build(nullcontext() if real else fakes.mode)
    with nullcontext() if real else fakes.pretending("cpu"):
        x = torch.randn(TOKENS, WIDTH)
        optimizer, step = optimize(model, x)
        step()  # makes the moments
        tracker = Tracker(model)
        states = optimizer
        if isinstance(optimizer, optim.Optimizer):
            states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        tracker.know([*model.named_parameters(), *model.named_buffers()], "weights")
        tracker.know([("", state) for state in states], "optimizer")
        tracker.know({"x": x}, "other")
        with tracker.watch([(n, p) for n, p in model.named_parameters() if p.requires_grad]):
            step()
    found = tracker.usage()
    named = {kind: found.maxima[kind] for kind in COLUMNS}
    return {**named, "sum_of_maxima": sum(named.values()), "peak": found.peak_bytes, "at_the_peak": found.at_peak}


def main() -> None:
    args = parser(__doc__, "partial_memory").parse_args()
    columns = (*COLUMNS, "sum_of_maxima", "peak")
    rows, results = [], []
    for name, (trains, _, _) in WAYS.items():
        predicted, measured = measure(name, real=False), measure(name, real=True)
        results.append({"way": name, "trains": trains, "predicted_bytes": predicted, "measured_bytes": measured})
        rows.append([name, trains, *[f"{predicted[c] / 1e6:.1f}" for c in columns], f"{measured['peak'] / 1e6:.1f}"])
    print(table(["predicted MB (10⁶)", "trains", *[c.replace("_", " ") for c in columns], "peak, real step"], rows))
    write(
        args.out,
        "partial_memory",
        {"bar_mb": BAR_MB, "results": results},
        how="predicted: the tracker over fake tensors; measured: the tracker over a real CPU step",
    )


if __name__ == "__main__":
    main()
