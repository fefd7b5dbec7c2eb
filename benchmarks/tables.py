"""Write benchmarks/pages/benchmarks.md from the figures in benchmarks/results: `python benchmarks/tables.py`."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from record import RESULTS, table

PAGE = Path(__file__).parent / "pages" / "benchmarks.md"
HEAD = """# Benchmarks

Written by `python benchmarks/tables.py` from the JSON files in `benchmarks/results`, which hold every raw figure, the
versions and the machine; [benchmarks/README.md](../README.md) says how to run each. MB are 10⁶ bytes. Speed
is compared in pairs that take turns on one machine, which other programs shared: a ratio is the median of the pairs'
ratios, of CPU seconds unless it says otherwise. Nothing here was run on a GPU.
"""
Result = dict[str, Any]


def partial_memory(found: Result) -> str:
    """Peak memory by the way the mask is implemented."""
    columns = ("activations", "gradients", "optimizer", "weights", "sum_of_maxima", "peak")
    rows = []
    for way in found["results"]:
        predicted = [f"{way['predicted_bytes'][c] / 1e6:.1f}" for c in columns]
        rows.append([way["way"], way["trains"], *predicted, f"{way['measured_bytes']['peak'] / 1e6:.1f}"])
    bold = ["implementation", "12.5 % of", *[c.replace("_", " ") for c in columns], "peak of a real step"]
    return f"""## Memory of a partial update

12 feedforward blocks 768 → 3072 → 768 (GELU, no biases), 197 tokens, fp32, SGD with momentum; the bar was
{found["bar_mb"]} MB. All but the last column are *predicted* by RECAP's tracker over fake tensors (torch's own private one
gave the same figures); the last is *measured* by the same tracker over a real step on the CPU. A kind's figure is its
maximum over the step; the peak is the most that is held at one instant, temporaries included.

The share of entries that may move is the same in every row, but not which: "rows" is 12.5 % of the rows of fc1 and of
fc2; "neurons" is the rows of fc1 and the columns of fc2 of the same 12.5 % of the neurons, as RECAP's mask chooses
them. Columns need less of the input, hence the smaller activations; "ours, rows in both" is the like-for-like
comparison with the four rows above it.

{table(bold, rows)}
"""


def partial_speed(found: Result) -> str:
    """A partial Linear against a dense one."""
    rows = []
    for case in found["results"]:
        ms = [f"{1e3 * median(case['cpu_seconds'][side]):.1f}" for side in ("partial", "dense")]
        layer = f"{case['layer']} {case['inputs']} → {case['outputs']}"
        placed = "scattered" if case["scattered"] else "side by side"
        rows.append([layer, case["moves"], placed, f"{case['share']:.1%}", *ms, case["ratio"], case["ratio_to_torch_fused"]])
    header = ["layer", "trainable", "placed", "share", "partial, ms", "dense, ms", "ratio", "to dense with fused AdamW"]
    return f"""## Time of a partial Linear

Forward, backward and AdamW step at {found["tokens"][0]} × {found["tokens"][1]} tokens, *measured* ({found["pairs"]}
pairs, two threads); the bar is a ratio of 1.

{table(header, rows)}
"""


def step_speed(found: Result) -> str:
    """A step of the small model against a step of full finetuning."""
    rows = []
    for case in found["results"]:
        times = [median(case["cpu_seconds"][side]) for side in ("full", "small")]
        rows.append([case["model"], case["batch"], f"{case['r_f']:.1%}", *times, f"{case['speedup']:.2f}×"])
    header = ["model", "batch", "r_f", "full finetuning, CPU s", "small model, CPU s", "faster by"]
    return f"""## Time of a finetuning step

The small model at r_p = 50 % against full finetuning of the full model, *measured* ({found["pairs"]} pairs, two
threads, random weights); the bar was {found["bar"]}×.

{table(header, rows)}
"""


def optimizer_speed(found: Result) -> str:
    """Host time of an optimizer step against torch's own."""
    seconds = found["cpu_seconds"]
    base = seconds["torch, foreach"]
    rows = [
        [name, f"{1e3 * median(times):.2f}", f"{median(a / b for a, b in zip(times, base, strict=True)):.2f}"]
        for name, times in seconds.items()
    ]
    return f"""## Host time of an optimizer step

{found["tensors"]} matrices of {found["side"]} × {found["side"]}, AdamW, one thread on the CPU, where calls count more than
arithmetic, *measured*. *Mixed ages* is every round after the first: the rows of a tensor have taken different numbers of
steps.

{table(["optimizer", "ms", "to torch's foreach"], rows)}
"""


