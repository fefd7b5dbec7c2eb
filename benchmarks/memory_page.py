"""Write pages/memory.md and its pictures from the figures in results: `python benchmarks/memory_page.py`."""

import json
from pathlib import Path
from typing import Any

from memory import CASES, SETTINGS
from record import RESULTS, table
from tables import ran_on

from recap_cli.memory import plots, predict
from recap_cli.memory.picture import save
from recap_cli.recipe import recipe as recipes

PAGES = Path(__file__).parent / "pages"
Result = dict[str, Any]
METHODS = ("full", "head", "lora", "pre-ft", "recap")  # of the picture
NAMES = {
    "fp32": "fp32, like for like",
    "best": "bf16, fused backward, checkpoints",
    "int8": "and frozen matrices in int8",
    "best, offloaded": "bf16, fused, checkpoints, offloaded",
    "int8, offloaded": "int8, fused, checkpoints, offloaded",
}
HEAD = """# Memory

What finetuning holds on its device, predicted, beside the paper's figures and beside other methods. Written by
`python benchmarks/memory_page.py` from the JSON files in `benchmarks/results`. MB are 10⁶ bytes.

- *Predicted*: one training step of the real model on tensors that have shapes and no memory, with the kernels that CUDA
  would choose (`recap profile-memory RECIPE`). *Computed*: arithmetic on such a figure. *Measured*: on this machine's CPU.
  Nothing here ran on a GPU.
- *Peak*: the most that is held at one instant. *Sum of maxima*: each kind's own maximum, added up, which is how the
  paper counts.
- A GPU adds what no tensor of the model is: cuBLAS's workspaces (8 to 32 MiB on each of two threads, inside the
  allocator), fragmentation and the allocator's rounding (`max_reserved`), and the CUDA context (some 100 MB, outside of
  it: NVML's figure for the process).
- Peaks are those of a training step. Scoring has its own, which `evaluate.batch_size` decides.
- Weights are random; memory does not depend on their values. Every layer is taken to lose, and to move, the same share.

"""


def mb(count: float, digits: int = 1) -> str:
    return f"{count / 1e6:,.{digits}f}"


def paper(found: Result, drawn: list[Result]) -> str:
    """Half of the paper. `drawn` are the rows of the picture."""
    rows = []
    for row in found["paper"]:
        if row["method"] != "recap":
            continue
        bar = found["bars_mb"][row["model"]].get(row["settings"])
        full = CASES[row["model"]].paper["full"]
        peak = mb(row["training_peak_bytes"])
        rows.append(
            [row["model"], NAMES[row["settings"]], full, row["paper_mb"], peak, mb(row["sum_of_maxima_bytes"]), bar or "-"]
        )
    methods = [
        [row["model"], row["method"], row["paper_mb"] or "-", mb(row["training_peak_bytes"]), mb(row["sum_of_maxima_bytes"])]
        for row in found["paper"]
        if row["settings"] == "fp32"
    ]
    ratios = "r_p = 33.3 %, r_f = 87.5 % for ViT at 224 px; r_p = r_f = 50 % for BERT at 128 tokens"
    ours = next(row for row in drawn if row["method"] == "recap")
    round_of_most = f"r_p = {100 * ours['prune_ratio']:.1f} % and r_f = {100 * ours['mask_ratio']:.1f} %"
    return f"""## Beside the paper

Batch size 1, SGD with momentum, {ratios}. The bar is what this project set itself.

The tables are of a round of these ratios. By the ramp (`prune.ramp`), which came later, the first rounds prune less and freeze
more. The picture is newer, and of the round that holds most: for ViT-base in fp32 one of {round_of_most}.

{table(["model", "RECAP with", "paper: full", "paper: RECAP", "peak", "sum of maxima", "bar"], rows)}

The sum of maxima of ViT-huge in fp32 is above the bar, its peak below it: activations are at their maximum when there are no
gradients yet. With the last two settings the optimizer's steps are taken in main memory, which the paper has no column for.

The same for every method, in fp32 without any of these settings (the paper's figures are sums of components, with the attention
of its time):

{table(["model", "method", "paper", "peak", "sum of maxima"], methods)}

![ViT-base by method and kind](memory-methods.svg)
"""


