"""Writes docs/quality.md from benchmarks/results/quality_*.json: every variant, with its seeds, steps, machine and command.

python benchmarks/quality_page.py
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from record import RESULTS, table
from tables import ran_on

PAGE = Path(__file__).resolve().parent.parent / "docs" / "quality.md"
TASKS = {
    "cifar100": "ViT-tiny (ImageNet weights) on CIFAR-100 at 96 px: 3,000 training and 1,000 test images",
    "sst2": "MiniLM (6 layers, d = 384) on SST-2: 6,000 sentences, the whole validation set of 872",
    "cola": "MiniLM on CoLA: 6,000 sentences, the whole validation set of 1,043; nothing was tuned on it",
    "mrpc": "MiniLM on MRPC: 3,668 pairs, the whole validation set of 408; nothing was tuned on it",
    "rte": "MiniLM on RTE: 2,490 pairs, the whole validation set of 277; nothing was tuned on it",
}
SAID = {
    "full-ft": "full finetuning",
    "head-ft": "head finetuning",
    "lora-ft": "LoRA",
    "pre-ft": "pre-ft: prune, then finetune all that is left",
    "post-ft": "post-ft: finetune all, prune, finetune all that is left",
    "movement": "movement pruning",
    "recap": "**RECAP**, the defaults",
    "plain": "RECAP: no ramp, nothing settled, rate restarts each round",
    "faithful": "RECAP, `faithful: true` (that, and no head warm-up)",
    "one-course": "RECAP: no ramp, nothing settled, one course of the rate",
    "round-course": "RECAP, the rate restarts each round",
    "settled": "RECAP without the ramp",
    "ramped": "RECAP with nothing settled",
    "averaged": "RECAP, importance averaged over rounds (`prune.ema: 0.5`)",
    "averaged-unsettled": "RECAP with nothing settled, importance averaged over rounds",
    "exploring": "RECAP, a quarter of what moves at random (`mask.random: 0.25`)",
    "short-rounds": "RECAP, 8 rounds of half the steps",
    "rate-warmup": "RECAP, the rate rises in the first tenth",
    "head-rate": "RECAP, the head at a rate of 0.001",
    "no-warmup": "RECAP without head warm-up",
    "two-warmups": "RECAP, head warm-up of two epochs",
    "fresh-moments": "RECAP, moments not carried over",
    "global-mask": "RECAP, heads and neurons compete for the mask",
    "per-layer-mask": "RECAP, the mask takes an equal share of every layer",
    "per-example-mask": "RECAP, mask by per-example Fisher",
    "random-mask": "RECAP, mask at random",
    "moving-embeddings": "RECAP, embeddings move too",
    "deep-ramp": "RECAP, `prune.ramp: 0.25`",
    "bf16": "RECAP, bf16 residents, checkpoints",
    "int8": "RECAP, int8 residents, checkpoints",
}
Cell = Mapping[str, Any]


def main() -> None:
    parts = [HEAD]
    for task, title in TASKS.items():
        path = RESULTS / f"quality_{task}.json"
        if path.exists():
            parts += section(title, json.loads(path.read_text(encoding="utf-8")))
    PAGE.write_text("\n".join(parts), encoding="utf-8")


def section(title: str, found: Mapping[str, Any]) -> Iterator[str]:
    """The tables of a task: one for each r_p, methods without one in all of them."""
    cells = [cell for cell in found["cells"] if cell["status"] == "done"]
    yield f"## {title}\n"
    steps = sorted({cell["steps"] for cell in cells})
    taken = " / ".join(map(str, steps))
    usual = f"a peak rate of {found['lr']:g}, after one epoch of head warm-up"
    yield f"{taken} AdamW steps of 32; but where a row says otherwise at {usual}.\n"
    for ratio in sorted({cell["prune_ratio"] for cell in cells if cell["prune_ratio"] is not None}):
        mine = [cell for cell in cells if cell["prune_ratio"] in (None, ratio)]
        yield f"### r_p = {ratio:.1%}, r_f = 50 %\n"
        yield table(HEADER, list(rows(mine))) + "\n"
    if peaks := found.get("predicted"):
        yield predicted(peaks)
    if lost := [cell for cell in found["cells"] if cell["status"] != "done"]:
        yield "Not done: " + "; ".join(f"{cell['variant']}, seed {cell['seed']}: {cell['error']}" for cell in lost) + "\n"
    if note := found.get("note"):
        yield f"{note}\n"
    yield ran_on(found)


def predicted(peaks: Sequence[Cell]) -> str:
    """Predicted peaks of a training step, each beside full finetuning with the library's settings and the same batch."""
    whole = {
        p["micro_batch_size"]: p["peak_bytes"] for p in peaks if (p["method"], p["settings"]) == ("full-ft", "as it comes")
    }
    names = [
        [
            *(p["method"], f"{p['prune_ratio']:.1%}", p["settings"], p["micro_batch_size"], f"{p['peak_bytes'] / 1e6:.1f}"),
            f"{p['peak_bytes'] / whole[p['micro_batch_size']]:.0%}",
        ]
        for p in peaks
    ]
    head = ["method", "r_p", "settings", "examples a backward", "peak, MB", "of full as it comes"]
    return "Memory of a training step, *predicted* (fp32, r_f = 50 %):\n\n" + table(head, names) + "\n"