def pruning(found: Result) -> str:
    """Pruning against Torch-Pruning."""
    rows = []
    for case in found["pruning"]:
        line: list[object] = [case["steps"]]
        for key, unit in (("cpu_seconds", 1.0), ("peak_bytes", 1e6)):
            line += [f"{median(r[key] for r in case['runs'][side]) / unit:.1f}" for side in ("ours", "theirs")]
            line.append(case[f"{key}_ratio"])
        rows.append(line)
    alone = found["surgery"]
    names = {"ours": "RECAP", "theirs": "Torch-Pruning", "theirs_without_graph": "Torch-Pruning, without building its graph"}
    ours = median(alone["cpu_seconds"]["ours"])
    cuts = [[names[n], f"{1e3 * median(times):.0f}", median(times) / ours] for n, times in alone["cpu_seconds"].items()]
    sizes = [
        [names[s["side"]], s["ranking"], " ".join(map(str, s["heads"])), sum(s["heads"]), f"{sum(s['neurons']):,}"]
        for s in found["gradual_sizes"]
    ]
    header = ["gradual steps", "RECAP, CPU s", "Torch-Pruning, CPU s", "ratio", "RECAP, MB", "Torch-Pruning, MB", "ratio"]
    return f"""## Pruning

ViT-base, random weights, 224 pixels, r_p = 33.3 %, two batches of four images a step: importance and surgery,
*measured* ({found["pairs"]} pairs of processes). MB is the peak resident set above that before pruning began. Both rank
all layers' heads together, and all layers' neurons; the bar is a ratio of 1.

{table(header, rows)}

The surgery alone, same groups, same result (largest difference of logits {alone["largest_difference_of_logits"]:.1g});
the bar was 5× with the graph, without which Torch-Pruning cannot prune:

{table(["surgery", "CPU ms", "× RECAP"], cuts)}

What is left of 12 × 12 heads and 12 × 3072 neurons after 33.3 % in four steps. Counted from the original sizes, 96
heads and 24,576 neurons should be. Torch-Pruning's default, ranking within each layer, applies the growing ratio of
each step to what is left of the heads:

{table(["", "ranking", "heads in each layer", "heads", "neurons"], sizes)}
"""


def merge_speed(found: Result) -> str:
    """A merge against saving the same tensors."""
    rows = [
        [r["where"], *[median(r[k]) for k in ("merge_seconds", "save_seconds")], r["wall_ratio"]]
        + [median(r[k]) for k in ("merge_cpu_seconds", "save_cpu_seconds")]
        + [r["cpu_ratio"]]
        for r in found["results"]
    ]
    header = ["merge", "merge, s", "save, s", "ratio", "merge, CPU s", "save, CPU s", "ratio"]
    return f"""## Merge

The merge of round 2 of a ViT-base state (AdamW; {found["written_bytes"] / 1e6:.0f} MB of weights and moments are
written) against saving the same tensors with safetensors and flushing them, *measured* ({found["pairs"]} pairs); the
bar is {found["bar"]:.0f}×. "In a run" the process has verified its inputs before, "alone" it hashes them first. Both
hash what they write, which plain saving does not.

{table(header, rows)}
"""


