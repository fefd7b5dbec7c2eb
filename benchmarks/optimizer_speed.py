"""Host time of an optimizer step over many small tensors, against torch's own: what a GPU would wait for.

    python benchmarks/optimizer_speed.py

200 matrices of 64 × 64 on the CPU, AdamW, one thread: calls count there, and not arithmetic. *Mixed ages* is every round after
the first, where the rows of a tensor have taken part in different numbers of steps. The sides take turns, and a ratio is the
median of the pairs' ratios, of CPU seconds.
"""

import time
from collections.abc import Callable

import torch
from record import parser, ratio, table, write
from torch import nn

from recap_cli.trainable.build import Trainable
from recap_cli.trainable.optim import CarriedState, Optimizer, adamw

TENSORS, SIDE, STEPS, PAIRS = 200, 64, 20, 15


def ours(*, mixed: bool) -> Callable[[], None]:
    """A step of ours."""
    params = [nn.Parameter(torch.randn(SIDE, SIDE)) for _ in range(TENSORS)]
    trainables = [Trainable(f"w{n}", param, param.detach()) for n, param in enumerate(params)]
    counts = {f"w{n}": torch.arange(SIDE, dtype=torch.int32) for n in range(TENSORS)} if mixed else {}
    carried = CarriedState(counts=counts, along=dict.fromkeys(counts, 0))
    optimizer = Optimizer(trainables, adamw(betas=(0.9, 0.999), eps=1e-8), weight_decay=0.01, carried=carried)
    optimizer.lr = 1e-4
    for param in params:
        param.grad = torch.randn(SIDE, SIDE)
    return optimizer.step


def torchs(how: str) -> Callable[[], None]:
    """A step of `torch.optim.AdamW`: `foreach`, `fused` or `single`, one tensor after another."""
    params = [nn.Parameter(torch.randn(SIDE, SIDE)) for _ in range(TENSORS)]
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.01, foreach=how == "foreach", fused=how == "fused")
    for param in params:
        param.grad = torch.randn(SIDE, SIDE)
    return lambda: optimizer.step() and None


def seconds(step: Callable[[], None]) -> float:
    """CPU seconds of one step, the mean of some."""
    started = time.process_time()
    for _ in range(STEPS):
        step()
    return (time.process_time() - started) / STEPS


def main() -> None:
    args = parser(__doc__, "optimizer_speed").parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sides = {"ours": ours(mixed=False), "ours, mixed ages": ours(mixed=True)}
    sides |= {f"torch, {how}": torchs(how) for how in ("single", "foreach", "fused")}
    for step in sides.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(PAIRS):
        for name, step in sides.items():
            found[name].append(seconds(step))
    rows = [
        [name, f"{1e3 * sorted(values)[PAIRS // 2]:.2f}", f"{ratio(values, found['torch, foreach']):.2f}"]
        for name, values in found.items()
    ]
    print(table(["optimizer", "ms", "of torch, foreach"], rows))
    write(args.out, "optimizer_speed", {"tensors": TENSORS, "side": SIDE, "cpu_seconds": found}, how="measured")


if __name__ == "__main__":
    main()