HEADER = [
    *("variant", "last round, %", "± s.d.", "± s.e.", "against RECAP, paired", "product, %", "each seed", "held, MB"),
    *("of full", "peak, MB"),
]


def rows(cells: Sequence[Cell]) -> Iterator[list[object]]:
    """A row a variant, the best first."""
    by_variant: dict[tuple[str, float | None], list[Cell]] = {}
    for cell in cells:
        by_variant.setdefault((cell["variant"], cell["mask_ratio"]), []).append(cell)
    ours = {cell["seed"]: cell["last"] for cell in by_variant.get(("recap", 0.5), ())}
    for (variant, mask_ratio), mine in sorted(by_variant.items(), key=lambda item: -fmean(cell["last"] for cell in item[1])):
        last = [100 * cell["last"] for cell in mine]
        deviation = stdev(last) if len(last) > 1 else None
        held = max(sum(cell["memory"][f"{kind}_bytes"] for kind in KINDS) for cell in mine)
        whole = 16 * mine[0]["parameters"]["full"]  # fp32 weights, gradients and two moments
        peaks = [cell["memory"]["peak_bytes"] for cell in mine if cell["memory"].get("peak_bytes")]
        yield [
            said(variant) + ("" if mask_ratio in (None, 0.5) else f", r_f = {mask_ratio:.0%}"),
            f"{fmean(last):.1f}",
            "" if deviation is None else f"{deviation:.1f}",
            "" if deviation is None else f"{deviation / len(last) ** 0.5:.1f}",
            "" if mine is by_variant.get(("recap", 0.5)) else against(mine, ours),
            f"{fmean(100 * cell['value'] for cell in mine):.1f}",
            " / ".join(f"{value:.1f}" for value in last),
            f"{held / 1e6:.1f}",
            f"{held / whole:.0%}",
            f"{max(peaks) / 1e6:.0f}" if peaks else "",
        ]


def against(cells: Sequence[Cell], ours: Mapping[int, float]) -> str:
    """The mean difference to RECAP with its defaults at r_f = 50 %, in points, over the seeds that both have, and its error."""
    found = [100 * (cell["last"] - ours[cell["seed"]]) for cell in cells if cell["seed"] in ours]
    if len(found) < 2:
        return ""
    return f"{fmean(found):+.1f} ± {stdev(found) / len(found) ** 0.5:.1f}"


def said(variant: str) -> str:
    """What a variant is, in words."""
    names, _, times = variant.partition("@")
    first, *others = names.split("+")
    more = [SAID[name].removeprefix("RECAP, ").removeprefix("RECAP ") for name in others]
    return ", ".join([SAID[first], *more, *([f"rate × {times}"] if times else [])])


KINDS = ("weights", "gradients", "optimizer")
HEAD = """# Quality

What RECAP gives beside other methods for the same number of optimizer steps, and what each of its settings is worth. Written
by `python benchmarks/quality_page.py` from what `benchmarks/quality.py` measured: pretrained weights, real data, small models
and few steps, as a CPU can bear. The paper's own setting (20 epochs of 50,000 images, ViT-base) was not run.

- *Last round* is the metric after the last optimizer step; *product* that of the best round, which is chosen on the same
  validation data, and flatters methods that have several rounds to choose from. Compare by the first.
- *± s.d.* is the sample standard deviation over the seeds, *± s.e.* that divided by the root of their number. A seed changes
  the training examples, the head and every draw.
- *Against RECAP* is the mean difference to RECAP with its defaults at r_f = 50 %, seed by seed, ± its standard error.
- *Held* is weights, gradients and optimizer state as measured, the most of all rounds, with `fused_backward`, which frees
  each gradient as it is used. *Of full* is its share of 16 bytes a parameter: weights, gradients and both moments in fp32,
  held at once, as full finetuning has them as it comes. *Peak* is predicted for a training step on CUDA: held, and the
  activations of 32 examples without checkpoints.
- What is not measured yet: most variants on more than one of the tasks, some that `benchmarks/quality.py` knows on none, and
  tasks that nothing was tuned on.
- With three seeds a difference of two standard errors may well be chance. Of many variants the best one is flattered: they
  were all looked at on the data they were chosen by.
- Methods share one learning rate on a task, but where a row says otherwise. It was chosen by one-seed trials of several methods
  on CIFAR-100, and by hand for texts, where twice the rate is better at r_p = 50 % for all three methods.
- `pre-ft` and `post-ft` train the embeddings too, RECAP leaves them as they are: in MiniLM they are half of the parameters, and
  much of the difference in what is held.
- Cells with averaged importance were run before it was averaged by what is ranked together.
"""


if __name__ == "__main__":
    main()