def token_rows(found: Result) -> str:
    """What of a token table a device holds."""
    lines = []
    tasks = dict.fromkeys(row["task"] for row in found["results"])
    for task in tasks:
        mine = [row for row in found["results"] if row["task"] == task]
        for way in dict.fromkeys(row["moves"] for row in mine):
            pair = {row["resident"]: row for row in mine if row["moves"] == way}
            rows = "all" if "all rows" in way or way == "everything" else f"{mine[0]['held']:,}"
            moving = {"everything": "all", "the tokens of the training data": f"{mine[0]['moving']:,}"}.get(way, "0")
            line: list[object] = [task, rows, moving]
            for weights in ("fp32", "bf16"):
                row = pair[weights]
                held = sum(row[f"{kind}_bytes"] for kind in ("weights", "gradients", "optimizer"))
                line += [f"{held / 1e6:.1f}", f"{row['training_peak_bytes'] / 1e6:.1f}"]
            lines.append(line)
    head = ["task", "rows held", "rows that move", "fp32: held, MB", "peak, MB", "bf16: held, MB", "peak, MB"]
    made = [
        [
            *(row["task"], f"{row['prune_ratio']:.1%}", f"{row['mask_ratio']:.0%}", f"{row['held']:,}", f"{row['moving']:,}"),
            *(f"{row['held_bytes'] / 1e6:.1f}", f"{row['held_bytes'] / row['full_finetuning_bytes']:.1%}"),
        ]
        for row in found["runs"]
    ]
    counted = [row for row in found["results"] if "real_peak_bytes" in row]
    apart = max(abs(row["real_peak_bytes"] - row["cpu_peak_bytes"]) for row in counted)
    return f"""## Rows of the token table

BERT-base (random weights, {found["results"][0]["all"]:,} tokens) by RECAP at r_p = r_f = 50 % without the ramp,
texts of 128 tokens, 32 examples a step in micro-batches of 8, `fused_backward`, checkpoints, AdamW. Rows are counted in
the task's training and validation data; bytes are *predicted* for CUDA. *Held* is the sum of the maxima of weights,
gradients and optimizer state. "All" rows held with none moving is how it was before unused rows were left out; with all
moving it is `mask.train_embeddings: true`, with some of them `tokens`. A real step on the CPU was *measured* for each of
the {len(counted)} ways of {counted[0]["task"]}, and is {apart:,} bytes from its prediction for the CPU's kernels.

{table(head, lines)}

MiniLM by RECAP on tasks of `quality.py` with `fused_backward`, one step in each of four rounds, *measured* on the CPU:
the most that a round held, and its share of full finetuning's 16 bytes a parameter.

{table(["task", "r_p", "r_f", "rows held", "rows that move", "held, MB", "of full"], made)}
"""


TASKS = {
    "cifar100": "ViT-tiny (ImageNet weights) on CIFAR-100, 96 px: 3,000 and 1,000 test images, r_p = 33.3 %, r_f = 87.5 %",
    "sst2": "MiniLM sentence encoder (6 layers, d = 384) on SST-2: 6,000 sentences, the whole dev set, r_p = r_f = 50 %",
}


def activations(found: Result) -> str:
    """Predicted peaks at a batch where activations decide."""
    peaks = {(cell["model"], cell["settings"], cell["case"]): cell["peak_bytes"] / 1e6 for cell in found["cells"]}
    cases = list(dict.fromkeys(cell["case"] for cell in found["cells"]))
    rows = []
    for model, settings in dict.fromkeys((cell["model"], cell["settings"]) for cell in found["cells"]):
        mine = {case: peaks[model, settings, case] for case in cases}
        shown = [f"{mb:.0f}" + (f" ({mb / mine['lora']:.2f})" if "recap" in case else "") for case, mb in mine.items()]
        rows.append([model, settings, *shown])
    return f"""## Where activations decide

Peaks of a training step at batch {found["batch"]} with AdamW, *predicted*, in MB; in brackets RECAP's over LoRA's. RECAP has
r_p = {found["prune_ratio"]:.1%} and the r_f of its column, LoRA rank 8 on query and value. *Attention again* is
`finetune.checkpointing=attention`, for all methods of a row. MiniLM has a table of 12,000 tokens there, as SST-2 uses.

{table(["model", "settings", *cases], rows)}
"""


