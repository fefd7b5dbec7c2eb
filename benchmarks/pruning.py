"""Pruning ViT-base at r_p = 33 % (importance and surgery), against Torch-Pruning's Taylor pruning.

Both sides prune whole heads and FFN neurons of the same random model, ranked over all layers within each kind, from the same
batches. Every run is a process of its own, in turn; CPU seconds and peak memory are counted from when the model is built. The
surgery alone cuts the same groups out of copies of one model; ours includes the walk that finds the axes.
"""

import argparse
import copy
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from record import cpu_seconds, forget_peak, parser, ratio, status_bytes, write
from torch import Tensor, nn

from recap_cli.core import gradual
from recap_cli.core.adapter import find_axes, resize
from recap_cli.core.axes import counts, shapes_of
from recap_cli.core.importance import group_scores
from recap_cli.core.ranking import Limits
from recap_cli.core.surgery import cut_model, indices
from recap_cli.plugins.adapters.vit import VIT
from recap_cli.plugins.criteria.taylor import TAYLOR

RATIO, HEADS = 1 / 3, 12
Batches = list[tuple[Tensor, Tensor]]


def torch_pruning() -> Any:
    """Torch-Pruning, which only this benchmark needs."""
    try:
        return import_module("torch_pruning")
    except ImportError as error:
        raise SystemExit("this benchmark compares with Torch-Pruning: pip install torch-pruning") from error


def model_and_batches(batches: int, images: int) -> tuple[nn.Module, Batches]:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = ViTForImageClassification(ViTConfig(num_labels=100)).eval()
    return model, [(torch.randn(images, 3, 224, 224), torch.randint(100, (images,))) for _ in range(batches)]


def ours(model: Any, batches: Batches, *, steps: int, scope: Any) -> None:
    """`recap prune`, without the files."""

    def losses(each: bool) -> Iterator[tuple[Tensor, float]]:
        for images, labels in batches:
            yield F.cross_entropy(model(images).logits, labels), 1 / len(batches)

    gradual.prune(
        model,
        find_axes(VIT, model),
        gradual.Step(
            score=lambda small, axes, _: group_scores(small, axes, TAYLOR, losses),
            resize=lambda small, sizes: resize(VIT, small, sizes),
        ),
        keep_shares=gradual.shares_left(RATIO, steps),
        limits=Limits(scope=scope, floor=0.15),
    )


def theirs(model: Any, batches: Batches, *, steps: int, scope: str) -> None:
    """Torch-Pruning as its examples use it for a ViT: the neurons of all layers in one scope, the heads in another."""
    layers = list(model.vit.layers)
    pruner = torch_pruning().pruner.BasePruner(
        model,
        batches[0][0][:1],
        importance=torch_pruning().importance.GroupTaylorImportance(),
        global_pruning=scope == "per-kind",
        pruning_ratio=RATIO,
        pruning_ratio_dict={tuple(layer.mlp.fc1 for layer in layers): RATIO},
        head_pruning_ratio=RATIO,
        iterative_steps=steps,
        num_heads={p: HEADS for b in layers for p in (b.attention.q_proj, b.attention.k_proj, b.attention.v_proj)},
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[model.classifier, model.vit.embeddings, *(m for b in layers for m in (b.attention.o_proj, b.mlp.fc2))],
        output_transform=lambda out: out.logits.sum(),
    )
    for _ in range(steps):
        model.zero_grad()
        for images, labels in batches:
            (F.cross_entropy(model(images).logits, labels) / len(batches)).backward()
        pruner.step()
    model.zero_grad()


SIDES: dict[str, Callable[..., None]] = {"ours": ours, "theirs": theirs}


def one_run(side: str, steps: int, scope: str, batches: int, images: int) -> dict[str, Any]:
    """Prune once, in this process: seconds, bytes and the sizes that are left."""
    if side == "theirs":
        torch_pruning()
    model, data = model_and_batches(batches, images)
    gc.collect()
    forget_peak()
    before_bytes, before_seconds = status_bytes("VmRSS"), cpu_seconds()
    SIDES[side](model, data, steps=steps, scope=scope)
    found = {"cpu_seconds": cpu_seconds() - before_seconds, "peak_bytes": status_bytes("VmHWM") - before_bytes}
    model(data[0][0][:1])  # what was cut must still run
    return {**found, **sizes_of(model), "params": sum(p.numel() for p in model.parameters())}


