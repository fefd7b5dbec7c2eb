"""Write pages/segmentation.md from the figures in results: `python benchmarks/segmentation_page.py`."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from record import RESULTS, table
from tables import ran_on

PAGES = Path(__file__).parent / "pages"
Cell = dict[str, Any]
KINDS = ("weights", "gradients", "optimizer")
FULL = ("plain", "fp32")
TITLES = {
    "dpt": "DPT on the pretrained ViT-tiny",
    "mask2former": "Mask2Former with a small Swin, from random weights",
}
HEAD = """# Segmentation

Semantic segmentation on CamVid, and predicted memory of Mask2Former at the shapes of the paper's Table 2. Written by
`python benchmarks/segmentation_page.py` from the JSON files in `benchmarks/results`. MB are 10⁶ bytes.

- CamVid has 367 training, 101 validation and 233 test images of 360 × 480 pixels, and eleven classes. The round was chosen by
  the validation images. The test images chose no round, but rates were compared on both.
- The model sees squares, {sides}. It is scored at 360 × 480, with logits or masks interpolated.
- All methods take the same number of optimizer steps of {batch} images, after an epoch of warm-up of the head. Each cell is one
  run, in a single thread, beside other work. Seconds are CPU seconds.
- *Held* is weights, gradients and optimizer state, as a share of full finetuning's 16 bytes a parameter. *ms* is that of one
  image, beside other work: a ratio of products, and no more.

"""


def held(cell: Cell) -> str:
    """What a cell held, as a share of full finetuning's."""
    memory = cell["memory"]
    total, full = (sum(of[f"{kind}_bytes"] for kind in KINDS) for of in (memory, memory["full_finetuning"]))
    return f"{100 * total / full:.0f} %"


def percent(values: list[float]) -> str:
    """The mean of the seeds, in percent; of several with each of them."""
    whole = f"{100 * mean(values):.1f}"
    return whole if len(values) == 1 else f"{whole} ({', '.join(f'{100 * value:.1f}' for value in values)})"


def by_case(found: dict[str, Any]) -> dict[tuple[str, int], list[Cell]]:
    """The cells of a case, in the order of their seeds."""
    cases: dict[tuple[str, int], list[Cell]] = defaultdict(list)
    for cell in sorted(found["cells"], key=lambda one: one["seed"]):
        cases[cell["case"], cell["steps"]].append(cell)
    return dict(cases)


def accuracy(model: str, found: dict[str, Any]) -> str:
    rows = []
    for (case, steps), cells in by_case(found).items():
        rows.append(
            [
                case,
                steps,
                percent([cell["validation"]["miou"] for cell in cells]),
                percent([cell["test"]["miou"] for cell in cells]),
                percent([cell["test"]["pixel_accuracy"] for cell in cells]),
                f"{mean(cell['parameters'] for cell in cells) / 1e6:.2f} M",
                held(cells[0]),
                f"{mean(cell['milliseconds'] for cell in cells):.0f}",
                f"{mean(cell['cpu_seconds'] for cell in cells):.0f}",
            ]
        )
    head = ["method:r_p@rate", "steps", "mIoU, validation", "mIoU, test", "pixels, test", "product", "held", "ms", "s"]
    return f"## {TITLES[model]}\n\n{ran_on(found)}\n\n{table(head, rows)}\n"


def classes(found: dict[str, Any]) -> str:
    cases = {case: cells[0]["test"] for (case, _), cells in by_case(found).items()}
    names = [key for key in next(iter(cases.values())) if key.startswith("iou/")]
    rows = [[key.removeprefix("iou/"), *(f"{100 * test.get(key, 0.0):.0f}" for test in cases.values())] for key in names]
    return f"IoU of each class on the test images, first seed, in %:\n\n{table(['class', *cases], rows)}\n"


def memory(found: dict[str, Any]) -> str:
    full = {(c["model"], c["side"]): c["training_peak_bytes"] for c in found["cells"] if (c["method"], c["settings"]) == FULL}
    rows = []
    for cell in found["cells"]:
        peak, paper = cell["training_peak_bytes"], found["paper_mb"][cell["model"]]
        name = "full" if cell["method"] == "plain" else cell["method"]
        is_theirs = cell["settings"] == "fp32" and name in paper
        theirs = f"{100 * paper[name] / paper['full']:.0f} %" if is_theirs else "-"
        kinds = [f"{cell['at_peak'][f'{kind}_bytes'] / 1e6:.0f}" for kind in ("weights", "optimizer", "activations")]
        share = f"{100 * peak / full[cell['model'], cell['side']]:.0f} %"
        rows.append(
            [
                f"Swin-{cell['model']}",
                cell["side"],
                cell["settings"],
                cell["method"],
                f"{peak / 1e6:.0f}",
                share,
                theirs,
                *kinds,
            ]
        )
    head = ["model", "px", "settings", "method", "MB", "of full, fp32", "the paper's", "weights", "optimizer", "activations"]
    steps = "".join(map(real_step, found.get("steps", [])))
    crops = " and ".join(f"{side} px for Swin-{size}" for size, side in found["crops"].items())
    return (
        "## Memory at the paper's shapes\n\nPredicted: one training step at batch 1 with SGD and a fused backward, 19 classes "
        f"in the image, random weights. The paper states no crop. Full finetuning here needs what it has there at {crops}. "
        "*plain* is full finetuning as transformers has it; *full* samples again in the backward of deformable attention, as "
        "the methods below it do.\n\n"
        f"{table(head, rows)}\n\n{steps}"
    )


def real_step(one: Cell) -> str:
    return (
        f"- A real step of {one['method']} with Swin-{one['model']} at {one['side']} px on this CPU let the resident set grow "
        f"by {one['resident_bytes'] / 1e6:,.0f} MB, {one['share']:.2f} times what is predicted for its kernels.\n"
    )


def page() -> str:
    """The whole page."""
    found = {model: json.loads((RESULTS / f"segmentation_{model}.json").read_text(encoding="utf-8")) for model in TITLES}
    sides = " and ".join(f"{one['side']} px for {model}" for model, one in found.items())
    parts = [HEAD.format(sides=sides, batch=next(iter(found.values()))["batch"])]
    for model, one in found.items():
        parts += [accuracy(model, one), "\n", classes(one), "\n"]
    parts.append(memory(json.loads((RESULTS / "segmentation_memory.json").read_text(encoding="utf-8"))))
    return "".join(parts)


if __name__ == "__main__":
    (PAGES / "segmentation.md").write_text(page(), encoding="utf-8")