def rivals(found: Result) -> str:
    """Beside other methods."""
    parts = []
    for name in ("ViT-base", "BERT-base"):
        rows: dict[tuple[str, str], dict[int, Result]] = {}
        for row in found["rivals"]:
            if row["model"] == name:
                rows.setdefault((row["form"], row["method"]), {})[row["batch"]] = row
        cells = [
            [
                form,
                method,
                *(mb(by[b]["peak_bytes"], 0) for b in (1, 8, 32)),
                mb(by[1]["peak_with_8_bit_moments_bytes"], 0) if "peak_with_8_bit_moments_bytes" in by[1] else "-",
            ]
            for (form, method), by in rows.items()
        ]
        header = ["weights and activations", "method", "batch 1", "batch 8", "batch 32", "batch 1, 8-bit moments (computed)"]
        parts.append(f"### {name}\n\n{table(header, cells)}\n")
    return """## Beside other methods, with AdamW

Peaks in MB, predicted. Rows of one block have the same types, attention and checkpoints. Full finetuning is lean:
gradients are freed between steps, no `foreach`, fused attention. In bf16 it has two rows: with fp32 masters as RECAP has
them, and without any, all in bf16, which costs accuracy. LoRA is peft's, r = 8 on query and value, its own weights with
fp32 masters. torchao's CPU offload (`CPUOffloadOptimizer(offload_gradients=True)`) needs CUDA to run; its row is a lower
bound: weights, activations and one gradient, in the type of the weights, without masters on the device. "Fused" is
`finetune.fused_backward`, "offloaded" `finetune.offload`. The last column puts two moments of 8 bit, with a scale for
each 256, in the place of the fp32 ones; no library here provides them for partial updates.

At batch 1 and in bf16, LoRA and torchao's bound are below RECAP that keeps its masters and moments on the device: with
r_f = 50 % these are most of what it holds. Offloaded, as torchao's are, RECAP is below both at every batch size.

""" + "\n".join(parts)


def ablation(found: Result, speed: Result | None) -> str:
    """Each saving on and off."""
    rows = []
    for model in ("ViT-base", "BERT-base"):
        mine = [row for row in found["ablation"] if row["model"] == model]
        for row in mine:
            gone = 1 - row["on_bytes"] / row["off_bytes"]
            rows.append(
                [
                    model,
                    row["batch"],
                    row["saving"],
                    row["over"],
                    mb(row["off_bytes"]),
                    mb(row["on_bytes"]),
                    f"{-gone:+.1%}",
                    row["how"],
                ]
            )
    text = f"""## What each saving is worth

SGD with momentum, RECAP; without the saving and with it.

{table(["model", "batch", "saving", "over", "off", "on", "change", "how"], rows)}

At batch 1 a fused backward alone changes little, because the peak is at the end of the forward; it counts once
checkpoints have taken the activations away.
"""
    if speed is not None:
        timed = [[r["model"], r["batch"], r["saving"], f"{r['ratio']:.2f}"] for r in speed["results"]]
        text += f"""
What they cost in time, *measured* on the CPU: a step with the saving over a step without it, AdamW, fp32 otherwise. A
CPU says little about a GPU: bf16 is emulated in part here, and offloading has nowhere to go.

{table(["model", "batch", "saving", "time, with ÷ without"], timed)}
"""
    return text


def importance(found: Result) -> str:
    """The importance stages."""
    rows = [
        [
            r["model"],
            r["batch"],
            NAMES[r["settings"]],
            mb(r["importance_bytes"]),
            mb(r["finetuning_bytes"]),
            mb(r["full_model_bytes"], 0),
        ]
        for r in found["importance"]
    ]
    over = [r for r in found["importance"] if r["importance_bytes"] > r["finetuning_bytes"]]
    told = f"in {len(rows) - len(over)} of {len(rows)} cases" if over else "in every case"
    return f"""## The pruning and mask stages

With `importance.device` on an accelerator the full model stays in main memory and its blocks travel one at a time.
Predicted peaks of scoring the full model, in fp32, beside those of finetuning the small one with AdamW: importance needs
less {told}. Scores equal the CPU's to 2.5e-7 relative over all test models (tests hold 1e-5). Seconds on a GPU: not
measured.

{table(["model", "batch", "finetuning with", "importance", "finetuning", "full model"], rows)}
"""