def sizes_of(model: Any) -> dict[str, list[int]]:
    layers = list(model.vit.layers)
    heads = [layer.attention.q_proj.out_features // (768 // HEADS) for layer in layers]
    return {"heads": heads, "neurons": [layer.mlp.fc1.out_features for layer in layers]}


def surgery(pairs: int) -> dict[str, Any]:
    """The surgery alone, on copies of one model, for one plan that drops the same units in each layer."""
    tp = torch_pruning()
    model, ((images, _),) = model_and_batches(1, 1)
    plan = {axis.name: torch.arange(axis.size) % 3 != 1 for axis in find_axes(VIT, model)}
    times: dict[str, list[float]] = {"ours": [], "theirs": [], "theirs_without_graph": []}
    for round_plan in range(pairs + 1):
        cut, pruned = copy.deepcopy(model), copy.deepcopy(model)
        start = cpu_seconds()
        cut_model(cut, indices(find_axes(VIT, cut), plan, shapes_of(cut.named_parameters())))
        resize(VIT, cut, counts(plan))
        ours_end = cpu_seconds()
        graph = tp.DependencyGraph().build_dependency(pruned, images, output_transform=lambda out: out.logits.sum())
        built = cpu_seconds()
        for path, keep in plan.items():
            block = pruned.get_submodule(path.rpartition(".")[0])
            is_heads = path.endswith("heads")
            width, down = (768 // HEADS, block.attention.o_proj) if is_heads else (1, block.mlp.fc2)
            gone = (~keep).repeat_interleave(width).nonzero().flatten().tolist()
            graph.get_pruning_group(down, tp.prune_linear_in_channels, gone).prune()
        end = cpu_seconds()
        if round_plan:  # the first warms up
            for name, taken in zip(times, (ours_end - start, end - ours_end, end - built), strict=True):
                times[name].append(taken)
    with torch.no_grad():
        difference = float((cut(images).logits - pruned(images).logits).abs().max())
    return {
        "speedup": ratio(times["theirs"], times["ours"]),
        "speedup_without_graph": ratio(times["theirs_without_graph"], times["ours"]),
        "largest_difference_of_logits": difference,
        "cpu_seconds": times,
    }


def in_a_process(*args: object) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(args)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])  # type: ignore[no-any-return]


def compare(steps: int, pairs: int) -> dict[str, Any]:
    """Runs of both sides, in turn."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for round_plan in range(pairs):
        for side in list(runs)[:: 1 if round_plan % 2 else -1]:
            runs[side].append(in_a_process(side, steps, "per-kind", 2, 4))
    sides = {key: [[run[key] for run in runs[side]] for side in runs] for key in ("cpu_seconds", "peak_bytes")}
    ratios = {f"{key}_ratio": ratio(*both) for key, both in sides.items()}
    print(f"{steps}-step pruning, ours and theirs: { {key: [*map(median, both)] for key, both in sides.items()} }; {ratios}")
    return {"steps": steps, **ratios, "runs": runs}


def main() -> None:
    args_parser = parser(__doc__, "pruning")
    args_parser.add_argument("--pairs", type=int, default=3)
    args_parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = args_parser.parse_args()
    if args.child:
        print(json.dumps(surgery(args.child[1]) if args.child[0] == "surgery" else one_run(*args.child)))
        return
    torch_pruning()
    whole = [compare(steps, args.pairs) for steps in (1, 4)]
    alone = in_a_process("surgery", 7)
    print("surgery alone, CPU ms:", {name: round(1e3 * median(taken), 1) for name, taken in alone["cpu_seconds"].items()})
    gradual_sizes = [
        {"side": side, "steps": 4, "ranking": scope, **in_a_process(side, 4, scope, 1, 1)}
        for side in SIDES
        for scope in ("per-layer", "per-kind")
    ]
    for left in gradual_sizes:
        print(f"33 % in 4 steps, {left['side']}, {left['ranking']}: {left['heads']} heads, {sum(left['neurons'])} neurons")
    figures = {"pairs": args.pairs, "pruning": whole, "surgery": alone, "gradual_sizes": gradual_sizes}
    write(args.out, "pruning", figures, how="measured: CPU seconds and resident bytes, one process a run, in turn")


if __name__ == "__main__":
    main()
