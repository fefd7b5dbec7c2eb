"""Peak memory of one training step, by how the update mask is implemented: four known ways, and ours.

The toy: 12 feedforward blocks 768 → 3072 → 768 (no biases, GELU, nothing else), 197 tokens, a mean-square loss, SGD
with momentum, fp32. 12.5 % of every matrix may move. *Predicted* bytes are torch's memory tracker over fake tensors;
*measured* ones are the same tracker over a real step on the CPU.

The task is equal in the share of entries. Where the rows say "rows", fc1 and fc2 both train 12.5 % of their rows; where
they say "neurons", fc1 trains the rows and fc2 the columns of the same 12.5 % of the neurons, which is what RECAP's
mask selects.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from masked_layers import SHARE, CompactCopy, IndexCopy, Masked, RowsFirst, rows_of
from record import parser, table, write
from torch import Tensor, nn, optim
from tracker import fake, make_fake, step_bytes

from recap_cli.core.groups import Axis, Cut
from recap_cli.core.optim import Optimizer, sgd
from recap_cli.core.partial import PartialLinear, Slot, bring_forward, make_partial
from recap_cli.core.surgery import indices

BLOCKS, WIDTH, HIDDEN, TOKENS = 12, 768, 3072, 197
BAR_MB = 327
MOMENTUM, RATE = 0.9, 1e-3


def toy(linear: Callable[[int, int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(linear(WIDTH, HIDDEN), nn.GELU(), linear(HIDDEN, WIDTH)) for _ in range(BLOCKS)])


def dense(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def torch_sgd(model: nn.Module) -> tuple[optim.Optimizer, Callable[[], None]]:
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.SGD(moving, lr=RATE, momentum=MOMENTUM, foreach=False)

    def finish() -> None:
        for module in model.modules():
            if isinstance(module, Masked) and module.weight.grad is not None:
                module.weight.grad.mul_(module.mask)
        optimizer.step()
        for module in model.modules():
            if isinstance(module, CompactCopy):
                module.write_back()
        optimizer.zero_grad()

    return optimizer, finish


def ours(*, neurons: bool) -> nn.Module:
    """The toy as `finetune` makes it: the chosen neurons stand first and are views. Without `neurons`, the first rows move."""
    model = toy(dense)
    if not neurons:
        where = {name: {0: torch.arange(param.shape[0] // SHARE)} for name, param in model.named_parameters()}
    else:
        axes = [Axis(f"{i}", "neurons", i, HIDDEN, (Cut(f"{i}.0.weight", 0), Cut(f"{i}.2.weight", 1))) for i in range(BLOCKS)]
        mask = {axis.name: torch.zeros(HIDDEN, dtype=torch.bool).index_fill(0, rows_of(HIDDEN), True) for axis in axes}
        shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        where = bring_forward(model, axes, mask, indices(axes, mask, shapes))
    make_partial(model, where, frozen=lambda _: False)
    return model


def our_sgd(*, fused: bool) -> Callable[[nn.Module], tuple[list[Tensor], Callable[[], None]]]:
    def build(model: nn.Module) -> tuple[list[Tensor], Callable[[], None]]:
        layers = {path: m for path, m in model.named_modules() if isinstance(m, PartialLinear)}
        # The slots again, for the layers' tensors may have been swapped for fake ones since they were made.
        slots = [Slot(path, m.part, m.part.detach(), m.weight, {}) for path, m in layers.items()]
        optimizer = Optimizer(slots, sgd(momentum=MOMENTUM))
        optimizer.lr = RATE

        def now(slot: Slot) -> Callable[[Tensor], None]:
            def step(_: Tensor) -> None:
                optimizer.step_slot(slot)
                slot.leaf.grad = None

            return step

        if fused:
            for slot in slots:
                slot.leaf.register_post_accumulate_grad_hook(now(slot))

        def finish() -> None:
            optimizer.step()
            optimizer.zero_grad()

        return [moment for moments in optimizer.moments.values() for moment in moments.values()], finish

    return build


WAYS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[nn.Module], tuple[Any, Callable[[], None]]]]] = {
    "dense gradients × mask (the authors)": ("rows", lambda: toy(Masked), torch_sgd),
    "weight.index_copy (PEFT's trainable tokens)": ("rows", lambda: toy(IndexCopy), torch_sgd),
    "autograd.Function, compact copy": ("rows", lambda: toy(CompactCopy), torch_sgd),
    "rows first, two products + cat": ("rows", lambda: toy(RowsFirst), torch_sgd),
    "ours, rows in both": ("rows", lambda: ours(neurons=False), our_sgd(fused=False)),
    "ours": ("neurons", lambda: ours(neurons=True), our_sgd(fused=False)),
    "ours, fused backward": ("neurons", lambda: ours(neurons=True), our_sgd(fused=True)),
}


def measure(name: str, *, real: bool) -> dict[str, Any]:
    """Bytes of one step of an implementation; over fake tensors unless `real`."""
    _, build, optimize = WAYS[name]
    model, mode = build(), fake()
    if not real:
        make_fake(mode, model)
    with nullcontext() if real else mode:
        optimizer, finish = optimize(model)
        x = torch.randn(TOKENS, WIDTH)

        def step() -> None:
            model(x).square().mean().backward()
            finish()

        return step_bytes(model, x, optimizer, step)


def main() -> None:
    args = parser(__doc__, "partial_memory").parse_args()
    # `Slot.write_back` asks whether two tensors share memory, which fake ones answer with a warning.
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    columns = ("activations", "gradients", "optimizer", "weights", "sum_of_maxima", "peak")
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