def pruning(found: Result) -> str:
    """Peak RSS of importance on the CPU."""
    rows = []
    for case in found["pruning"]:
        for side, name in (("ours", "recap prune"), ("theirs", "Torch-Pruning")):
            peaks = [run["peak_bytes"] for run in case["runs"][side]]
            rows.append(
                [name, case["steps"], mb(sorted(peaks)[len(peaks) // 2], 0), f"{sorted(peaks)[len(peaks) // 2] / 343.5e6:.2f}"]
            )
    return f"""On the CPU, *measured*: peak resident set of a process that prunes ViT-base (343.5 MB of weights) by 33.3 %,
interpreter and libraries included ([benchmarks.md](benchmarks.md) has the whole comparison). Ours holds gradients of
prunable tensors only, and frees each as soon as its scores are summed where the sample is one batch.

{table(["", "gradual steps", "peak, MB", "÷ the model's weights"], rows)}
"""


def predictor(found: Result) -> str:
    """The predictor itself."""
    speed = [
        [
            r["model"],
            r["method"],
            f"{r['process_seconds']:.0f}",
            mb(r["process_peak_rss_bytes"], 0),
            mb(r["imports_rss_bytes"], 0),
            mb(r["model_bytes"], 0),
        ]
        for r in found["speed"]
    ]
    real = [
        [
            r["model"],
            r["method"],
            NAMES[r["settings"]],
            f"{r['predicted_bytes'] / 1e6:,.3f}",
            f"{r['real_bytes'] / 1e6:,.3f}",
            f"{r['predicted_bytes'] / r['real_bytes'] - 1:+.4%}",
        ]
        for r in found["real"]
    ]
    return f"""## The predictor

A fresh process, imports included, on two cores that other programs shared:

{table(["model", "method", "seconds", "its peak RSS, MB", "of it imports", "the model's weights, MB"], speed)}

Beside the same step on real tensors on the CPU (with the CPU's kernels on both sides), as the same tracker counts it:

{table(["model", "method", "settings", "predicted, MB", "real step, MB", "error"], real)}

Tests hold this for all methods on every family of models, and hold the tracker against the CPU allocator's own record
(`torch.profiler`): equal to the byte in fp32 but for the rounding to 512 bytes, 0.3 % with checkpoints. In bf16 and int8
the CPU's kernels convert inputs into scratch memory that no tracker of tensors sees, up to 8 % on small models.

What is not modelled: scratch inside CUDA's kernels (the backward of fused attention has some), cuBLAS and cuDNN
workspaces, and the allocator. `recap finetune` on CUDA measures all of that: `memory.json` has `training_peak` beside the
prediction's kinds.
"""


def predicted() -> list[Result]:
    """ViT-base by method, and RECAP with the settings that need less."""
    model = CASES["ViT-base"].of_recipe()
    plain = CASES["ViT-base"].settings()
    rows = [p.to_json() for p in predict.grid(model, plain, METHODS)]
    rows += [
        predict.predict(model, recipes.changed(plain, SETTINGS[name]), "recap").to_json()
        for name in ("best", "int8", "int8, offloaded")
    ]
    return rows


def load(name: str) -> Result | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main() -> None:
    drawn = predicted()
    (PAGES / "memory.md").write_text(page(drawn), encoding="utf-8")
    save(plots.bars(drawn, name="ViT-base, 224 px"), PAGES / "memory-methods.svg")


def page(drawn: list[Result]) -> str:
    """The text of benchmarks/pages/memory.md."""
    found, speed = load("memory"), load("settings_speed")
    if found is None:
        raise SystemExit("there are no results yet: python benchmarks/memory.py")
    parts = [HEAD + paper(found, drawn), rivals(found), ablation(found, speed), importance(found)]
    for name, section in (("pruning", pruning), ("predictor", predictor)):
        if (other := load(name)) is not None:
            parts += [section(other), ran_on(other)]
    parts += [ran_on(found), *([ran_on(speed)] if speed else [])]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
