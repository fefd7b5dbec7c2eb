"""Time of a partial Linear against a dense one: forward, backward (also to the input) and optimizer step, at ViT-base
shapes.

Every case is timed in pairs, partial and dense in turn, within one process; a figure is the median of the pairs' ratios
of CPU seconds (`time.process_time`, so a neighbour on the machine counts little). Both sides use this project's AdamW;
the dense side is also timed with `torch.optim.AdamW(fused=True)`, the fastest that torch has.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from record import parser, ratio, table, write
from torch import Tensor, nn, optim

from recap_cli.core.surgery import IndexMap
from recap_cli.trainable.build import make_partial
from recap_cli.trainable.optim import Optimizer, adamw

TOKENS = (8, 197)
LAYERS = {"fc1": (768, 3072), "fc2": (3072, 768), "out": (768, 768)}
SHARES = (0.125, 0.5)
Step = Callable[[Tensor, Tensor], None]


def index_map_of(dim: int, size: int, share: float, scattered: bool) -> IndexMap:
    """The rows (dim 0, with their biases) or columns (dim 1) that move: side by side, or drawn at random."""
    count = int(size * share)
    index = torch.randperm(size)[:count].sort().values if scattered else torch.arange(count)
    return {"weight": {0: index}, "bias": {0: index}} if dim == 0 else {"weight": {1: index}}


def our_step(shape: tuple[int, int], index_map: IndexMap) -> Step:
    """One step of a linear layer of which the entries at `index_map` move (all, if it is empty)."""
    model = nn.Sequential(nn.Linear(*shape))
    optimizer = Optimizer(
        make_partial(model, {f"0.{name}": dims for name, dims in index_map.items()}, frozen=lambda _: False),
        adamw(betas=(0.9, 0.999), eps=1e-8),
        weight_decay=0.01,
    )
    optimizer.lr = 1e-4

    def step(x: Tensor, grad: Tensor) -> None:
        model(x).backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def torch_step(shape: tuple[int, int]) -> Step:
    """One step of a dense layer with torch's fused AdamW."""
    model = nn.Linear(*shape)
    optimizer = optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(x: Tensor, grad: Tensor) -> None:
        model(x).backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Step, x: Tensor, grad: Tensor) -> float:
    """CPU seconds of one step, all threads together."""
    x.grad = None
    started = time.process_time()
    step(x, grad)
    return time.process_time() - started


def compare(shape: tuple[int, int], index_map: IndexMap, pairs: int) -> dict[str, Any]:
    """The paired times of one case; the first round warms up and is not counted."""
    sides = {"partial": our_step(shape, index_map), "dense": our_step(shape, {}), "dense_torch_fused": torch_step(shape)}
    x = torch.randn(*TOKENS, shape[0], requires_grad=True)
    grad = torch.randn(*TOKENS, shape[1])
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_plan in range(pairs + 1):
        order = list(sides) if round_plan % 2 else list(sides)[::-1]
        for name in order:
            taken = seconds(sides[name], x, grad)
            if round_plan:
                times[name].append(taken)
    return {
        "ratio": ratio(times["partial"], times["dense"]),
        "ratio_to_torch_fused": ratio(times["partial"], times["dense_torch_fused"]),
        "cpu_seconds": times,
    }


def main() -> None:
    args_parser = parser(__doc__, "partial_speed")
    args_parser.add_argument("--pairs", type=int, default=15)
    args = args_parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    results, rows = [], []
    for layer, shape in LAYERS.items():
        for dim, which in enumerate(("rows", "columns")):
            for scattered in (False, True):
                for share in SHARES:
                    found = compare(shape, index_map_of(dim, shape[1 - dim], share, scattered), args.pairs)
                    case = {"layer": layer, "inputs": shape[0], "outputs": shape[1], "moves": which, "share": share}
                    results.append({**case, "scattered": scattered, **found})
                    ms = [f"{1e3 * median(found['cpu_seconds'][side]):.1f}" for side in ("partial", "dense")]
                    how = "scattered" if scattered else "side by side"
                    rows.append(
                        [
                            f"{layer} {shape[0]}→{shape[1]}",
                            which,
                            how,
                            f"{share:.1%}",
                            *ms,
                            found["ratio"],
                            found["ratio_to_torch_fused"],
                        ]
                    )
    print(table(["layer", "trainable", "placed", "share", "partial ms", "dense ms", "ratio", "to fused AdamW"], rows))
    write(
        args.out,
        "partial_speed",
        {"pairs": args.pairs, "tokens": TOKENS, "results": results},
        how="measured: CPU seconds, paired",
    )


if __name__ == "__main__":
    main()