def frozen_weights(found: Result) -> str:
    """Predicted peaks by frozen weight and method, and what the weights cost in time."""
    weights = list(dict.fromkeys(row["weights"] for row in found["held"]))
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in found["held"]:
        cells.setdefault((row["model"], row["batch"], row["settings"], row["way"]), {})[row["weights"]] = row
    peaks = [[*key, *(f"{of[name]['peak_bytes'] / 1e6:.1f}" for name in weights)] for key, of in cells.items()]
    kinds = [
        [model, way, name, *(f"{of[name]['maxima'][kind] / 1e6:.1f}" for kind in ("weights", "gradients", "optimizer"))]
        for (model, batch, settings, way), of in cells.items()
        if (batch, settings) == (1, "lean")
        for name in weights
    ]
    steps = [[row["model"], *(f"{row['ratio_to_bf16'][name]:.2f}" for name in weights)] for row in found["steps"]]
    matrix, names = found["matrix"], ("quantize", "dense", "rows")
    times = [[name, matrix[name]["int8_cpu_ms"], matrix[name]["nf4_cpu_ms"], matrix[name]["nf4_to_int8"]] for name in names]
    rows, columns = matrix["shape"]
    return f"""## Frozen weights

The peak of one AdamW step, *predicted*, in MB. RECAP prunes 33 %. LoRA has rank 8 on query and value and prunes nothing; over
NF4 it is QLoRA. `lean` has checkpoints and uses each gradient as soon as it is complete; `plain` has neither.

{table(["model", "batch", "settings", "method", *weights], peaks)}

What of it is weights (with fp32 masters), gradients and optimizer state, each at its own maximum; batch size 1, lean, MB:

{table(["model", "method", "frozen weight", "weights", "gradients", "optimizer"], kinds)}

A step of RECAP at batch size {found["steps"][0]["batch"]}, CPU seconds over those with bf16, *measured*, paired:

{table(["model", *weights], steps)}

One matrix of {rows:,} × {columns}, in CPU milliseconds, *measured*, paired; {matrix["rows_looked_up"]:,} rows are looked up:

{table(["", "int8", "nf4", "nf4 ÷ int8"], times)}
"""


def frozen_weights_quality(found: Result) -> str:
    """The metric of RECAP with each frozen weight, seed by seed."""
    cells, task = found["cells"], found["benchmark"].removeprefix("quality_")
    seeds = sorted({cell["seed"] for cell in cells})
    rows = []
    for variant in dict.fromkeys(cell["variant"] for cell in cells):
        mine = {cell["seed"]: cell for cell in cells if cell["variant"] == variant}
        each = [f"{100 * mine[seed]['last']:.1f}" if seed in mine else "" for seed in seeds]
        mean = f"{100 * sum(cell['last'] for cell in mine.values()) / len(mine):.1f}"
        weights = max(cell["memory"]["weights_bytes"] for cell in mine.values())
        rows.append([FROZEN[variant], mean, *each, f"{weights / 1e6:.1f}"])
    return f"""## Accuracy with frozen weights: {task}

RECAP at r_p = 33.3 %, r_f = 50 % by the recipe of [quality.md](quality.md), the last round's accuracy in %, *measured*, one CPU
thread. int8 and NF4 have checkpoints, which change nothing but memory. {found.get("note", "")}

{table(["frozen weight", "mean", *(f"seed {seed}" for seed in seeds), "weights, MB"], rows)}
"""


def distillation(found: Result) -> str:
    """What a teacher is worth: the same runs with it and without, on examples that nothing was chosen by."""
    cells = {(cell["case"], cell["seed"], cell["taught"]): cell for cell in found["cells"]}
    rows = []
    for case, seed in dict.fromkeys((case, seed) for case, seed, _ in cells if case != "teacher"):
        name, ratio, mask = case.split(":")
        start = "the finetuned model" if name.startswith("compress") else "the pretrained model"
        teacher = cells["teacher", seed, False]
        both = [cells.get((case, seed, taught)) for taught in (False, True)]
        figures = [f"{100 * cell[key]:.1f}" if cell else "" for key in ("held_out", "validation") for cell in both]
        size = next(f"{cell['parameters'] / cell['full_parameters']:.0%}" for cell in both if cell)
        rows.append(
            [start, f"{float(ratio):.0%}", f"{float(mask):.0%}", seed, f"{100 * teacher['held_out']:.1f}", *figures, size]
        )
    steps = max(cell["steps"] for cell in found["cells"])
    header = ["begins at", "r_p", "r_f", "seed", "teacher, held out", "alone, held out", "taught, held out"]
    header += ["alone, validation", "taught, validation", "parameters left"]
    return f"""## A teacher: {found["benchmark"].removeprefix("distillation_")}

RECAP in four rounds of {steps} steps in all, by the recipe of [quality.md](quality.md), {found["metric"]} in %, *measured*.
The teacher is full finetuning at its best rate, of as many steps again: what has a teacher, or begins at one, has twice the
steps in all.
*Held out* are {found["held_out"]}; the best round was chosen by the validation data.

{table(header, rows)}
"""


def quality(found: Result) -> str:
    """RECAP beside plain full finetuning, on real weights and data."""
    cells = found["cells"]
    task = cells[0]["task"]
    rows = []
    for method in dict.fromkeys(cell["method"] for cell in cells):
        mine = [cell for cell in cells if cell["method"] == method]
        mean = [f"{100 * sum(c['best'] for c in mine) / len(mine):.1f}", " / ".join(f"{100 * c['best']:.1f}" for c in mine)]
        held = [f"{mine[0][key] / 1e6:.1f}" for key in ("weights_bytes", "gradients_bytes", "optimizer_bytes")]
        stages = [f"{median(c['cpu_seconds'][s] for c in mine):.0f}" for s in ("init", "prune", "mask", "finetune", "merge")]
        size = f"{mine[0]['parameters']['product'] / 1e6:.2f}"
        rows.append([QUALITY[method], *mean, f"{mine[0]['lr']:g}", *stages, *held, size])
    names = ["init", "prune", "mask", "finetune", "merge"]
    header = ["method", f"{cells[0]['metric']}, mean %", "each seed", "rate", *[f"{n}, CPU s" for n in names]]
    header += ["weights, MB", "gradients, MB", "optimizer, MB", "product, M parameters"]
    seeds = sorted({cell["seed"] for cell in cells})
    return f"""## Quality with the settings of memory: {task}

{TASKS[task]}.
{cells[0]["steps"]} AdamW steps of 32 for all, after one epoch of head warm-up for all, {len(seeds)} seeds
({", ".join(map(str, seeds))}), one CPU thread, *measured*. RECAP is the paper's plain algorithm with a head warm-up here (an
earlier commit; [quality.md](quality.md) has RECAP as it is now). Its metric is that of its best round, chosen on the same
data as in the paper; full finetuning has one round. Seconds are CPU seconds over all rounds; a CPU computes bf16 more
slowly than fp32. No rate was searched for in these runs, but RECAP's for cifar100 is the better of two that a one-seed
prototype tried on this very task, and full finetuning's the only one it tried; those for sst2 were chosen by hand
beforehand. {found.get("note", "")}

{table(header, rows)}
"""


QUALITY = {
    "recap": "RECAP",
    "recap-bf16": "RECAP, bf16, fused backward, checkpoints",
    "recap-int8": "the same, frozen matrices in int8",
    "full": "full finetuning",
}
FROZEN = {"recap": "fp32", "bf16": "bf16", "int8": "int8", "nf4": "nf4"}
SECTIONS: dict[str, Callable[[Result], str]] = {
    "memory_settings_cifar100": quality,
    "memory_settings_sst2": quality,
    "partial_memory": partial_memory,
    "partial_speed": partial_speed,
    "step_speed": step_speed,
    "optimizer_speed": optimizer_speed,
    "pruning": pruning,
    "merge_speed": merge_speed,
    "token_rows": token_rows,
    "activations": activations,
    "frozen_weights": frozen_weights,
    "frozen_weights_sst2": frozen_weights_quality,
    "frozen_weights_cifar100": frozen_weights_quality,
    "distillation_cifar100": distillation,
}


def ran_on(found: Result) -> str:
    """The line below each section: on what, when and how."""
    libraries = ", ".join(f"{n} {v}" for n, v in found["versions"].items())
    machines = found.get("machines") or [found["machine"]]
    where = " or ".join(f"{m['cores']} cores of {m['cpu']}, {m['ram_gib']} GiB" for m in machines)
    settings = "".join(f"{name}={value} " for name, value in found["environment"].items())
    first, *others = found.get("commands") or [found["command"]]
    commands = ", ".join([f"`{settings}{first}`", *(f"the same with `{command}`" for command in others)])
    return f"<sub>{commands}, {found['date']}; {where}; {libraries}.</sub>\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The text of benchmarks/pages/benchmarks.md."""
    parts = [HEAD]
    for name, section in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            parts += [section(found), ran_on(found)]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
